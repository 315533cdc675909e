"""Any float module, or a whole detector, quantized by config without a class of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mmdet3d.registry import MODELS
from mmengine.registry import MODELS as ROOT
from torch import nn

from mmdet3d_quant.core.macs import weighted
from mmdet3d_quant.core.modes import keep_float, quantizers
from mmdet3d_quant.core.naming import type_name
from mmdet3d_quant.core.spec import select
from mmdet3d_quant.models.base import Formats, Skip, finish
from mmdet3d_quant.models.convert import WHOLE, quantize, quantize_parts
from mmdet3d_quant.models.example import examples, given_example

#: Types of parts that random maps do not show, or whose quantized type knows more of them.
NAMED = (
    'BEVFusionSparseEncoder', 'ConvFuser', 'DepthLSSTransform', 'GeneralizedLSSFPN', 'LSSTransform',
    'SparseEncoder', 'TransFusionHead',
)  # fmt: skip


@ROOT.register_module()
def Quant(  # noqa: N802 - reads as the types beside it
    of: Any,
    skip: Skip = (),
    learn_amax: bool = False,
    only: str | Iterable[str] = (),
    joins: bool | str = True,
    example: Any = None,
    format: Formats = (),
    **kwargs: Any,
) -> nn.Module:
    """Builds a float module and quantizes it, whatever its type.

    Its convolutions and linear layers become quantized ones. It is run once, on random values, to
    see where tensors meet: adds and concats get quantizers, and what reads one tensor is tied, as
    in the types that are written for it. In float mode it equals the module without; keys of
    checkpoints are the same but for the ranges. Of a detector every part is treated so; parts that
    are quantized types stay what they are, and sparse encoders and parts of BEVFusion become such.

    A layer of another type stays float with a reason, which calibration tells: a deformable
    convolution, one that pads or computes its weight by itself, one that the forward never calls.
    So does a part of a detector that cannot be run by itself.

    Args:
        of: Type of the module, as ``type`` would be: ``'mmdet.RegNet'``.
        skip: Layers to keep float: name patterns, or ``{pattern: reason}``, relative to the module.
            Quantizers of adds and concats are ``quant_joins`` of the module with the add.
        learn_amax: Let training learn the ranges of activations.
        format: Number format, ``'int8'`` (the default) or ``'fp8'``, for all or by name pattern.
        only: Name patterns of what to quantize; all that can be, by default. One that names a
            layer that cannot be is an error.
        joins: Whether adds and concats get quantizers; ``'all'``: adds to a stream that is float
            for another reader, too.
        example: Shapes of the arguments that the module is run on, ``[(1, 3, 64, 64)]``, a list in
            it for a list of maps; by default what ``in_channels`` or the first layer suggest. Of a
            detector a dict of them by part.
        **kwargs: Arguments of the module.

    Returns:
        The module, of a child of its type.

    Raises:
        KeyError: If the type is unknown.
        ValueError: If nothing in it can be quantized, it cannot be run on the example, a pattern
            matches nothing, or ``only`` names what stays float.
    """
    if joins not in (True, False, 'all'):
        raise ValueError(f"joins must be True, False or 'all', got {joins!r}")
    model = MODELS.build(dict({name: _named(part) for name, part in kwargs.items()}, type=of))
    if hasattr(model, 'data_preprocessor'):
        made = quantize_parts(model, joins, example)
    else:
        likely = examples(model, kwargs.get('in_channels'))
        made = quantize(model, joins, likely if example is None else [given_example(example)])
    _keep_others_float(model, made.left, [only] if isinstance(only, str) else list(only))
    finish(model, skip, learn_amax, format)
    vars(model)['takes_skip'] = True  # as errors advise it
    if learn_amax:
        for module in model.modules():
            if hasattr(module, '_freeze_stages'):
                module._freeze_stages()  # new parameters, too: DDP looks before training begins
    return model


def _named(part: Any) -> Any:
    """The config of a part with the type that is written for it, where one is needed."""
    own = type_name(part.get('type')) if isinstance(part, Mapping) else ''
    if own not in NAMED:
        return part
    return type(part)({**WHOLE.get(own, {}), **part, 'type': f'Quant{own}'})


def _keep_others_float(model: nn.Module, left: Mapping[str, str], only: list[str]) -> None:
    """Keeps float what ``only`` does not name."""
    names = [*quantizers(model), *weighted(model)]
    named: set[str] = set()
    for pattern in only:
        found = select(names, pattern)
        if not found:
            some = ', '.join(weighted(model))
            raise ValueError(
                f'only={pattern!r} matches no layer of {type(model).__name__}; it has: {some}'
            )
        for name in found:
            if name in left:
                raise ValueError(
                    f'{name} of {type(model).__name__}, which only={pattern!r} names, cannot be '
                    f'quantized: {left[name]}'
                )
        named.update(found)
    for name, quantizer in quantizers(model).items():
        if only and name not in named and quantizer.float_reason is None:
            keep_float(model, {name: f'only={only}'})
