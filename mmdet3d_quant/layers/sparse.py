"""Quantized sparse 3-D convolutions, of spconv 2 and of mmcv.

mmdet3d takes its sparse convolutions from spconv 2 where it is installed, else from mmcv; so do
``QuantSubMConv3d`` and ``QuantSparseConv3d``, under one name.
"""

from __future__ import annotations

from typing import Any

from mmcv.ops import SparseConv3d as MMCVSparseConv3d
from mmcv.ops import SubMConv3d as MMCVSubMConv3d
from mmcv.ops.sparse_conv import SparseConvolution as MMCVSparseConvolution
from mmengine.registry import MODELS
from torch import Tensor, nn

from mmdet3d_quant.layers.base import QuantLayer
from mmdet3d_quant.layers.features import values, with_values

#: Float sparse convolutions of either library, and those whose weight is (kernel, in, out).
SPARSE_CONVS: tuple[type, ...] = (MMCVSparseConvolution,)
OUTPUTS_LAST: tuple[type, ...] = (MMCVSparseConvolution,)
try:
    from spconv.pytorch.conv import SparseConvolution

    from mmdet3d_quant.parents.sparse_conv import PortableSparseConv3d, PortableSubMConv3d
except ImportError:
    HAS_SPCONV2 = False
else:
    HAS_SPCONV2 = True
    SPARSE_CONVS = (*SPARSE_CONVS, SparseConvolution)


def adds_bias(layer: nn.Module) -> bool:
    """True if a layer adds a bias: spconv's own refuse to on a CPU, ours do not."""
    if not HAS_SPCONV2 or not isinstance(layer, SparseConvolution):
        return True
    return layer.weight.is_cuda or isinstance(layer, (PortableSparseConv3d, PortableSubMConv3d))


class _QuantSparse(QuantLayer):
    """Quantizes the values at active sites, per tensor, and the weight per output channel.

    The cells between the sites are zero, and zero is on every grid: they need no rounding and
    are not looked at when ranges are chosen.
    """

    why_integers = 'libspconv, which runs sparse convolutions, has INT8 only'

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_quantizers()

    def _quantized(self, x: Any) -> Any:
        return with_values(x, self._input_quantizer(values(x)))


class _WithWeight:
    """Proxy of a module with another weight, for a ``forward`` that reads ``self.weight``."""

    def __init__(self, module: Any, weight: Tensor):
        self._module, self.weight = module, weight

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _QuantMMCV(_QuantSparse):
    """The weight has shape (kernel, in, out)."""

    weight_axis = 4

    def forward(self, input: Any) -> Any:
        """Convolves an mmcv ``SparseConvTensor``."""
        # Upstream has no seam, and assigning the rounded weight would train it in place of its own.
        seen = _WithWeight(self, self._weight_quantizer(self.weight))
        return MMCVSubMConv3d.forward(seen, self._quantized(input))


@MODELS.register_module()
class QuantMMCVSubMConv3d(_QuantMMCV, MMCVSubMConv3d):
    """``mmcv.ops.SubMConv3d`` with quantized input (per tensor) and weight (per output channel).

    Takes its arguments. In float mode it equals it.
    """


@MODELS.register_module()
class QuantMMCVSparseConv3d(_QuantMMCV, MMCVSparseConv3d):
    """``mmcv.ops.SparseConv3d`` with quantized input (per tensor) and weight (per output channel).

    Takes its arguments. In float mode it equals it.
    """


if HAS_SPCONV2:

    class _QuantSpconv(_QuantSparse):
        """The weight has shape (out, kernel, in)."""

        def _conv_forward(
            self, training: bool, input: Any, weight: Tensor, bias: Tensor | None, *args: Any,
            **kwargs: Any,
        ) -> Any:  # fmt: skip
            return super()._conv_forward(
                training, self._quantized(input), self._weight_quantizer(weight), bias, *args,
                **kwargs,
            )  # fmt: skip

    @MODELS.register_module()
    class QuantSubMConv3d(_QuantSpconv, PortableSubMConv3d):
        """spconv's ``SubMConv3d`` with quantized input (per tensor) and weight (per channel).

        Takes its arguments. In float mode it equals it bit for bit on a GPU, and on a CPU, where
        spconv's own is wrong, ``parents.sparse_conv.PortableSubMConv3d``.
        """

    @MODELS.register_module()
    class QuantSparseConv3d(_QuantSpconv, PortableSparseConv3d):
        """spconv's ``SparseConv3d`` with quantized input (per tensor) and weight (per channel).

        Takes its arguments. In float mode it equals it bit for bit on a GPU, and on a CPU, where
        spconv's own is wrong, ``parents.sparse_conv.PortableSparseConv3d``.
        """

else:
    QuantSubMConv3d = QuantMMCVSubMConv3d  # type: ignore[misc]
    QuantSparseConv3d = QuantMMCVSparseConv3d  # type: ignore[misc]
    MODELS.register_module('QuantSubMConv3d', module=QuantSubMConv3d)
    MODELS.register_module('QuantSparseConv3d', module=QuantSparseConv3d)

#: Sparse convolutions of a float config, and what each becomes.
QUANT_SPARSE = {'SubMConv3d': QuantSubMConv3d, 'SparseConv3d': QuantSparseConv3d}
