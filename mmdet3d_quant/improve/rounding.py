"""Learned rounding: each weight goes up or down so that the output of its block is least wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from mmengine.dist import get_world_size
from torch import Tensor, nn

from mmdet3d_quant.calibration.observe import Forward, run
from mmdet3d_quant.calibration.result import Choice
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.copies import deep_copy
from mmdet3d_quant.core.modes import constant_parameters, evaluating, quantizers, set_mode
from mmdet3d_quant.core.spec import select_all
from mmdet3d_quant.improve.blocks import LEVELS, Block, find_blocks
from mmdet3d_quant.improve.crops import Samples, collect
from mmdet3d_quant.improve.flips import polish
from mmdet3d_quant.improve.relaxed import Relaxed, exponent
from mmdet3d_quant.layers.base import QuantLayer
from mmdet3d_quant.layers.sparse import SPARSE_CONVS
from mmdet3d_quant.runs.listener import Listener


class LearnedRounding:
    """Step after the ranges that learns for each weight whether it is rounded up or down.

    Block by block, in the order in which they are called, the weights of a block are rounded so
    that on the quantized model's tensors it gives what the float block gives on the float model's
    (AdaRound, BRECQ, QDrop). Then weights are flipped, alone and in pairs, where that helps a layer
    and its block. A weight becomes the number of its layer's grid that was chosen:
    ranges and keys stay, and rounding to nearest gives that number. The float model moves by up to
    a step per weight. A block that is not better on crops apart from those learned from is as
    before.

    Memory: a copy of the model, and up to 16 MiB a block of the float model's tensors.

    Args:
        patterns: Names of layers, see :func:`mmdet3d_quant.core.spec.select`.
        steps: Steps of Adam per block.
        batch: Crops per step, of 16 x 16 cells of a block's input each.
        qdrop: Share of the activations that stay float in each step.
        by: ``'block'``, or ``'layer'``: each layer on its own.
        batches: Most held-out batches to learn from.
        rate: Learning rate.
        weight: Weight of the term that pulls weights to whole numbers.
        seed: Of crops and drops.
        forward: See :func:`mmdet3d_quant.calibrate`.
        listener: Told how many blocks are done.

    Attributes:
        exact: The model whose mode ``float`` is learned from; None: the one that is changed.
        gains: By block the squared error of its output before and after, over that of its float
            output, on crops that were not learned from.
        flipped: By layer the share of its weights that are not rounded to nearest.
        left: Reason by name of each layer or block that stays as it is.

    Raises:
        ValueError: If an argument makes no sense, or several processes have joined.
    """

    def __init__(
        self,
        patterns: Sequence[str] = ('*',),
        steps: int = 300,
        batch: int = 16,
        qdrop: float = 0.5,
        by: str = 'block',
        batches: int = 4,
        rate: float = 2e-2,
        weight: float = 0.5,
        seed: int = 0,
        forward: Forward | None = None,
        listener: Listener | None = None,
    ) -> None:
        if by not in LEVELS:
            raise ValueError(f'learned rounding by {by!r}: expected one of {", ".join(LEVELS)}')
        if min(steps, batch, batches) < 1 or not 0 <= qdrop < 1:
            raise ValueError(
                'learned rounding: steps, batch and batches must be at least 1, qdrop in [0, 1), '
                f'got {steps}, {batch}, {batches} and {qdrop}'
            )
        _require_one_process()
        self.patterns, self.steps, self.batch = list(patterns), steps, batch
        self.qdrop, self.by, self.batches = qdrop, by, batches
        self.rate, self.weight, self.seed = rate, weight, seed
        self.forward, self.listener = forward or run, listener or Listener()
        self.exact: nn.Module | None = None
        self.gains: dict[str, tuple[float, float]] = {}
        self.flipped: dict[str, float] = {}
        self.left: dict[str, str] = {}

    def layers(self, model: nn.Module) -> dict[str, QuantLayer]:
        """Finds the layers that the patterns name, and notes why some of them are left.

        Raises:
            ValueError: If a pattern names no quantized layer.
        """
        known = {n: m for n, m in model.named_modules() if isinstance(m, QuantLayer)}
        names = select_all(known, self.patterns, 'quantized layer', 'learned rounding')
        self.left = {name: why for name in names if (why := _problem(known[name]))}
        return {name: known[name] for name in names if name not in self.left}

    def __call__(
        self, model: nn.Module, choices: list[Choice], held_out: list[tuple[int, Any]]
    ) -> None:
        """Changes the weights of a calibrated model in place.

        Args:
            model: Calibrated.
            choices: Not read.
            held_out: Numbered batches.

        Raises:
            ValueError: If a pattern names no layer, there is no batch, or several processes have
                joined.
        """
        _require_one_process()
        layers = self.layers(model)
        batches = [batch for _, batch in held_out[: self.batches]]
        if not batches:
            raise ValueError('learned rounding needs a held-out batch: use more batches')
        self.gains, self.flipped = {}, {}
        first = partial(_run, self.forward, batches[0])
        blocks = find_blocks(model, layers, first, self.by)
        reached = {name for block in blocks for name in block.layers}
        self.left.update({n: 'no batch reached it' for n in layers if n not in reached})
        exact = self.exact or deep_copy(model)
        wanted = collect(exact, blocks, batches, self.forward, 'float', self.seed)
        with self.listener.counting('Rounding blocks', len(blocks)) as count:
            for done, block in enumerate(blocks):
                found = collect(model, [block], batches, self.forward, 'quant', self.seed)
                self._learn(model, exact, block, found[block.name], wanted.pop(block.name))
                count(done + 1)

    def __str__(self) -> str:
        text = f'rounding of {len(self.flipped)} layers learned in {len(self.gains)} blocks'
        if self.gains:
            before, after = (sum(g[i] for g in self.gains.values()) for i in (0, 1))
            share = after / before if before else 1.0
            text += f', {share:.2f} of the error of their outputs is left'
        return text + ''.join(f'; {name} is left: {why}' for name, why in self.left.items())

    def _learn(
        self, model: nn.Module, exact: nn.Module, block: Block, found: list[Tensor], wanted: Any
    ) -> None:
        """Learns a block's weights; sets them if that makes it better."""
        if [x.shape for x in found] != [x.shape for x in wanted]:
            self.left[block.name] = 'its input has another shape in float'
            return
        chain = block.chain(model)
        relaxed = {name: Relaxed(model.get_submodule(name)) for name in block.layers}
        with ExitStack() as stack:
            for module in (model, exact):
                stack.enter_context(evaluating(module))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(set_mode(exact, 'float'))
            stack.enter_context(set_mode(model, 'quant'))
            float_chain = block.chain(exact)
            data = Samples(found, wanted, float_chain)
            before = data.error(chain)
            if before > 0:
                with constant_parameters(model), _soft(chain, relaxed, self.qdrop, self.seed):
                    self._optimize(chain, relaxed, data)
            kept = {name: r.layer.weight.detach().clone() for name, r in relaxed.items()}
            with torch.no_grad():
                for r in relaxed.values():
                    r.layer.weight.copy_(r.rounded())
                after = before and polish(chain, float_chain, relaxed, data, before)
        if before > 0 and after < before:
            self.gains[block.name] = before, after
            self.flipped.update({name: r.flipped() for name, r in relaxed.items()})
            return
        with torch.no_grad():
            for name, r in relaxed.items():
                r.layer.weight.copy_(kept[name])
        self.left[block.name] = (
            f'learned rounding leaves {after:.2g} of its output wrong, rounding to nearest '
            f'{before:.2g}'
        )

    def _optimize(self, chain: nn.Module, relaxed: Mapping[str, Relaxed], data: Samples) -> None:
        rng = torch.Generator().manual_seed(self.seed)
        steps = [r.up for r in relaxed.values()]
        optimizer = torch.optim.Adam(steps, lr=self.rate)
        count = sum(up.numel() for up in steps)
        for step in range(self.steps):
            x, y = data.pick(self.batch, self.qdrop, rng)
            with torch.enable_grad():
                loss = (chain(x) - y).square().mean() / data.scale
                power = exponent(step, self.steps)
                if power is not None:
                    pull = sum(r.undecided(power).sum() for r in relaxed.values()) / count
                    loss = loss + self.weight * pull
                grads = torch.autograd.grad(loss, steps)
            for up, grad in strict_zip(steps, grads):
                up.grad = grad
            optimizer.step()


