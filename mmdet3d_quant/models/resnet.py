"""Quantized ResNet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmdet.models.backbones.resnet import BasicBlock, Bottleneck, ResNet
from mmdet.models.layers import ResLayer
from mmdet3d.registry import MODELS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmdet3d_quant.core.fake_quant import compiling
from mmdet3d_quant.core.joined import (
    joins_norms,
    normed,
    read_again,
    rectified,
    rounded_once,
    untouched,
)
from mmdet3d_quant.core.quantizer import Quantizer
from mmdet3d_quant.layers.base import input_quantizer, readers_of
from mmdet3d_quant.models.base import Formats, Skip, arguments, finish, quant_conv_cfg

# Mixed into blocks of mmdet, which give these.
if TYPE_CHECKING:

    class _Block(nn.Module):
        conv1: nn.Module
        downsample: Any
        relu: nn.Module
        with_cp: bool

        def _main_branch(self, x: Tensor) -> tuple[Tensor, nn.Module | None]: ...
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

    def rounded_for(self) -> list[Any]:
        """Lists the quantizers that the input may be rounded for by who makes it."""
        # A checkpoint takes tensors, which compiled code does not make of what is rounded.
        if self.with_cp and compiling():
            return []
        branch = self.downsample
        plain = branch is None or (type(branch) is nn.Sequential and untouched(branch))
        return readers_of(*self.readers()) if plain else []

    def forward(self, x: Any, readers: Sequence[nn.Module] = (), compiled: bool = False) -> Any:
        """Computes the output of the block for an (N, C, H, W) input.

        Args:
            x: Output of the block before.
            readers: The quantizers that read the output, so that the block may round it for all of
                them; to be given only if nothing else reads the output.
            compiled: Whether the caller is compiled, too, and takes what compiled code has rounded.
        """
        if compiling() and not compiled:
            readers = ()
        if self.with_cp and x.requires_grad:
            out = checkpoint(self._sum, x, use_reentrant=False)
            return rectified(out, self.relu, readers)
        return self._sum(x, self.relu, readers)

    def _sum(self, x: Any, relu: nn.Module | None = None, readers: Sequence[nn.Module] = ()) -> Any:
        x = rounded_once(x, readers_of(*self.readers()))
        out, norm = self._main_branch(x)
        identity = self.residual_quantizer(self._identity(x))
        return normed(out, norm, relu, readers, read_again(identity))

    def _identity(self, x: Any) -> Any:
        """Computes the identity branch; rounded, where that is one pass with its norm."""
        branch = self.downsample
        if branch is None:
            return x
        if type(branch) is not nn.Sequential or not (joins_norms(x) and untouched(branch)):
            return branch(x)
        *first, norm = branch
        for module in first:
            x = module(x)
        return normed(x, norm, None, readers_of(self.residual_quantizer))

    def _activated(self, x: Tensor, norm: nn.Module | None, conv: nn.Module) -> Any:
        """Rectifies ``norm(x)`` and, where possible, quantizes it for the one who reads it."""
        return normed(x, norm, self.relu, readers_of(conv))


@MODELS.register_module()
class QuantBasicBlock(_QuantBlock, BasicBlock):
    """mmdet's ``BasicBlock``, quantized; takes its arguments."""

    float_block = BasicBlock

    def _main_branch(self, x: Tensor) -> tuple[Tensor, nn.Module | None]:
        out = self._activated(self.conv1(x), self.norm1, self.conv2)
        return self.conv2(out), self.norm2


@MODELS.register_module()
class QuantBottleneck(_QuantBlock, Bottleneck):
    """mmdet's ``Bottleneck``, quantized; takes its arguments, ``dcn`` excepted."""

    float_block = Bottleneck

    def _main_branch(self, x: Tensor) -> tuple[Tensor, nn.Module | None]:
        out = self._between(self.conv1(x), self.norm1, 1, self.conv2)
        out = self.conv3(self._between(self.conv2(out), self.norm2, 2, self.conv3))
        if not self.with_plugins:
            return out, self.norm3
        return self.forward_plugin(self.norm3(out), self.after_conv3_plugin_names), None

    def _between(self, x: Tensor, norm: nn.Module, index: int, conv: nn.Module) -> Tensor:
        if not self.with_plugins:
            return self._activated(x, norm, conv)
        x, names = norm(x), getattr(self, f'after_conv{index}_plugin_names')
        if names:
            return self.forward_plugin(self.relu(x), names)
        return self._activated(x, None, conv)


QUANT_BLOCKS = {BasicBlock: QuantBasicBlock, Bottleneck: QuantBottleneck}


class QuantResLayer(ResLayer):
    """A stage. In training each block rounds its output for the next one, where it can.

    Attributes:
        following: The next stage, if it alone reads the output of this one.
    """

    following: tuple[Any, ...] = ()  # not a module of this one

    def forward(self, x: Tensor) -> Tensor:
        """Computes the output of the last block for an (N, C, H, W) input."""
        blocks = list(self)
        count = len(blocks)
        # What compiled code has rounded stays in the stage, which may be compiled alone.
        joins = untouched(self) and not compiling()
        if joins and all(untouched(stage) for stage in self.following):
            blocks += [stage[0] for stage in self.following]
        for i, block in enumerate(blocks[:count]):
            pair = blocks[i : i + 2]
            if len(pair) == 2 and all(isinstance(b, _QuantBlock) and untouched(b) for b in pair):
                x = block(x, pair[1].rounded_for(), compiling())
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
        format: Number format, ``'int8'`` (the default) or ``'fp8'``, for all or by name pattern.

    Raises:
        ValueError: If ``dcn`` is given, the convolution type has no quantized counterpart, or a
            ``skip`` pattern matches nothing.
    """

    def __init__(
        self,
        *args: Any,
        skip: Skip = (),
        learn_amax: bool = False,
        format: Formats = (),
        **kwargs: Any,
    ):
        bound = arguments(ResNet, args, kwargs)
        bound['conv_cfg'] = quant_conv_cfg(bound.get('conv_cfg'))
        if bound.get('dcn') is not None:
            raise ValueError('deformable convolutions cannot be quantized: leave dcn=None')
        super().__init__(**bound)
        finish(self, skip, learn_amax, format)
        stages = [getattr(self, name) for name in self.res_layers]
        for i, stage in enumerate(stages):
            stage.following = () if i in self.out_indices else tuple(stages[i + 1 : i + 2])
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
