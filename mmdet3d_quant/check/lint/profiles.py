"""What the engine generations take of a Q/DQ graph, as data by the name of the target."""

from __future__ import annotations

from dataclasses import dataclass

from mmdet3d_quant.export.targets import target_of


@dataclass(frozen=True)
class Profile:
    """A generation of an engine, as rules see it.

    Attributes:
        name: Of the target.
        title: For people.
        unsigned: Whether activations may be UINT8, with any zero point.
        zero_points: Whether every Q and DQ needs its third input.
        float_scales: Whether scales must be float32, since the bytes of others are read as such.
        last_opset: The last that is supported; None where none was seen that is not.
        deconvolutions: Whether a transposed convolution runs in INT8.
        fp8: Whether layers run in FP8.
        scalars: Whether the scale of an activation must have no dimension: one of shape (1,) is
            one per channel.
    """

    name: str
    title: str
    unsigned: bool = False
    zero_points: bool = False
    float_scales: bool = False
    last_opset: int | None = None
    deconvolutions: bool = True
    scalars: bool = False
    fp8: bool = True


#: By the name of the target, in the order of the columns of ``docs/lint.md``.
PROFILES: dict[str, Profile] = {
    p.name: p
    for p in (
        Profile(
            'tensorrt8',
            'TensorRT 8.6',
            zero_points=True,
            float_scales=True,
            last_opset=17,
            fp8=False,
        ),
        Profile('tensorrt10', 'TensorRT 10'),
        Profile('tensorrt11', 'TensorRT 11', scalars=True),
        Profile('tensorrt-rtx', 'TensorRT for RTX 1.7', deconvolutions=False, scalars=True),
        Profile('openvino', 'OpenVINO', unsigned=True, fp8=False),
    )
}


def profile_of(name: str) -> Profile:
    """Looks up a profile by the name of the target.

    Raises:
        ValueError: If there is none of that name.
    """
    return PROFILES[target_of(name).name]
