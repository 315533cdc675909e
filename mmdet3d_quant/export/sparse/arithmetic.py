"""INT8 of a sparse encoder as each runtime computes it, as data."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

from torch import nn

from mmdet3d_quant.core.modes import quantizers
from mmdet3d_quant.core.spec import select
from mmdet3d_quant.layers import QuantAdd


@dataclass(frozen=True)
class Arithmetic:
    """How a runtime computes the layers of a sparse encoder.

    Attributes:
        name: Of the runtime.
        int8: Patterns of the layers that compute in INT8 if they have ranges, relative to the
            encoder, as ``skip`` takes them: ``'encoder_layers.encoder_layer3'``, ``'*.conv1'``.
        adds: Whether a residual add rounds both summands to one INT8 grid.
        kept: What is kept between layers: ``'readers'``: INT8 where all that read a tensor are,
            with one range for all of them, else FP16; ``'fp16'``; ``'fp32'``. Of the latter two,
            a layer rounds what it reads itself, with a range of its own.
        integers: Whether products of INT8 numbers are summed as integers, and the sum becomes
            FP16 by one factor per channel and the bias. Else values are rounded to their grids and
            computed in floating point, which is the same but for its last bits.
        ones: What is wrong with kernels of 1x1x1; empty if they are computed right.
        places: Most places of a kernel; None: any number.
    """

    name: str
    int8: tuple[str, ...] = ('*',)
    adds: bool = False
    kept: str = 'fp16'
    integers: bool = False
    ones: str = ''
    places: int | None = None

    @property
    def half(self) -> bool:
        """Whether tensors that are not INT8 are FP16."""
        return self.kept != 'fp32'


LIBSPCONV = Arithmetic(
    'libspconv',
    adds=True,
    kept='readers',
    ones='computed wrongly by libspconv (Lidar_AI_Solution, issue 302)',
)
#: INT8 from the third stage on, where it is faster than FP16 in the published measurements; a
#: kernel has as many places as the mask of ImplicitGemm has bits.
AUTOWARE = Arithmetic(
    'autoware',
    int8=('encoder_layers.encoder_layer[3-9]', 'conv_out'),
    integers=True,
    ones='computed by spconv without ImplicitGemm',
    places=32,
)
OPENVINO = Arithmetic('openvino', int8=(), kept='fp32')
#: By name of the runtime that computes the sparse layers.
ARITHMETICS: dict[str, Arithmetic] = {a.name: a for a in (LIBSPCONV, AUTOWARE, OPENVINO)}


def with_int8(arithmetic: Arithmetic, patterns: tuple[str, ...]) -> Arithmetic:
    """Chooses other layers to compute in INT8: the arithmetic with other patterns."""
    return replace(arithmetic, int8=tuple(patterns))


def computed_as(encoder: nn.Module, arithmetic: Arithmetic) -> nn.Module:
    """Copies an encoder so that its fake quantization follows a runtime.

    Args:
        encoder: Quantized or float; left unchanged.
        arithmetic: Of the runtime.

    Returns:
        The copy. Whatever the runtime does not compute in INT8 is kept float there.

    Raises:
        ValueError: If a pattern matches no quantized layer of the encoder.
    """
    encoder = copy.deepcopy(encoder)
    by_name = quantizers(encoder)
    chosen: set[str] = set()
    for pattern in arithmetic.int8 if by_name else ():
        names = select(by_name, pattern)
        if not names:
            layers = ', '.join(dict.fromkeys(n.rpartition('.')[0] for n in by_name))
            raise ValueError(
                f'the INT8 pattern {pattern!r} of {arithmetic.name} matches no quantized layer of '
                f'{type(encoder).__name__}; its quantized layers are: {layers}'
            )
        chosen.update(names)
    for name, quantizer in by_name.items():
        adds = isinstance(encoder.get_submodule(name.rpartition('.')[0]), QuantAdd)
        if quantizer.float_reason is None and (
            name not in chosen or (adds and not arithmetic.adds)
        ):
            quantizer.keep_float(f'{arithmetic.name} computes it in floating point')
    return encoder
