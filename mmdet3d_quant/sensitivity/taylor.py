"""Predicted noise at the judged maps of every layer's quantization, from one forward.

The squared error of the maps, ``|J d|^2`` for a small error ``d`` of a layer's output and the
Jacobian ``J`` of the maps by it, is the second-order Taylor term of the task-like loss (the first
is zero at the float model). It is found without ``J``: for random signs ``v`` on the maps
``E (v . J d)^2 = |J d|^2``, and ``v . J d`` is the gradient of ``v . maps`` by the layer's output,
times ``d``. One backward gives it for all layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmdet3d_quant.calibration.observe import Forward, run
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.macs import weighted
from mmdet3d_quant.core.maps import judged_maps
from mmdet3d_quant.core.modes import constant_parameters, evaluating, quantizers, set_mode
from mmdet3d_quant.core.ties import ties
from mmdet3d_quant.layers.features import values, with_values


@dataclass
class Taylor:
    """Scores of one forward.

    Attributes:
        products: By member one number per probe: the gradient times the error, summed over the
            layer's output. The mean of the squares is the noise at the maps; products of several
            members add up before they are squared. Members that no map depends on are missing.
        sources: By name of a layer or of a join's quantizer, those whose results it reads.
    """

    products: dict[str, list[float]] = field(default_factory=dict)
    sources: dict[str, list[str]] = field(default_factory=dict)


def taylor(
    model: nn.Module,
    batch: Any,
    members: Mapping[str, tuple[str, ...]],
    probes: int = 4,
    seed: int = 0,
    forward: Forward | None = None,
) -> Taylor:
    """Predicts the noise at the judged maps for each member.

    Args:
        model: A calibrated model; as before afterwards.
        batch: What ``forward`` takes, of one sample: random signs of several would mix.
        members: Of :func:`mmdet3d_quant.sensitivity.units.find_members`.
        probes: Number of backward passes; the standard deviation of a noise from one is 1.4 times
            the noise.
        seed: Of the random signs.
        forward: ``forward(model, batch)`` runs the model; see :func:`mmdet3d_quant.calibrate`.

    Returns:
        :class:`Taylor`.

    Raises:
        QuantError: If the model has no map to be judged by.
    """
    found = Taylor()
    with constant_parameters(model), set_mode(model, 'float'), evaluating(model):
        with torch.inference_mode(False), torch.enable_grad():
            with judged_maps(model) as judged, _taps(model, members, found) as anchor:
                maps = judged.returned((forward or run)(model, batch))
            reached = [m for m in maps if m.requires_grad]
            rng = torch.Generator().manual_seed(seed)
            for probe in range(probes if reached else 0):
                for row in found.products.values():
                    row.append(0.0)
                value = sum((m * _signs(m, rng)).sum() for m in reached) / len(maps) ** 0.5
                torch.autograd.grad(value, anchor, retain_graph=probe + 1 < probes)
    found.products = {n: row for n, row in found.products.items() if any(row)}
    return found


def _signs(x: Tensor, rng: torch.Generator) -> Tensor:
    """Random signs over the norm of a map, so that maps of any size count alike."""
    signs = torch.randint(0, 2, x.shape, generator=rng).to(x) * 2 - 1
    return signs / torch.linalg.vector_norm(x.detach()).clamp(min=1e-30)


@contextmanager
def _taps(
    model: nn.Module, members: Mapping[str, tuple[str, ...]], found: Taylor
) -> Iterator[Tensor]:
    """Hooks layers and joins: their errors are noted, and multiplied by gradients in a backward.

    Yields:
        Scalar that every output depends on: its gradient is what a backward has to ask for.
    """
    known = quantizers(model)
    tie = {name: group for group in ties(model) for name in group}
    device = next((p.device for p in model.parameters()), torch.device('cpu'))
    anchor = torch.zeros((), requires_grad=True, device=device)
    nodes: dict[Any, str] = {}
    busy = False

    def tap(name: str, x: Tensor, error: Tensor | None) -> Tensor:
        tapped = x + anchor
        node = tapped.grad_fn
        nodes[node] = name
        if error is not None:
            row = found.products.setdefault(name, [])

            def multiply(grads: Any) -> None:
                row[-1] += (grads[0] * error).sum().item()

            node.register_prehook(multiply)  # type: ignore[union-attr]
        return tapped

    def sources(name: str, x: Tensor) -> list[str]:
        before = _makers(x, nodes)
        row = found.sources.setdefault(name, [])
        row += [source for source in before if source not in row]
        return before

    def of_layer(name: str) -> Any:
        def hook(layer: nn.Module, args: Any, output: Any) -> Any:
            nonlocal busy
            if busy or not (isinstance(output, Tensor) or hasattr(output, 'features')):
                return None
            before = sources(name, values(args[0])) if args else []
            switched = list(members.get(name, ()))
            own = f'{name}._input_quantizer' if name else '_input_quantizer'
            if before and all(source in tie.get(own, ()) for source in before):
                switched = [q for q in switched if q != own]  # rounded on this grid already
            error = None
            if switched:
                busy = True
                try:
                    with torch.no_grad(), _quantizing([known[q] for q in switched]):
                        error = values(layer(*args)) - values(output)
                finally:
                    busy = False
            return with_values(output, tap(name, values(output), error))

        return hook

    def of_join(name: str) -> Any:
        def hook(quantizer: Any, args: Any, output: Tensor) -> Tensor | None:
            if busy:
                return None
            sources(name, output)
            with torch.no_grad(), _quantizing([quantizer]):
                error = quantizer.forward(output) - output
            return tap(name, output, error)

        return hook

    layers = weighted(model)
    handles = [layer.register_forward_hook(of_layer(name)) for name, layer in layers.items()]
    handles += [
        known[name].register_forward_hook(of_join(name)) for name in members if name in known
    ]
    try:
        yield anchor
    finally:
        for handle in handles:
            handle.remove()


def _makers(x: Tensor, nodes: Mapping[Any, str]) -> list[str]:
    """Finds the tapped results that a tensor is computed from, by its graph."""
    found: dict[str, None] = {}
    seen, todo = set(), [x.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in nodes:
            found[nodes[node]] = None
        else:
            todo += [before for before, _ in node.next_functions]
    return sorted(found)


@contextmanager
def _quantizing(some: list[Any]) -> Iterator[None]:
    """Puts some quantizers into mode ``quant`` for a while."""
    before = [q.switches for q in some]
    for quantizer in some:
        quantizer.mode = 'quant'
    try:
        yield
    finally:
        for quantizer, switches in strict_zip(some, before):
            quantizer.switches = switches
