"""Quantized ResNet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmdet.models.backbones.resnet import BasicBlock, Bottleneck, ResNet
from mmdet.models.layers import ResLayer
from mmdet3d.registry import MODELS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmdet3d_quant.core.joined import rectified, rounded_once, untouched
from mmdet3d_quant.core.quantizer import Quantizer
from mmdet3d_quant.layers.base import input_quantizer, readers_of
from mmdet3d_quant.models.base import Skip, arguments, finish, quant_conv_cfg

# Mixed into blocks of mmdet, which give these.
if TYPE_CHECKING:

    class _Block(nn.Module):
        conv1: nn.Module
        downsample: Any
        relu: nn.Module
        with_cp: bool

        def _main_branch(self, x: Tensor) -> Tensor: ...
else:
    _Block = object


class _QuantBlock(_Block):
    """A ResNet block whose identity branch is quantized before the add.

    Attributes:
        residual_quantizer: Quantizer of the identity branch. Without downsample it shares conv1's
            input scale (both read the input of the block). With downsample it has its own scale,
            and the downsample convolution's input shares conv1's.
    """

    float_block: type[nn.Module]

    def __init__(self, *args: Any, **kwargs: Any):
        bound = arguments(self.float_block, args, kwargs)
        if bound.get('dcn') is not None:
            raise ValueError('deformable convolutions cannot be quantized: leave dcn=None')
        bound['conv_cfg'] = quant_conv_cfg(bound.get('conv_cfg'))
        super().__init__(**bound)
        self.residual_quantizer = Quantizer(label=f'residual of {type(self).__name__}')

    def quant_ties(self) -> list[list[str]]:
        """Ties all quantizers that read the input of the block."""
        names = {module: name for name, module in self.named_modules()}
        return [[names[q] for module in self.readers() for q in input_quantizer(module)]]

    def readers(self) -> list[nn.Module]:
        """Lists the two modules that read the input of the block; one may be an average pool."""
        identity = self.residual_quantizer if self.downsample is None else self.downsample[0]
        return [self.conv1, identity]

    def forward(self, x: Tensor, readers: Sequence[nn.Module] = ()) -> Tensor:
        """Computes the output of the block for an (N, C, H, W) input.

        Args:
            x: Output of the block before.
            readers: The quantizers that read the output, so that the block may round it for all of
                them; to be given only if nothing else reads the output.
        """
        if self.with_cp and x.requires_grad:
            out = checkpoint(self._sum, x, use_reentrant=False)
        else:
            out = self._sum(x)
        return rectified(out, self.relu, readers)

    def _sum(self, x: Tensor) -> Tensor:
        x = rounded_once(x, readers_of(*self.readers()))
        out = self._main_branch(x)
        identity = x if self.downsample is None else self.downsample(x)
        return out + self.residual_quantizer(identity)

    def _activated(self, x: Tensor, conv: nn.Module) -> Tensor:
        """Rectifies ``x`` and, where possible, quantizes it for the convolution that reads it."""
        return rectified(x, self.relu, readers_of(conv))


@MODELS.register_module()
class QuantBasicBlock(_QuantBlock, BasicBlock):
    """mmdet's ``BasicBlock``, quantized; takes its arguments."""

    float_block = BasicBlock

    def _main_branch(self, x: Tensor) -> Tensor:
        out = self._activated(self.norm1(self.conv1(x)), self.conv2)
        return self.norm2(self.conv2(out))


@MODELS.register_module()
class QuantBottleneck(_QuantBlock, Bottleneck):
    """mmdet's ``Bottleneck``, quantized; takes its arguments, ``dcn`` excepted."""

    float_block = Bottleneck

    def _main_branch(self, x: Tensor) -> Tensor:
        out = self._between(self.norm1(self.conv1(x)), 1, self.conv2)
        out = self._between(self.norm2(self.conv2(out)), 2, self.conv3)
        return self._plugins(self.norm3(self.conv3(out)), 3)

    def _between(self, x: Tensor, index: int, conv: nn.Module) -> Tensor:
        if self.with_plugins and getattr(self, f'after_conv{index}_plugin_names'):
            return self._plugins(self.relu(x), index)
        return self._activated(x, conv)

    def _plugins(self, x: Tensor, index: int) -> Tensor:
        if not self.with_plugins:
            return x
        return self.forward_plugin(x, getattr(self, f'after_conv{index}_plugin_names'))


QUANT_BLOCKS = {BasicBlock: QuantBasicBlock, Bottleneck: QuantBottleneck}


class QuantResLayer(ResLayer):
    """A stage. In training each block rounds its output for the next one, where it can."""

    def forward(self, x: Tensor) -> Tensor:
        """Computes the output of the last block for an (N, C, H, W) input."""
        blocks = list(self)
        for i, block in enumerate(blocks):
            pair = blocks[i : i + 2]
            if len(pair) == 2 and all(isinstance(b, _QuantBlock) and untouched(b) for b in pair):
                x = block(x, readers_of(*pair[1].readers()))
            else:
                x = block(x)
        return x


@MODELS.register_module()
class QuantResNet(ResNet):
    """mmdet's ``ResNet``, quantized; takes its arguments, ``dcn`` excepted.

    Args:
        skip: Layers to keep float: name patterns such as ``'conv1'`` or ``'layer1.0.*'``, or
            ``{pattern: reason}``.
        learn_amax: Let training learn the ranges of activations.

    Raises:
        ValueError: If ``dcn`` is given, the convolution type has no quantized counterpart, or a
            ``skip`` pattern matches nothing.
    """

    def __init__(self, *args: Any, skip: Skip = (), learn_amax: bool = False, **kwargs: Any):
        bound = arguments(ResNet, args, kwargs)
        bound['conv_cfg'] = quant_conv_cfg(bound.get('conv_cfg'))
        if bound.get('dcn') is not None:
            raise ValueError('deformable convolutions cannot be quantized: leave dcn=None')
        super().__init__(**bound)
        finish(self, skip, learn_amax)
        self._freeze_stages()  # new parameters, too: DDP looks before training begins

    def make_res_layer(self, **kwargs: Any) -> nn.Module:
        """Builds a stage of quantized blocks."""
        # Swapped here and not in `arch_settings`: ResNet compares the block with its own
        # classes to decide on zero-initialised residuals.
        return QuantResLayer(**{**kwargs, 'block': QUANT_BLOCKS[kwargs['block']]})

    def output_readers(self) -> list[list[str]]:
        """Lists the quantizers of the next stage's first block, which reads the output, too."""
        last = len(self.res_layers) - 1
        return [
            [f'{self.res_layers[i + 1]}.0.conv1._input_quantizer'] if i < last else []
            for i in sorted(self.out_indices)
        ]
