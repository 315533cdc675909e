"""Properties of the engines that files are exported for, as data."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import onnx

from mmdet3d_quant.export.boxes import BOXES_KEY, CODINGS, CUDA_BEVFUSION, MMDET3D, BoxCoding


@dataclass(frozen=True)
class Target:
    """An engine that a graph is written for.

    Attributes:
        name: Value of ``--target``.
        unsigned: Whether activations may be UINT8 (zero point 0). A tensor that is never negative
            then has twice as many steps in the same range, ``amax / 255`` instead of
            ``amax / 127``.
        libspconv: Whether the set has the sparse LiDAR encoder, as libspconv reads it.
        script: Whether the set has ``build_engines.sh``.
        boxes: How the outputs of the head code boxes.
        tiles: Whether a transposed convolution with a kernel as large as its stride becomes a 1x1
            convolution and DepthToSpace, which runs in INT8 where the other may not.
    """

    name: str
    unsigned: bool = False
    libspconv: bool = False
    script: bool = False
    boxes: BoxCoding = MMDET3D
    tiles: bool = False


#: By name; the first is the default.
TARGETS = {
    t.name: t
    for t in (
        Target('tensorrt', libspconv=True, script=True, boxes=CUDA_BEVFUSION, tiles=True),
        Target('openvino', unsigned=True),
    )
}
DEFAULT = next(iter(TARGETS))
#: Key of the target's name in a file's ``metadata_props``.
TARGET_KEY = 'mmdet3d_quant.target'


def target_of(name: str) -> Target:
    """Looks up a target by name.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in TARGETS:
        raise ValueError(f'there is no target {name!r}; there are {", ".join(TARGETS)}')
    return TARGETS[name]


def target_in(model: onnx.ModelProto) -> str:
    """Reads the name of the target that a file was written for; the default if it does not say."""
    return {p.key: p.value for p in model.metadata_props}.get(TARGET_KEY, DEFAULT)


def coding_of(names: Collection[str]) -> BoxCoding | None:
    """Finds a target's coding of boxes with outputs of these names; None if they are no boxes.

    Codings of equal names have the same centres and scores.
    """
    return next((t.boxes for t in TARGETS.values() if t.boxes.codes(names)), None)


def coding_in(model: onnx.ModelProto) -> BoxCoding:
    """Reads how a file codes boxes.

    Raises:
        ValueError: If it names a coding that there is not.
    """
    name = {p.key: p.value for p in model.metadata_props}.get(BOXES_KEY, MMDET3D.name)
    known = {c.name: c for c in (*CODINGS.values(), *(t.boxes for t in TARGETS.values()))}
    if name not in known:
        raise ValueError(f'there is no coding of boxes {name!r}; there are {", ".join(known)}')
    return known[name]
