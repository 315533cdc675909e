"""Quantized sparse LiDAR encoders: BEVFusion's, and that of SECOND, CenterPoint and others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from mmdet3d.models.layers import SparseBasicBlock
from mmdet3d.registry import MODELS
from torch import nn

from mmdet3d_quant.layers import QuantAdd
from mmdet3d_quant.layers.base import QuantLayer
from mmdet3d_quant.layers.features import values, with_values
from mmdet3d_quant.layers.sparse import QUANT_SPARSE
from mmdet3d_quant.models.base import Formats, Skip, arguments, finish, quant_sparse_conv_cfg
from mmdet3d_quant.parents import BEVFusionSparseEncoder, PortableSparseEncoder

#: What stays float unless ``skip`` says otherwise. With intensities up to 255 in the tensor, a step
#: of its range is 2: of metres little is left, of seconds nothing. On the tiny BEVFusion the map of
#: the encoder has 28 dB of signal to noise; with this layer in INT8, too, 20 to 21.
FIRST_FLOAT = {'conv_input': 'its input has metres, intensity and seconds in one tensor'}


@MODELS.register_module()
class QuantSparseBasicBlock(SparseBasicBlock):
    """mmdet3d's ``SparseBasicBlock``, quantized; takes its arguments.

    Both inputs of the add are on one grid, as in CUDA-BEVFusion's engine, whose add adds integers.
    That engine keeps a tensor once, in INT8, and knows only the ranges of the layers that read it:
    where two read one tensor, their ranges must be equal, or one of them is not used.

    Attributes:
        add: Quantized add. Without downsample its scale is conv1's input scale (both read the input
            of the block). With downsample, the downsample convolution's input shares conv1's.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        bound = arguments(SparseBasicBlock, args, kwargs)
        bound['conv_cfg'] = quant_sparse_conv_cfg(bound.get('conv_cfg'))
        super().__init__(**bound)
        self.add = QuantAdd()

    def quant_ties(self) -> list[list[str]]:
        """Ties all quantizers that read the input of the block."""
        readers = ['conv1._input_quantizer']
        if self.downsample is None:
            readers.append('add._input_quantizer')
        else:
            children = dict(self.downsample.named_children())
            readers += [
                f'downsample.{name}._input_quantizer'
                for name, layer in list(children.items())[:1]
                if isinstance(layer, QuantLayer)
            ]
        return [readers]

    def forward(self, x: Any) -> Any:
        """Computes the output of the block, a ``SparseConvTensor`` like its input."""
        out = self.conv1(x)
        out = with_values(out, self.relu(self.norm1(values(out))))
        out = self.conv2(out)
        identity = x if self.downsample is None else self.downsample(x)
        total = self.add(self.norm2(values(out)), values(identity))
        return with_values(out, self.relu(total))


if TYPE_CHECKING:
    _Encoder = PortableSparseEncoder
else:
    _Encoder = object


class _QuantEncoder(_Encoder):
    """Builds a float encoder out of quantized layers and blocks."""

    float_encoder: ClassVar[type[nn.Module]]
    convs: ClassVar[Mapping[str, type]] = QUANT_SPARSE
    block: ClassVar[type] = QuantSparseBasicBlock

    def __init__(
        self,
        *args: Any,
        skip: Skip = FIRST_FLOAT,
        learn_amax: bool = False,
        format: Formats = (),
        **kwargs: Any,
    ):
        super().__init__(**arguments(self.float_encoder, args, kwargs))
        finish(self, skip, learn_amax, format)


@MODELS.register_module()
class QuantBEVFusionSparseEncoder(_QuantEncoder, BEVFusionSparseEncoder):
    """``BEVFusionSparseEncoder``, quantized; takes its arguments.

    Args:
        skip: Layers to keep float: name patterns such as ``'encoder_layers.encoder_layer1.*'``,
            or ``{pattern: reason}``. By default the first convolution, whose input has metres,
            intensity and seconds on one scale; a ``skip`` that is given replaces this default.
        learn_amax: Let training learn the ranges of activations.
        format: Number format, ``'int8'`` (the default) or ``'fp8'``, for all or by name pattern.
    """

    float_encoder = BEVFusionSparseEncoder


@MODELS.register_module()
class QuantSparseEncoder(_QuantEncoder, PortableSparseEncoder):
    """mmdet3d's ``SparseEncoder``, quantized; takes its arguments, and those of
    :class:`QuantBEVFusionSparseEncoder`."""

    float_encoder = PortableSparseEncoder
