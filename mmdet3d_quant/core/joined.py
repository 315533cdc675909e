"""Rounding joined with its neighbours, so that no tensor is rounded or masked needlessly.

Rounding costs passes over memory. Three kinds are saved here, with the same values and gradients:

* A tensor that several quantizers read is rounded once (:func:`rounded_once`).
* A ReLU and the rounding behind it are one pass in training (:func:`rectified`).
* A tensor that lies inside its range needs no mask in the backward pass (:func:`cover`).

:func:`quantize`, which every quantizer calls, and :func:`mark` keep two records about tensors:

* A mark says that the tensor is already quantized with this range, so that quantizing it again is
  skipped. The range is meant by value (:func:`grid_of`): quantizers with an equal one skip, too,
  and one whose range has changed since does not.
* A cover says that no value of the tensor is beyond this range, so that its gradient is not masked.
  Here the range is meant as the tensor that it is.

The rules of both:

* A record belongs to this tensor object: views, copies and results do not inherit it, and it is
  freed with the tensor. A layer whose result is still on the grid, as a concat's is, marks it.
* An in-place change of the tensor voids it. A cover is also voided by a change of the range.
* Not detected, because they do not change a tensor's version: writes through ``.data`` and
  torch.distributed collectives.
* Never recorded: inference tensors, which have no version; anything while compiling; marks while
  tracing, which shall show every quantizer.

Only untouched modules are joined (:func:`untouched`): hooks see the same tensors in
training and evaluation, and those of a quantizer see the unrounded tensor, once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, Tuple

import torch
from torch import Tensor, nn

from mmdet3d_quant.core import batch_norm, fused, opaque
from mmdet3d_quant.core.fake_quant import compiling, fake_quantize
from mmdet3d_quant.core.records import Records
from mmdet3d_quant.core.spec import QuantSpec

#: What :func:`grid_of` gives: compared, not looked into.
Grid = Tuple[QuantSpec, Any]


class Rounded(NamedTuple):
    """How compiled code, which keeps no records, hands on what is rounded for all that read it.

    Attributes:
        value: The tensor. Quantizers take it out.
    """

    value: Tensor


#: By tensor: the grid it is on.
_marks = Records()
#: By tensor: the range that covers it with the version of that.
_covers = Records()
#: By range on a GPU: its place when it was read, and its value.
_values = Records()
#: By learned range on a GPU: all that move together, and a number for the moment.
_ties = Records()
_moments = itertools.count()


def quantize(
    x: Tensor, amax: Tensor, spec: QuantSpec, rectify: bool = False, inplace: bool = False
) -> Tensor:
    """Fake-quantizes ``x``, leaving out what the records about it make needless.

    Args:
        x: Floating tensor of any shape.
        amax: Range limit(s), as in :func:`~mmdet3d_quant.core.fake_quant.fake_quantize`.
        spec: Bits and axis.
        rectify: Quantize ``relu(x)`` instead, in the same passes.
        inplace: Allows the result to take the place of ``x``.

    Returns:
        Tensor of the shape and dtype of ``x``: ``x`` itself if it is marked with this range.
    """
    if compiling():
        return fake_quantize(x, amax, spec, rectify)
    if not rectify and _covered(x, amax):
        return fake_quantize(x, amax, spec, inside=True)
    grid = grid_of(amax, spec)
    if not rectify and grid is not None and _marks.get(x) == grid:
        return x
    value = None if grid is None or isinstance(amax, nn.Parameter) else grid[1]
    y = fake_quantize(x, amax, spec, rectify, value, inplace=inplace)
    _marks.note(y, grid)
    return y


def mark(x: Tensor, quantizer: nn.Module) -> None:
    """Records that ``x`` is already quantized with a quantizer's range; see the rules above."""
    _marks.note(x, getattr(quantizer, 'grid', None))


def cover(x: Tensor, amax: Tensor) -> None:
    """Records that no ``|x|`` is beyond ``amax``, of which the caller has made sure."""
    _covers.note(x, (amax, amax._version))


def grid_of(amax: Tensor, spec: QuantSpec) -> Grid | None:
    """Makes the key that is equal for two quantizers iff one may stand in for the other.

    Reading a fixed range on a GPU waits for it: that is done once for every change.

    Args:
        amax: Range limit(s).
        spec: Bits and axis.

    Returns:
        The key. A learned range is equal to itself only, as it wants a gradient of its own; on a
        GPU also to those that it is tied to (:func:`tie`). None (never shared) for several
        ranges, a range made in inference mode, and while tracing or compiling.
    """
    if compiling() or torch.jit.is_tracing() or amax.numel() > 1 or amax.is_inference():
        return None
    if isinstance(amax, nn.Parameter):
        tied = _ties.get(amax)
        return spec, (id(amax), amax._version) if tied is None else tied
    if amax.is_cpu:
        return spec, amax.item()
    place, value = _values.get(amax) or (None, None)
    if place != amax.data_ptr():
        value = amax.item()
        _values.note(amax, (amax.data_ptr(), value))
    return spec, value


