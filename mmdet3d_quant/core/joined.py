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

Only untouched modules are joined (:func:`untouched`): forward hooks see the same tensors in
training and evaluation, and those of a quantizer see the unrounded tensor, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Tuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from mmdet3d_quant.core.fake_quant import compiling, fake_quantize
from mmdet3d_quant.core.spec import QuantSpec

#: What :func:`grid_of` gives: compared, not looked into.
Grid = Tuple[QuantSpec, Any]

#: By tensor: its version, and the grid it is on.
_marks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
#: By tensor: its version, and the range that covers it with the version of that.
_covers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
#: By range on a GPU: its place and version when it was read, and its value.
_values: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def quantize(x: Tensor, amax: Tensor, spec: QuantSpec, rectify: bool = False) -> Tensor:
    """Fake-quantizes ``x``, leaving out what the records about it make needless.

    Args:
        x: Floating tensor of any shape.
        amax: Range limit(s), as in :func:`~mmdet3d_quant.core.fake_quant.fake_quantize`.
        spec: Bits and axis.
        rectify: Quantize ``relu(x)`` instead, in the same passes.

    Returns:
        Tensor of the shape and dtype of ``x``: ``x`` itself if it is marked with this range.
    """
    if compiling():
        return fake_quantize(x, amax, spec, rectify)
    if not rectify and _covered(x, amax):
        return fake_quantize(x, amax, spec, inside=True)
    grid = grid_of(amax, spec)
    if not rectify and grid is not None and _record(_marks, x) == grid:
        return x
    value = None if grid is None or isinstance(amax, nn.Parameter) else grid[1]
    y = fake_quantize(x, amax, spec, rectify, value)
    _note(_marks, y, grid)
    return y


def mark(x: Tensor, quantizer: nn.Module) -> None:
    """Records that ``x`` is already quantized with a quantizer's range; see the rules above."""
    _note(_marks, x, getattr(quantizer, 'grid', None))


def cover(x: Tensor, amax: Tensor) -> None:
    """Records that no ``|x|`` is beyond ``amax``, of which the caller has made sure."""
    _note(_covers, x, (amax, amax._version))


def grid_of(amax: Tensor, spec: QuantSpec) -> Grid | None:
    """Makes the key that is equal for two quantizers iff one may stand in for the other.

    Reading a fixed range on a GPU waits for it: that is done once for every change.

    Args:
        amax: Range limit(s).
        spec: Bits and axis.

    Returns:
        The key. A learned range is equal to itself only, as it wants a gradient of its own. None
        (never shared) for several ranges, a range made in inference mode, and while tracing or
        compiling.
    """
    if compiling() or torch.jit.is_tracing() or amax.numel() > 1 or amax.is_inference():
        return None
    if isinstance(amax, nn.Parameter):
        return spec, (id(amax), amax._version)
    if amax.is_cpu:
        return spec, amax.item()
    place, value = _record(_values, amax) or (None, None)
    if place != amax.data_ptr():
        value = amax.item()
        _note(_values, amax, (amax.data_ptr(), value))
    return spec, value


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
        return quantize(x, readers[0]._amax, readers[0].spec, rectify=True)
    return relu(x)


def untouched(module: nn.Module) -> bool:
    """Tells whether a module has no forward hooks and its own forward, so that it may be joined.

    A reentrant checkpoint puts in another forward, and computes anew from copies of its inputs,
    which are not marked.

    Returns:
        False also while compiling, where nothing is joined.
    """
    if compiling() or 'forward' in module.__dict__:
        return False
    return not (module._forward_hooks or module._forward_pre_hooks)


def _alike(readers: Sequence[Any]) -> bool:
    """Tells whether the readers are untouched quantizers of one grid."""
    grids = [getattr(reader, 'grid', None) for reader in readers if untouched(reader)]
    if len(grids) < len(readers) or not grids or grids[0] is None:
        return False
    return all(grid == grids[0] for grid in grids[1:])


def _covered(x: Tensor, amax: Tensor) -> bool:
    cover, version = _record(_covers, x) or (None, None)
    return cover is amax and version == amax._version


def _note(records: WeakTensorKeyDictionary, x: Tensor, record: Any) -> None:
    if record is not None and not x.is_inference():
        records[x] = x._version, record


def _record(records: WeakTensorKeyDictionary, x: Tensor) -> Any:
    """Looks up the record about a tensor; None if there is none or the tensor has changed since."""
    if x.is_inference():
        return None
    version, record = records.get(x, (None, None))
    return record if version == x._version else None
