"""Re-estimated batch norms: their statistics move by as much as quantization moves their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Dict, Iterable, List, Tuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdet3d_quant.calibration.gather import gather_batches
from mmdet3d_quant.calibration.observe import Forward, run
from mmdet3d_quant.calibration.result import Choice
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.copies import deep_copy
from mmdet3d_quant.core.modes import evaluating, set_mode
from mmdet3d_quant.core.spec import select_all
from mmdet3d_quant.layers.base import QuantLayer

#: A variance changes by this factor at most, as that of a channel which rounds to one value.
MOST = 4.0
#: Values of what a norm makes that are compared, of one batch.
SAMPLE = 2**18

#: Numbered batches.
Batches = Iterable[Tuple[int, Any]]
#: By norm, of each of its calls (2, channels): mean and variance of what it read.
Moments = Dict[str, List[Tensor]]


class NormReestimation:
    """Step after the ranges that fits running statistics of batch norms to the quantized model.

    On the same batches each norm's input is seen in the float and in the quantized model. Its
    running mean moves by the difference of the means, and its running variance by the ratio of the
    variances, so that what it makes has the statistics that it has in float. Norms further on see
    what those before make with statistics of their batch corrected alike. The float model moves by
    as much as the statistics do. If what the norms make is not closer to float on held-out
    batches, all are as before.

    Args:
        patterns: Names of batch norms or of what they are in, see
            :func:`mmdet3d_quant.core.spec.select`.
        batches: Loads the batches to estimate from, numbered; of several processes each has its
            share. By default every other held-out batch.
        forward: See :func:`mmdet3d_quant.calibrate`.

    Attributes:
        exact: The model whose mode ``float`` is compared with; None: the one that is changed.
        changed: By norm the largest change of a channel's mean, in its standard deviations.
        left: Reason by name of each norm that stays.
        errors: Error of what the norms make, of its power, on held-out batches, before and after.
        undone: Whether it was no gain.
    """

    def __init__(
        self,
        patterns: Sequence[str] = ('*',),
        batches: Callable[[], Batches] | None = None,
        forward: Forward | None = None,
    ) -> None:
        self.patterns, self.batches, self.forward = list(patterns), batches, forward or run
        self.exact: nn.Module | None = None
        self.changed: dict[str, float] = {}
        self.left: dict[str, str] = {}
        self.errors: tuple[float, float] = (0.0, 0.0)
        self.undone = False

    def layers(self, model: nn.Module) -> dict[str, Any]:
        """Finds the batch norms with running statistics that the patterns name.

        Raises:
            ValueError: If a pattern names none, or nothing is quantized.
        """
        known = {
            n: m
            for n, m in model.named_modules()
            if isinstance(m, _BatchNorm) and m.running_mean is not None
        }
        if not any(isinstance(m, QuantLayer) for m in model.modules()):
            raise ValueError('batch norms are re-estimated behind quantized layers: there are none')
        what = 'batch norm with running statistics'
        chosen = set(select_all(known, self.patterns, what, 're-estimation'))
        return {n: m for n, m in known.items() if n in chosen}

    @torch.no_grad()
    def __call__(
        self, model: nn.Module, choices: list[Choice], held_out: list[tuple[int, Any]]
    ) -> None:
        """Changes a calibrated model in place; with several processes all alike.

        Args:
            model: Calibrated.
            choices: Not read.
            held_out: Numbered batches, on which it is judged.

        Raises:
            ValueError: If a pattern names no norm, or there are too few batches.
        """
        norms: dict[str, Any] = self.layers(model)
        judged = held_out if self.batches else [b for b in held_out if b[0] % 2]
        seen = self.batches() if self.batches else [b for b in held_out if not b[0] % 2]
        twin = self.exact or model
        twins = self.layers(twin)
        wanted = self._wanted(model, norms, twin, twins, seen)
        exact = dict(self._made(twin, twins, judged, 'float'))
        before = self._error(model, norms, judged, exact)
        old = {n: (m.running_mean.clone(), m.running_var.clone()) for n, m in norms.items()}
        self.left = {n: 'no batch reached it' for n in norms if n not in wanted}
        self.changed = {}
        for name, (shift, ratio) in wanted.items():
            norm = norms[name]
            if not shift.any() and bool((ratio == 1).all()):
                self.left[name] = 'quantization does not move what it reads'
                continue
            moved = shift / (norm.running_var.double() + norm.eps).sqrt()
            self.changed[name] = float(moved.abs().max())
            _set(norm, old[name], shift, ratio)
        after = self._error(model, norms, judged, exact)
        self.errors, self.undone = (before, after), after > before
        if self.undone:
            for name, norm in norms.items():
                _set(norm, old[name])
            self.changed = {}

    def __str__(self) -> str:
        before, after = (f'{100 * error:.3g} %' for error in self.errors)
        if self.undone:
            text = f'batch norms stay: with new statistics their error grows, {before} to {after}'
        else:
            text = f'{len(self.changed)} batch norms re-estimated: error {before}, now {after}'
        return text + ''.join(f'; {name} is left: {why}' for name, why in self.left.items())

    def _wanted(
        self,
        model: nn.Module,
        norms: dict[str, Any],
        twin: nn.Module,
        twins: dict[str, Any],
        batches: Batches,
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """By norm the change of its mean, and the factor of its variance, by channel."""
        sums: dict[int, dict[str, Tensor]] = {}
        for number, batch in batches:
            exact: Moments = {}
            with set_mode(twin, 'float'), evaluating(twin), _reading(twins, exact):
                self.forward(twin, deep_copy(batch))
            rounded: Moments = {}
            with set_mode(model, 'quant'), evaluating(model), _reading(norms, rounded, exact):
                self.forward(model, deep_copy(batch))
            sums[number] = {
                name: torch.stack([torch.stack(calls).mean(0), torch.stack(exact[name]).mean(0)])
                for name, calls in rounded.items()
                if len(calls) == len(exact.get(name, ()))
            }
        totals: dict[str, list[Tensor]] = {}
        for found in gather_batches(sums, 're-estimation of batch norms needs').values():
            for name, row in found.items():
                totals.setdefault(name, []).append(row)
        result = {}
        for name in (n for n in norms if n in totals):
            (mean, var), (float_mean, float_var) = torch.stack(totals[name]).mean(0)
            result[name] = (mean - float_mean, _ratio(var, float_var))
        return result

    def _made(
        self, model: nn.Module, norms: dict[str, Any], batches: Batches, mode: str
    ) -> Iterator[tuple[int, dict[str, list[Tensor]]]]:
        """By number of a batch what norms make in a mode."""
        for number, batch in batches:
            made: dict[str, list[Tensor]] = {}
            with set_mode(model, mode), evaluating(model), _making(norms, made):
                self.forward(model, deep_copy(batch))
            yield number, made

    def _error(
        self,
        model: nn.Module,
        norms: dict[str, Any],
        batches: Batches,
        exact: dict[int, dict[str, list[Tensor]]],
    ) -> float:
        """Squared error of what norms make, of its power; the mean over norms and batches."""
        found: dict[int, dict[str, float]] = {}
        for number, made in self._made(model, norms, batches, 'quant'):
            wanted = exact[number]
            found[number] = {
                name: float(
                    sum((a - b).square().sum() for a, b in strict_zip(wanted[name], calls))
                    / max(float(sum(a.square().sum() for a in wanted[name])), 1e-30)
                )
                for name, calls in made.items()
                if [a.shape for a in wanted.get(name, ())] == [b.shape for b in calls]
            }
        rows = gather_batches(found, 're-estimation of batch norms is judged on').values()
        errors = [error for row in rows for error in row.values()]
        return sum(errors) / max(len(errors), 1)


def _ratio(var: Tensor, exact: Tensor) -> Tensor:
    """What a variance is multiplied by; 1 where float has none."""
    ratio = torch.where(exact > 0, var / exact.clamp(min=1e-30), torch.ones_like(var))
    return ratio.clamp(1 / MOST, MOST)


def _set(
    norm: Any, old: tuple[Tensor, Tensor], shift: Tensor | float = 0.0, ratio: Tensor | float = 1.0
) -> None:
    """Sets running statistics to old ones, shifted and scaled."""
    for kept, value in ((norm.running_mean, old[0] + shift), (norm.running_var, old[1] * ratio)):
        kept.copy_(value)


def _moments(x: Tensor) -> Tensor:
    """float64 (2, channels): mean and variance of a tensor with its channels at axis 1."""
    rows = x.detach().double().transpose(0, 1).flatten(1)
    return torch.stack([rows.mean(1), rows.var(1, unbiased=False)])


@contextmanager
def _reading(
    norms: dict[str, Any], moments: Moments, exact: Moments | None = None
) -> Iterator[None]:
    """Hooks norms to note what they read; with the float model's, to use what follows from it."""
    old = {n: (m.running_mean.clone(), m.running_var.clone()) for n, m in norms.items()}

    def hook_of(name: str) -> Any:
        def hook(norm: Any, args: Any) -> None:
            if args[0].numel() == 0:
                return
            own = _moments(args[0])
            calls = moments.setdefault(name, [])
            calls.append(own)
            if exact is not None and len(calls) <= len(exact.get(name, ())):
                mean, var = exact[name][len(calls) - 1]
                _set(norm, old[name], own[0] - mean, _ratio(own[1], var))

        return hook

    handles = [norm.register_forward_pre_hook(hook_of(name)) for name, norm in norms.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, norm in norms.items():
            _set(norm, old[name])


@contextmanager
def _making(norms: dict[str, Any], made: dict[str, list[Tensor]]) -> Iterator[None]:
    """Hooks norms to keep a part of what they make."""

    def hook_of(name: str) -> Any:
        def hook(norm: Any, args: Any, y: Tensor) -> None:
            every = max(1, y.numel() // SAMPLE) | 1  # odd: not in step with the columns of a map
            made.setdefault(name, []).append(y.detach().flatten()[::every].double())

        return hook

    handles = [norm.register_forward_hook(hook_of(name)) for name, norm in norms.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