def tie(amaxes: Sequence[Tensor]) -> None:
    """Records that learned ranges are equal and that whoever trains them adds up their gradients.

    On a GPU one of them then stands in for the others, until a change. Not in one of several
    processes, where DistributedDataParallel waits for a gradient of each.

    Args:
        amaxes: The ranges of a tie group.
    """
    on_gpu = amaxes[0].is_cuda or fused.INTERPRETED
    if len(amaxes) < 2 or not on_gpu or not all(amax.requires_grad for amax in amaxes):
        return
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return
    moment = 'tied', next(_moments)
    for amax in amaxes:
        _ties.note(amax, moment)


def rounded_once(x: Tensor, readers: Sequence[Any]) -> Tensor:
    """Quantizes ``x`` for all its readers, if they have one grid; each then lets it pass.

    Args:
        x: What the readers are about to read.
        readers: Quantizers; with less than two there is nothing to share.

    Returns:
        Tensor like ``x``: quantized if that serves all, else ``x``, for each to quantize.
    """
    return readers[0].forward(x) if len(readers) > 1 and _alike(readers) else x


def rectified(x: Tensor, relu: nn.Module, readers: Sequence[Any]) -> Tensor:
    """Computes ``relu(x)`` and, in training, quantizes it for all its readers in the same pass.

    Args:
        x: Input of the activation.
        relu: The activation; called where the two cannot be joined.
        readers: All that read its output. Only if they are quantizers of one grid are the two
            joined.

    Returns:
        Tensor like ``x``: ``relu(x)``, quantized if that serves all.
    """
    if torch.is_grad_enabled() and type(relu) is nn.ReLU and untouched(relu) and _alike(readers):
        return quantize(x, readers[0]._amax, readers[0].spec, True, relu.inplace)
    return relu(x)


def joins_norms(x: Any) -> bool:
    """Tells whether a norm may be joined with the rounding behind it: on a GPU, in training."""
    tensor = x.value if isinstance(x, Rounded) else x
    return (tensor.is_cuda or fused.INTERPRETED) and torch.is_grad_enabled()


def normed(
    x: Tensor,
    norm: nn.Module | None,
    relu: nn.Module | None,
    readers: Sequence[Any],
    other: Tensor | None = None,
) -> Any:
    """Computes ``relu(norm(x) + other)``, on a GPU in training in one pass with the rounding.

    Args:
        x: What the norm reads.
        norm: The norm, if there is one.
        relu: The activation, if there is one.
        readers: As in :func:`rectified`.
        other: What is added, of the shape of ``x``, if anything is.

    Returns:
        Tensor like ``x``, quantized if that serves all readers; while compiling then as `Rounded`.
    """
    if (
        norm is not None
        and joins_norms(x)
        and untouched(norm)
        and (relu is None or (type(relu) is nn.ReLU and untouched(relu)))
    ):
        if compiling():
            found = _one(readers)
            if found is not None:
                amax, fmt = found._amax, found.spec.format
                if opaque.joins(x, norm, amax, fmt, other):
                    return Rounded(opaque.normed(x, norm, amax, fmt, relu is not None, other))
        grid = _alike(readers)
        if grid is not None:
            amax, spec = readers[0]._amax, readers[0].spec
            if batch_norm.serves(x, norm, amax, spec, other):
                y = batch_norm.rounded(x, norm, amax, spec, relu is not None, other)
                _marks.note(y, grid)
                return y
    y = x if norm is None else norm(x)
    y = y if other is None else y + other
    return y if relu is None else rectified(y, relu, readers)


def read_again(x: Tensor) -> Tensor:
    """Gives compiled code another view of a tensor that a convolution has read before.

    torch's partitioner keeps for the backward pass what is made of a tensor after a convolution
    has read it, here the mask of a sum. What is made of a view it computes anew.

    Args:
        x: Tensor of any shape.

    Returns:
        Tensor like ``x``; ``x`` itself unless compiling.
    """
    return x.unsqueeze(0).squeeze(0) if compiling() else x


def untouched(module: nn.Module) -> bool:
    """Tells whether a module has no hooks and its own forward, so that it may be joined.

    A reentrant checkpoint puts in another forward, and computes anew from copies of its inputs,
    which are not marked.

    Returns:
        False also while compiling with a torch before 2.4, where nothing is joined.
    """
    if (not opaque.AVAILABLE and compiling()) or 'forward' in module.__dict__:
        return False
    backward = module._backward_hooks or getattr(module, '_backward_pre_hooks', None)
    return not (module._forward_hooks or module._forward_pre_hooks or backward)


def _alike(readers: Sequence[Any]) -> Grid | None:
    """Finds the one grid of the readers, if they are untouched quantizers and have one."""
    first = None
    for reader in readers:
        grid = getattr(reader, 'grid', None) if untouched(reader) else None
        if grid is None or (first is not None and grid != first):
            return None
        first = grid
    return first


def _one(readers: Sequence[Any]) -> Any:
    """Finds the quantizer whose range stands for all readers while compiling, if one does."""
    found = None
    for reader in readers:
        if not (untouched(reader) and reader.mode == 'quant' and reader.calibrated):
            return None
        shared = reader.equals[0] if reader.equals else reader
        if found is not None and shared is not found:
            return None
        found = shared
    return found


def _covered(x: Tensor, amax: Tensor) -> bool:
    cover, version = _covers.get(x) or (None, None)
    return cover is amax and version == amax._version
