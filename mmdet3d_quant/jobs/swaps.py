"""Which part of a float config becomes which quantized type, tried by building the model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from inspect import signature
from typing import Any

import torch
from mmdet3d.registry import MODELS
from mmengine.config import Config
from torch import Tensor, nn

from mmdet3d_quant.core.compat import removeprefix
from mmdet3d_quant.core.coverage import Coverage, coverage
from mmdet3d_quant.core.errors import QuantError
from mmdet3d_quant.core.macs import weighted
from mmdet3d_quant.core.modes import float_state_dict, quantizers
from mmdet3d_quant.core.naming import type_name
from mmdet3d_quant.export import generate_inputs
from mmdet3d_quant.export.families import ChainModule, chains_of
from mmdet3d_quant.layers.base import QuantLayer
from mmdet3d_quant.layers.pairs import forward_owner
from mmdet3d_quant.models.convert import FLOAT_PARTS, WHOLE
from mmdet3d_quant.runs import from_config as fc

#: Why parts stay float that have a module of such a class inside.
FLOAT_INSIDE = {
    'MultiheadAttention': 'its attention decides between queries by small differences',
    'MultiScaleDeformableAttention': 'it samples features between pixels, in float in any engine',
}
#: Arguments that hold configs of convolutions of parts inside, by the type of the part.
INNER = {'CenterHead': ('separate_head',)}
#: Where the function of a layer comes from that a quantized one computes the same way.
_PLAIN = ('torch.nn.modules.', 'mmcv.cnn.bricks.wrappers.')
_CONV = dict(type='QuantConv2d')
#: Side of the images, and of other inputs, on which argument shapes are found.
_IMAGE, _CROPPED = 256, dict(bev=64, volume=16)


@dataclass(frozen=True)
class Swap:
    """What a config changes in one part of a detector.

    Attributes:
        part: Its name in ``model``.
        kind: Name of its float type.
        layers: How many layers with weights it has.
        change: What to merge into its config; empty if it stays float.
        quantized: How many of its layers are quantized.
        left: What of it stays float, modules or layers, by reason.
        reason: Why all of it stays float, or empty.
        meant: Whether it is meant to stay float, whatever there is for its type.
    """

    part: str
    kind: str
    layers: int
    change: dict[str, Any] = field(default_factory=dict)
    quantized: int = 0
    left: dict[str, list[str]] = field(default_factory=dict)
    reason: str = ''
    meant: bool = False


def find_swaps(cfg: Config) -> list[Swap]:
    """Finds for every part of a float detector the quantized type that serves it.

    A type is taken if the model builds with it, has the same parameters, and every layer that it
    quantizes computed in float what a quantized one does.

    Args:
        cfg: The float config; not changed.

    Returns:
        A :class:`Swap` for each part with layers, in the order of the config.

    Raises:
        ConfigError: If the float model cannot be built.
        QuantError: If the model is quantized already.
    """
    model = fc.build_model(cfg)
    if quantizers(model):
        raise QuantError(
            f'{cfg.filename} has quantized types already ({next(iter(quantizers(model)))}): give '
            'the float config that it is based on'
        )
    shapes = argument_shapes(model) if MODELS.get('Quant') is not None else {}
    swaps = []
    for name, part in cfg.model.items():
        child = getattr(model, name, None)
        if isinstance(part, dict) and isinstance(child, nn.Module) and weighted(child):
            swaps.append(_swap(cfg, name, part, child, shapes.get(name)))
    return swaps


@torch.no_grad()
def argument_shapes(detector: nn.Module) -> dict[str, list[Any]]:
    """Finds the shapes of what the exported parts of a detector are called with, on small inputs.

    Returns:
        By part a list with a shape per argument, or a list of shapes for a list of maps; empty if
        the parts cannot be run.
    """
    seen: dict[str, list[Any]] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple) -> None:
            seen.setdefault(name, [_shapes(x) for x in args])

        return hook

    parts = {name for chain in chains_of(detector) for name in chain.parts}
    children = dict(detector.named_children())
    hooks = [children[n].register_forward_pre_hook(note(n)) for n in parts if n in children]
    try:
        inputs = generate_inputs(detector, 1, image_size=(_IMAGE, _IMAGE))
        for chain in chains_of(detector):
            x = inputs[chain.source]
            if chain.source in _CROPPED:
                x = x[:, :, : _CROPPED[chain.source], : _CROPPED[chain.source]]
            ChainModule(detector, chain)(x)
    except (QuantError, *fc.REFUSALS):
        pass  # candidates without shapes are left
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _shapes(x: Any) -> Any:
    return tuple(x.shape) if isinstance(x, Tensor) else [_shapes(item) for item in x]


def with_swaps(cfg: Config, swaps: Sequence[Swap]) -> Config:
    """Applies swaps to a copy of a config, as a child config does."""
    changed = copy.deepcopy(cfg)
    changed.merge_from_dict(dict(model=model_change(cfg, swaps)))
    return changed


def model_change(cfg: Config, swaps: Sequence[Swap]) -> dict[str, Any]:
    """Collects what a child config changes in ``model``.

    Args:
        cfg: The float config.
        swaps: Its swaps.

    Returns:
        The changes by part; before them, where parts are meant to stay float, the type that keeps
        them float and tells the reasons.
    """
    change: dict[str, Any] = {s.part: s.change for s in swaps if s.change}
    skip = {s.part: s.reason for s in swaps if s.meant}
    if not skip:
        return change
    return dict(dict(type='Quantized', of=cfg.model['type'], skip=skip), **change)


def _swap(cfg: Config, name: str, part: dict, child: nn.Module, shapes: list[Any] | None) -> Swap:
    kind, count = type_name(part['type']), len(weighted(child))
    reason = _meant_float(name, child)
    if reason:
        return Swap(name, kind, count, reason=reason, meant=True)
    problems = []
    for change in candidates(part, child, shapes):
        tried = Swap(name, kind, count, change)
        try:
            new = getattr(fc.build_model(with_swaps(cfg, [tried])), name)
        except QuantError as err:
            problems.append(_told(change, str(err.__cause__ or err)))
            continue
        problem = difference(child, new)
        if not problem:
            found = coverage(new)
            return Swap(name, kind, count, change, len(found.quantized), _left(found))
        problems.append(_told(change, problem))
    return Swap(
        name, kind, count, reason='; '.join(problems) or f'there is no Quant type of {kind}'
    )


def has_type(child: nn.Module) -> bool:
    """Whether a quantized type is written for a part, which then says what of it stays float."""
    return MODELS.get(f'Quant{_own(child)}') is not None


def _own(child: nn.Module) -> str:
    return removeprefix(type(child).__name__, 'Portable')


def _meant_float(name: str, child: nn.Module) -> str:
    """Why a part is not tried at all, or empty."""
    for pattern, reason in FLOAT_PARTS.items():
        if fnmatchcase(name, pattern):
            return reason
    if has_type(child):
        return ''
    inside = {c.__name__ for m in child.modules() for c in type(m).__mro__}
    return next((reason for kind, reason in FLOAT_INSIDE.items() if kind in inside), '')


def candidates(
    part: dict, child: nn.Module, shapes: list[Any] | None = None
) -> Iterator[dict[str, Any]]:
    """Lists what may quantize a part, best first, as changes of its config.

    Args:
        part: Its float config.
        child: The float module.
        shapes: Of the arguments of its forward, if known.
    """
    own = _own(child)
    if has_type(child):
        yield dict(type=f'Quant{own}', **WHOLE.get(own, {}))
    if MODELS.get('Quant') is not None:
        yield dict(type='Quant', of=part['type'])
        if shapes:
            yield dict(type='Quant', of=part['type'], example=shapes)
    makers = [c.__init__ for c in type(child).__mro__ if '__init__' in vars(c)]  # type: ignore[misc]
    if any('conv_cfg' in signature(make).parameters for make in makers):
        inner = {key: dict(conv_cfg=_CONV) for key in INNER.get(own, ()) if key in part}
        yield dict(conv_cfg=_CONV, **inner)


def difference(old: nn.Module, new: nn.Module) -> str:
    """Says what a quantized part has or computes otherwise than the float one; empty if nothing.

    Args:
        old: The float part.
        new: The same with quantized types.
    """
    before = {name: tuple(value.shape) for name, value in old.state_dict().items()}
    after = {name: tuple(value.shape) for name, value in float_state_dict(new).items()}
    odd = sorted(n for n in {*before, *after} if before.get(n) != after.get(n))
    if odd:
        return f'its weights differ: {odd[0]}'
    floats = dict(old.named_modules())
    layers = {n: m for n, m in new.named_modules() if isinstance(m, QuantLayer)}
    if not layers:
        return 'none of its layers changes'
    for name in layers:
        if name in floats and not _is_plain(floats[name]):
            return f'{name} is a {type(floats[name]).__name__}, which computes something else'
    return ''


def _is_plain(layer: nn.Module) -> bool:
    """Whether a quantized layer of its kind computes the same in float; sparse ones do."""
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
        return True
    owners = (forward_owner(layer, method) for method in ('forward', '_conv_forward'))
    return all(owner.startswith(_PLAIN) for owner in owners if owner)


def _left(found: Coverage) -> dict[str, list[str]]:
    """Names of what stays float, by reason."""
    left: dict[str, list[str]] = {}
    for group in found.float_groups():
        left.setdefault(group['reason'], []).append(group['module'])
    return left


def _told(change: dict[str, Any], problem: str) -> str:
    what = f'as {change["type"]}' if 'type' in change else 'with conv_cfg=QuantConv2d'
    return f'{what}: {problem.splitlines()[0]}'
