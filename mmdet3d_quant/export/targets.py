"""Properties of the engines that files are exported for, as data."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import onnx

from mmdet3d_quant.core.formats import FP8, INT8, Format
from mmdet3d_quant.core.quantizer import Quantizer
from mmdet3d_quant.export.boxes import BOXES_KEY, CODINGS, CUDA_BEVFUSION, MMDET3D, BoxCoding
from mmdet3d_quant.files.metadata import STRONG

#: How an engine chooses the type of a layer that no Q/DQ pair surrounds: freely, by the flags it
#: is built with, or as the file says.
WEAK = 'weak'


@dataclass(frozen=True)
class Target:
    """A generation of an engine that a graph is written for.

    Attributes:
        name: Value of ``--target``.
        numbers: Number formats that its engines run.
        typing: :data:`WEAK`: files are float32 outside of Q/DQ; :data:`STRONG`: FP16, but for what
            FP16 cannot hold, their inputs, outputs and scales, too.
        opset: ONNX opset of the files, unless another is asked for.
        opsets: The first and the last opset that may be.
        weights: How quantized weights are stored, unless asked for otherwise.
        layernorms: Forms of the layer norm that may be.
        unsigned: Whether activations may be UINT8 (zero point 0). A tensor that is never negative
            then has twice as many steps in the same range, ``amax / 255`` instead of
            ``amax / 127``.
        libspconv: Whether the set has the sparse LiDAR encoder, as libspconv reads it.
        script: Whether the set has ``build_engines.sh``.
        flags: Those of ``trtexec`` in it that choose types, for every file.
        flags_by_format: Whether a file with Q/DQ wants the name of its number format as one more.
        formats: Type and layout of inputs and outputs that ``trtexec`` is told; empty where the
            file says them.
        compiled: Whether NVIDIA's compiler judges the files.
        boxes: How the outputs of the head code boxes.
        tiles: Whether a transposed convolution with a kernel as large as its stride, or a depthwise
            one that interpolates, becomes a convolution and DepthToSpace, which runs in INT8 where
            the other may not.
    """

    name: str
    numbers: tuple[Format, ...] = (INT8,)
    typing: str = WEAK
    opset: int = 17
    opsets: tuple[int, int] = (13, 21)
    weights: str = 'float'
    layernorms: tuple[str, ...] = ('standard', 'custom')
    unsigned: bool = False
    libspconv: bool = False
    script: bool = False
    flags: tuple[str, ...] = ()
    flags_by_format: bool = False
    formats: str = ''
    compiled: bool = False
    boxes: BoxCoding = MMDET3D
    tiles: bool = False

    @property
    def strong(self) -> bool:
        """Whether engines compute in the types that the file says."""
        return self.typing == STRONG

    @property
    def half(self) -> bool:
        """Whether engines may compute what has no Q/DQ in FP16."""
        return self.strong or '--fp16' in self.flags


#: What strongly typed targets have in common: FP16 scales and FP8 are of opset 19, to which ONNX
#: cannot convert the custom layer norm.
_STRONG = Target(
    '',
    numbers=(INT8, FP8),
    typing=STRONG,
    opset=19,
    opsets=(19, 21),
    weights='int8',
    layernorms=('standard',),
    compiled=True,
    tiles=True,
)
_DEPLOYED = replace(_STRONG, libspconv=True, script=True, boxes=CUDA_BEVFUSION)

#: By name, oldest first.
TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        Target(
            'tensorrt8',
            libspconv=True,
            script=True,
            flags=('--fp16',),
            flags_by_format=True,
            formats='fp16:chw',
            compiled=True,
            boxes=CUDA_BEVFUSION,
            tiles=True,
        ),
        replace(_DEPLOYED, name='tensorrt10', flags=('--stronglyTyped',)),
        replace(_DEPLOYED, name='tensorrt11'),
        replace(_STRONG, name='tensorrt-rtx'),
        Target('openvino', unsigned=True),
    )
}
#: Other names of targets.
ALIASES = {'tensorrt': 'tensorrt8'}
DEFAULT = 'tensorrt'
#: Key of the target's name in a file's ``metadata_props``.
TARGET_KEY = 'mmdet3d_quant.target'


def target_names() -> list[str]:
    """Lists all values of ``--target``, the other names last."""
    return [*TARGETS, *ALIASES]


def target_of(name: str) -> Target:
    """Looks up a target by name.

    Raises:
        ValueError: If there is none of that name.
    """
    found = TARGETS.get(ALIASES.get(name, name))
    if found is None:
        raise ValueError(f'there is no target {name!r}; there are {", ".join(target_names())}')
    return found


def require_formats(by_name: Mapping[str, Quantizer], target: Target) -> None:
    """Checks that a target's engines run the number formats of quantizers.

    Args:
        by_name: The quantizers.
        target: The target.

    Raises:
        ValueError: If not; names the first quantizer and what to do.
    """
    for name, quantizer in by_name.items():
        fmt = quantizer.spec.format
        if quantizer.float_reason is None and fmt not in target.numbers:
            known = ', '.join(f.name for f in target.numbers)
            others = [t.name for t in TARGETS.values() if fmt in t.numbers]
            cure = f'take --target {" or ".join(others)}, or ' if others else ''
            raise ValueError(
                f'only {known} can be exported for {target.name}; {name} has {fmt.name}: {cure}'
                f'set `format` of its part to {known} and calibrate again'
            )


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
