"""Weights of a whole model on a GPU: their ranges in one launch, their rounding in another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.autograd import Function

from mmdet3d_quant.core import fused
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.copies import copy_all
from mmdet3d_quant.core.fake_quant import masked
from mmdet3d_quant.core.joined import untouched

if fused.AVAILABLE:
    from mmdet3d_quant.core import kernels
    from mmdet3d_quant.core.launch import launch

#: Elements of a row that are computed at a time.
_BLOCK = 1024

#: By quantizer of a weight: a reference to its group, and its index there.
_groups: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def fits(layer: Any) -> bool:
    """Tells whether the weight of a quantized layer can be in a group.

    Its rows, the weights of one output channel, must each lie together in memory.
    """
    weight, quantizer = layer.weight, layer._weight_quantizer
    return (
        fused.AVAILABLE
        and (weight.is_cuda or fused.INTERPRETED)
        and weight.dtype == quantizer._amax.dtype == torch.float32
        and quantizer.spec.axis == 0
        and quantizer.spec.format.fused
        and weight.shape[0] == quantizer._amax.numel()
        and fused.is_dense(weight)
    )


def rounded_together(quantizer: Any, weight: Tensor) -> Tensor | None:
    """Gives a layer its rounded weight, which is computed with all others of its model.

    Under autocast it has the type that the layer computes in, so that it need not be cast.

    Args:
        quantizer: The layer's quantizer of weights.
        weight: What it shall round.

    Returns:
        Tensor of the shape of ``weight``; None if the quantizer has to do it: for another tensor
        than the layer's weight, outside of a group, in another mode, with hooks, while compiling.
    """
    known, index = _groups.get(quantizer, (None, 0))
    group = known and known()
    if group is None or not untouched(quantizer) or quantizer.mode != 'quant':
        return None
    return group.rounded(index, weight, quantizer._amax)


class WeightGroup:
    """Weights that are rounded together, and their ranges; as long as somebody holds it.

    Args:
        layers: Quantized layers that :func:`fits` holds for, on one device and of one format.
        ratios: Range over largest weight of each.
    """

    def __init__(self, layers: Sequence[Any], ratios: Sequence[Tensor]) -> None:
        self._quantizers = [layer._weight_quantizer for layer in layers]
        self._format = self._quantizers[0].spec.format
        device = layers[0].weight.device
        sizes = [q._amax.numel() for q in self._quantizers]
        self._ratios = torch.cat([r.reshape(-1).to(device) for r in ratios])
        self._covering = [bool((ratio >= 1).all()) for ratio in ratios]
        self._largest = torch.empty_like(self._ratios)
        self._ranges = torch.empty_like(self._ratios)
        parts = self._ranges.split(sizes)
        self._parts = [p.view_as(q._amax) for p, q in strict_zip(parts, self._quantizers)]
        self._layers = list(layers)
        self._places: tuple[int, ...] = ()
        self._followed: list[Any] = [None] * len(layers)
        self._seen: list[Any] = [None] * len(layers)
        self._rounded: list[Tensor] = []
        self._type: torch.dtype | None = None
        for index, quantizer in enumerate(self._quantizers):
            _groups[quantizer] = ref(self), index

    def follow(self) -> None:
        """Recomputes all ranges from the weights."""
        self._find()
        count = self._largest.numel()
        launch(kernels.row_ranges, (count,), self._weights, self._lengths, self._largest, _BLOCK)
        torch.mul(self._largest, self._ratios, out=self._ranges)
        copy_all([q._amax for q in self._quantizers], self._parts)
        self._followed = self._versions()

    def rounded(self, index: int, weight: Tensor, amax: Tensor) -> Tensor | None:
        """Gives one of the weights, rounded; see :func:`rounded_together`."""
        if weight is not self._layers[index].weight or weight.is_inference():
            return None
        kind = _type(weight)
        version = weight._version, amax._version
        if kind != self._type or self._seen[index] != version:
            self._round(kind)
        value = self._rounded[index].detach()
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return value
        covers = self._covering[index] and self._followed[index] == version
        return _Rounded.apply(weight, value, None if covers else amax)

    def _round(self, kind: torch.dtype) -> None:
        """Rounds all weights, to a new tensor, as graphs may hold the former one."""
        self._find()
        self._rounded = []  # freed before its successor is made
        flat = torch.empty(self._total, dtype=kind, device=self._largest.device)
        launch(
            kernels.row_rounding, (self._largest.numel(),), self._weights, self._lengths,
            self._amaxes, self._starts, flat,
            self._format.qmin, self._format.qmax, _BLOCK,
        )  # fmt: skip
        start = 0
        for layer in self._layers:
            weight = layer.weight
            self._rounded.append(flat.as_strided(weight.shape, weight.stride(), start))
            start += weight.numel()
        self._seen, self._type = self._versions(), kind

    def _versions(self) -> list[tuple[int, int]]:
        layers = self._layers
        return [(m.weight._version, m._weight_quantizer._amax._version) for m in layers]

    def _find(self) -> None:
        """Notes where rows and ranges lie, if they have moved."""
        weights = [layer.weight for layer in self._layers]
        amaxes = [quantizer._amax for quantizer in self._quantizers]
        places = tuple(t.data_ptr() for t in (*weights, *amaxes))
        if places == self._places:
            return
        counts = [w.shape[0] for w in weights]
        lengths = [w.numel() // w.shape[0] for w in weights]
        rows = [torch.arange(count) for count in counts]
        device = weights[0].device
        ends = torch.tensor([0] + [w.numel() for w in weights]).cumsum(0).tolist()
        self._total = ends[-1]

        def table(values: list[Tensor]) -> Tensor:
            found = torch.cat(values)
            return (found.pin_memory() if device.type == 'cuda' else found).to(
                device, non_blocking=True
            )

        cases = list(strict_zip(weights, amaxes, rows, lengths, ends[:-1]))
        self._weights = table([w.data_ptr() + row * n * 4 for w, _, row, n, _ in cases])
        self._amaxes = table([a.data_ptr() + row * 4 for _, a, row, _, _ in cases])
        self._lengths = table([torch.full_like(row, n) for _, _, row, n, _ in cases])
        self._starts = table([start + row * n for _, _, row, n, start in cases])
        self._places = places


class _Rounded(Function):
    """Hands on a weight that is rounded already, and its gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, value: Tensor, amax: Tensor | None) -> Tensor:
        ctx.kind = weight.dtype
        if amax is not None:
            ctx.save_for_backward(weight, amax)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.to(ctx.kind)
        kept = ctx.saved_tensors
        if kept:
            grad = masked(grad, kept[0], kept[1], rectify=False)
        return grad, None, None


def _type(weight: Tensor) -> torch.dtype:
    """The type in which a layer computes with a weight."""
    if not torch.is_autocast_enabled():
        return weight.dtype
    if hasattr(torch, 'get_autocast_dtype'):
        return torch.get_autocast_dtype('cuda')
    return torch.get_autocast_gpu_dtype()
