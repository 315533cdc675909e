"""Properties of the engines that files are exported for, as data."""

from __future__ import annotations

from dataclasses import dataclass


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
    """

    name: str
    unsigned: bool = False
    libspconv: bool = False
    script: bool = False


#: By name; the first is the default.
TARGETS = {
    t.name: t
    for t in (Target('tensorrt', libspconv=True, script=True), Target('openvino', unsigned=True))
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
