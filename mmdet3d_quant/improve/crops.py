"""Crops of the tensors that blocks read, kept while a model runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmdet3d_quant.calibration.observe import Forward
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.copies import deep_copy
from mmdet3d_quant.core.modes import evaluating, set_mode
from mmdet3d_quant.improve.blocks import Block

#: Side of a crop of a map; of what a linear layer reads, rows are kept, so many squared.
SIDE = 16
#: One crop in so many is not learned from, but judges what was learned.
JUDGED = 4
#: Most crops of a block, and most bytes of them.
MOST, MOST_BYTES = 256, 2**24


class _Reached(Exception):
    """Ends a forward behind the last block that is looked at."""


def collect(
    model: nn.Module,
    blocks: Sequence[Block],
    batches: Sequence[Any],
    forward: Forward,
    mode: str,
    seed: int,
) -> dict[str, list[Tensor]]:
    """Collects crops of what blocks read; they lie at the same places whatever the mode.

    A forward ends when all blocks were called.

    Args:
        model: Calibrated.
        blocks: Of this model or of one that it is a copy of.
        batches: What ``forward`` takes; copies are run.
        forward: Runs the model.
        mode: Mode of the quantizers meanwhile.
        seed: Of the places.

    Returns:
        By name of a block its crops: (1, channels, ...) each, or rows (n, channels) of a linear
        layer.
    """
    kept: dict[str, list[Tensor]] = {block.name: [] for block in blocks}
    share = {b.name: max(1, MOST // (len(batches) * b.calls)) for b in blocks}
    room = MOST_BYTES // len(batches)
    for number, batch in enumerate(batches):
        with set_mode(model, mode), evaluating(model), torch.no_grad():
            with _keeping(model, blocks, kept, share, room, (seed, number)):
                try:
                    forward(model, deep_copy(batch))
                except _Reached:
                    pass
    return kept


@contextmanager
def _keeping(
    model: nn.Module,
    blocks: Sequence[Block],
    kept: dict[str, list[Tensor]],
    share: dict[str, int],
    room: int,
    seed: tuple[int, int],
) -> Iterator[None]:
    left = sum(block.calls for block in blocks)

    def hook_of(block: Block) -> Any:
        calls = 0

        def hook(module: nn.Module, args: Any) -> None:
            nonlocal left, calls
            rng = torch.Generator().manual_seed(hash((*seed, calls)) % 2**31)
            calls += 1
            crops = _crops(args[0].detach(), isinstance(module, nn.Linear), share[block.name], rng)
            size = sum(c.numel() * c.element_size() for c in crops) / max(1, len(crops))
            most = int(max(1, room / block.calls // max(size, 1)))
            kept[block.name] += [c.clone() for c in crops[:most]]

        return hook

    def ended(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise _Reached

    handles = []
    for block in blocks:
        first = model.get_submodule(block.name)
        handles.append(first.register_forward_pre_hook(hook_of(block)))
        handles.append(first.register_forward_hook(ended))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _crops(x: Tensor, linear: bool, count: int, rng: torch.Generator) -> list[Tensor]:
    """Cuts views out of a tensor, at places that its shape and the generator decide."""
    if linear:
        rows = x.reshape(-1, x.shape[-1])
        picked = torch.randperm(len(rows), generator=rng)[: count * SIDE**2].to(rows.device)
        return list(rows[picked].split(SIDE**2))
    crops = []
    for _ in range(count):
        at = int(torch.randint(len(x), (1,), generator=rng))
        crop = x[at : at + 1]
        for axis in range(2, x.dim()):
            size = min(SIDE, x.shape[axis])
            start = int(torch.randint(x.shape[axis] - size + 1, (1,), generator=rng))
            crop = crop.narrow(axis, start, size)
        crops.append(crop)
    return crops


def stacked(crops: Iterable[Tensor]) -> list[Tensor]:
    """Joins crops of one shape along the first axis; the order of shapes is that of the first."""
    by_shape: dict[Any, list[Tensor]] = {}
    for crop in crops:
        by_shape.setdefault(crop.shape, []).append(crop)
    return [torch.cat(group) for group in by_shape.values()]


class Samples:
    """Inputs of a block, quantized and float, and the outputs of the float one; a part is judged.

    Attributes:
        scale: Mean squared error of the outputs that one step is judged against.
    """

    def __init__(self, found: list[Tensor], wanted: list[Tensor], exact: nn.Module) -> None:
        self._sets: list[list[tuple[Tensor, Tensor, Tensor]]] = []
        for learned in (True, False):
            at = [i for i in range(len(found)) if learned == bool(i % JUDGED) or len(found) == 1]
            pairs = [stacked(side[i] for i in at) for side in (found, wanted)]
            with torch.no_grad():
                self._sets.append([(x, z, exact(z)) for x, z in strict_zip(*pairs)])
        self.scale = 1.0

    def error(self, chain: nn.Module) -> float:
        """Measures the squared error on the judged part over the square of the float output."""
        wrong = power = 0.0
        count = 0
        with torch.no_grad():
            for x, _, y in self._sets[1]:
                wrong += float((chain(x) - y).double().square().sum())
                power += float(y.double().square().sum())
                count += y.numel()
        self.scale = max(wrong / max(count, 1), 1e-30)
        return wrong / max(power, 1e-30)

    def learned(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields all that is learned from: so many inputs, quantized and float, at a time."""
        for x, z, _ in self._sets[0]:
            size = count * (SIDE**2 if x.dim() == 2 else 1)
            yield from strict_zip(x.split(size), z.split(size))

    def pick(self, count: int, float_share: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Picks inputs, of which a share of the elements is the float model's, and the outputs."""
        groups = self._sets[0]
        sizes = torch.tensor([float(len(x)) for x, _, _ in groups])
        x, z, y = groups[int(torch.multinomial(sizes, 1, generator=rng))]
        count *= SIDE**2 if x.dim() == 2 else 1  # rows of a linear layer
        at = torch.randint(len(x), (min(count, len(x)),), generator=rng).to(x.device)
        mixed = x[at]
        if float_share:
            drop = torch.rand(mixed.shape, generator=rng).to(mixed) < float_share
            mixed = torch.where(drop, z[at], mixed)
        return mixed, y[at]
