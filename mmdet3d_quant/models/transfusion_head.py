"""Quantized TransFusion head: the convolutions over its map, and on request its decoder."""

from __future__ import annotations

from typing import Any

from mmdet3d.registry import MODELS
from torch import nn

from mmdet3d_quant.core.modes import keep_float
from mmdet3d_quant.layers.base import QuantLayer
from mmdet3d_quant.layers.joining import Found, make_joining
from mmdet3d_quant.layers.swap import swap_layers
from mmdet3d_quant.models.base import Formats, Skip, finish

#: What works on queries instead of the map.
QUERIES = ('class_encoding', 'decoder', 'prediction_heads')
WHY_QUERIES = 'it works on queries: little work, which attention decides by small differences'
WHY_LAST = 'its scores rank all cells, at next to no work'


@MODELS.register_module()
def QuantTransFusionHead(  # noqa: N802 - reads as the types beside it
    of: Any = 'TransFusionHead',
    decoder: bool = False,
    scores: bool = False,
    skip: Skip = (),
    learn_amax: bool = False,
    format: Formats = (),
    **kwargs: Any,
) -> nn.Module:
    """Builds a TransFusion head with its convolutions over the map quantized.

    Those are ``shared_conv`` and ``heatmap_head``, but for its last convolution. The head is that
    of this package or that of mmdet3d's BEVFusion project, whichever is registered.

    Args:
        of: Type of the float head.
        decoder: Also quantize the convolutions and linear layers that work on queries, but for the
            projections inside of attention.
        scores: Also quantize the last convolution of ``heatmap_head``.
        skip: Layers to keep float: name patterns such as ``'heatmap_head'``, or
            ``{pattern: reason}``.
        learn_amax: Let training learn the ranges of activations.
        format: Number format, ``'int8'`` (the default) or ``'fp8'``, for all or by name pattern.
        **kwargs: Arguments of the head.

    Returns:
        The head, of a child of its type.

    Raises:
        KeyError: If the type is not registered.
        ValueError: If a pattern of ``skip`` matches nothing.
    """
    head: Any = MODELS.build(dict(kwargs, type=of))
    last = f'heatmap_head.{len(head.heatmap_head) - 1}'
    kept = {} if scores else {last: WHY_LAST}
    for part in (head.shared_conv, *head.heatmap_head[:-1], *([head.heatmap_head[-1]] * scores)):
        swap_layers(part)
    for part in QUERIES if decoder else ():
        for name, reason in swap_layers(getattr(head, part)).items():
            keep_float(head, {f'{part}.{name}' if name else part: reason})
    keep_float(head, kept if decoder else {**kept, **dict.fromkeys(QUERIES, WHY_QUERIES)})
    make_joining(head, Found(_read_together(head), [['shared_conv._input_quantizer']], [[]]))
    finish(head, skip, learn_amax, format)
    vars(head)['takes_skip'] = True  # as errors advise it
    return head


def _read_together(head: Any) -> list[list[str]]:
    """Groups the quantizers that read one tensor: the queries, in each branch's first layer."""
    groups = []
    for i, branches in enumerate(head.prediction_heads):
        firsts = (_first_reader(branch) for branch in branches.children())
        names = list(branches._modules)
        groups.append(
            [f'prediction_heads.{i}.{n}.{at}' for n, at in zip(names, firsts) if at is not None]
        )
    return [group for group in groups if len(group) > 1]


def _first_reader(branch: nn.Module) -> str | None:
    """Name of the quantizer of a branch's first layer, None if it is float."""
    layers = (name for name, m in branch.named_modules() if isinstance(m, QuantLayer))
    return next((f'{name}._input_quantizer' for name in layers), None)