@contextmanager
def _soft(
    chain: nn.Module, relaxed: Mapping[str, Relaxed], qdrop: float, seed: int
) -> Iterator[None]:
    """Lets layers compute with relaxed weights, and activations stay float at random."""
    rng = torch.Generator().manual_seed(seed + 1)
    weights = {r.layer._weight_quantizer: r for r in relaxed.values()}
    others = {m._weight_quantizer for m in chain.modules() if isinstance(m, QuantLayer)}

    def soft(quantizer: Any, args: Any, output: Tensor) -> Tensor:
        return weights[quantizer].soft()

    def drop(quantizer: Any, args: Any, output: Tensor) -> Tensor:
        kept = torch.rand(output.shape, generator=rng).to(output) < qdrop
        return torch.where(kept, args[0], output)

    handles = [q.register_forward_hook(soft) for q in weights]
    if qdrop:
        for quantizer in quantizers(chain).values():
            if quantizer not in others and quantizer.mode == 'quant':
                handles.append(quantizer.register_forward_hook(drop))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(forward: Forward, batch: Any, model: nn.Module) -> Any:
    return forward(model, deep_copy(batch))


def _problem(layer: QuantLayer) -> str | None:
    """Why the weights of a layer cannot be learned; None if they can."""
    quantizer = layer._weight_quantizer
    if quantizer.float_reason is not None:
        return f'its weight is float ({quantizer.float_reason})'
    if isinstance(layer, SPARSE_CONVS):
        return 'it is sparse'
    if not quantizer.spec.format.even:
        return f'numbers of {quantizer.spec.format.name} are not one step apart'
    return None


def _require_one_process() -> None:
    if get_world_size() > 1:
        raise ValueError(
            'learned rounding runs in one process: calibrate without --launcher, or leave it out'
        )
