"""How much of a model is quantized: layers, multiply-accumulates, and what stays float and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from inspect import signature
from typing import Any

from mmengine.registry import MODELS
from torch import nn

from mmdet3d_quant.core.compat import removeprefix
from mmdet3d_quant.core.formats import INT8
from mmdet3d_quant.core.macs import weighted
from mmdet3d_quant.core.skip import WHY, covering, skip_lines

#: Parts of a detector that stay float without a word: there is no Quant type of them.
HEADS = '*_head'
#: How many modules a line names.
_SHOWN = 3


@dataclass(frozen=True)
class Layer:
    """A layer with weights.

    Attributes:
        name: Its name in the model.
        kind: Its type.
        macs: Multiply-accumulates of one batch, or None if they were not counted.
        reason: Why it is float, or None if it is quantized.
        meant: Whether somebody said that it shall be float.
        format: Name of the number format of its input, if it is quantized.
    """

    name: str
    kind: str
    macs: int | None
    reason: str | None
    meant: bool
    format: str = ''


@dataclass(frozen=True)
class Coverage:
    """Which layers of a model are quantized.

    Attributes:
        layers: Convolutions, sparse and transposed ones too, and linear layers, in the order of
            the model.
    """

    layers: tuple[Layer, ...]

    @property
    def quantized(self) -> tuple[Layer, ...]:
        """The layers whose input and weight are quantized."""
        return tuple(layer for layer in self.layers if layer.reason is None)

    @property
    def formats(self) -> dict[str, int]:
        """Number of quantized layers by the name of their number format."""
        return dict(Counter(layer.format for layer in self.quantized))

    @property
    def uncounted(self) -> list[str]:
        """Names of the layers whose multiply-accumulates are not known."""
        return [layer.name for layer in self.layers if layer.macs is None]

    @property
    def share(self) -> float | None:
        """Share of the counted multiply-accumulates that is quantized; None if there are none."""
        total = sum(layer.macs or 0 for layer in self.layers)
        return sum(layer.macs or 0 for layer in self.quantized) / total if total else None

    def float_groups(self) -> list[dict[str, Any]]:
        """Groups the float layers by the highest module that has no quantized one.

        Returns:
            List of dicts: ``module`` (of a single layer its own name), ``layers`` (names),
            ``share`` of the counted multiply-accumulates (or None) and ``reason``.
        """
        by_name = {layer.name: layer for layer in self.layers}
        names = [layer.name for layer in self.layers if layer.reason is not None]
        total = sum(layer.macs or 0 for layer in self.layers)
        groups = []
        for module, inside in covering(names, list(by_name)).items():
            layers = [by_name[name] for name in inside]
            macs = sum(layer.macs or 0 for layer in layers)
            counted = total and any(layer.macs is not None for layer in layers)
            share = macs / total if counted else None
            at = inside[0] if len(inside) == 1 else module
            groups.append(dict(module=at, layers=inside, share=share, reason=_reason(layers)))
        return groups

    def summary(self) -> str:
        """Tells how much is quantized, in a sentence."""
        text = f'{len(self.quantized)} of {len(self.layers)} layers quantized'
        formats = self.formats
        if set(formats) - {INT8.name}:
            text += f' ({", ".join(f"{count} {name}" for name, count in formats.items())})'
        if self.share is None:
            return f'{text}; multiply-accumulates were not counted'
        text += f', {100 * self.share:.1f} % of the multiply-accumulates'
        left = self.uncounted
        return text + (f' (without {len(left)} layer(s) that could not be counted)' if left else '')

    def lines(self) -> list[str]:
        """Tells what stays float and why, a line a reason."""
        by_reason: dict[str, list[dict[str, Any]]] = {}
        for group in self.float_groups():
            by_reason.setdefault(group['reason'], []).append(group)
        lines = []
        for reason, groups in by_reason.items():
            count = sum(len(group['layers']) for group in groups)
            shares = [group['share'] for group in groups if group['share'] is not None]
            macs = f', {100 * sum(shares):.1f} %' if shares else ''
            layers = f'{count} layer{"s" if count > 1 else ""}'
            lines.append(f'float: {_some(groups)} ({layers}{macs}): {reason}')
        return lines

    def plain(self) -> dict[str, Any]:
        """Returns all as plain values that JSON takes."""
        return dict(
            layers=len(self.layers),
            quantized=len(self.quantized),
            formats=self.formats,
            share=self.share,
            uncounted=self.uncounted,
            float=self.float_groups(),
            text=self.summary(),
            lines=self.lines(),
        )


def _some(groups: list[dict[str, Any]]) -> str:
    """Names of the first modules of some groups, and how many more there are."""
    more = len(groups) - _SHOWN
    names = ', '.join(group['module'] for group in groups[:_SHOWN])
    return names + (f' and {more} more' if more > 0 else '')


def _reason(layers: list[Layer]) -> str:
    """The reasons of some float layers; types are listed once."""
    kinds = dict.fromkeys(layer.kind for layer in layers if not layer.meant)
    meant = dict.fromkeys(str(layer.reason) for layer in layers if layer.meant)
    types = [_not_quantized(', '.join(kinds))] if kinds else []
    return '; '.join([*meant, *types])


def _not_quantized(kinds: str) -> str:
    return f'its type is not quantized ({kinds})'


def coverage(model: nn.Module, macs: Mapping[str, int] | None = None) -> Coverage:
    """Finds which layers of a model are quantized.

    Args:
        model: Any module.
        macs: Multiply-accumulates by layer; see :class:`mmdet3d_quant.core.macs.counting`.
    """
    known = macs or {}
    layers = []
    for name, module in weighted(model).items():
        kind = removeprefix(type(module).__name__, 'Portable')  # spconv's, in `parents`
        reason, meant = _float_reason(module, kind)
        fmt = module._input_quantizer.spec.format.name if reason is None else ''
        layers.append(Layer(name, kind, known.get(name), reason, meant, fmt))
    return Coverage(tuple(layers))


def _float_reason(module: Any, kind: str) -> tuple[str | None, bool]:
    """Why a layer is float, None if it is not; and whether that is meant."""
    found = (getattr(module, f'_{what}_quantizer', None) for what in ('input', 'weight'))
    both = [q for q in found if q is not None]
    if len(both) < 2:
        meant = getattr(module, 'float_reason', None)
        return meant or _not_quantized(kind), meant is not None
    reasons = [q.float_reason for q in both if q.float_reason is not None]
    return (reasons[0], True) if reasons else (None, False)


def float_parts(model: nn.Module, found: Coverage) -> list[str]:
    """Writes a warning for each part of a detector that stays float and is not meant to.

    A part is a child of the detector with layers; heads (:data:`HEADS`) are left out.

    Args:
        model: The detector.
        found: Its coverage.

    Returns:
        List of str: what is float, and what to write to quantize it or to say that it is meant.
    """
    warnings = []
    for name, part in model.named_children():
        layers = [k for k in found.layers if k.name == name or k.name.startswith(f'{name}.')]
        if not layers or fnmatchcase(name, HEADS):
            continue
        if all(layer.reason is not None and not layer.meant for layer in layers):
            warnings.append(
                f'{name} stays float: {_reason(layers)}. {_how_to_quantize(name, part)}If it is '
                f'meant to: {skip_lines(model, {name: WHY})}'
            )
    return warnings


def _how_to_quantize(name: str, part: nn.Module) -> str:
    own = removeprefix(type(part).__name__, 'Portable')
    if MODELS.get(f'mmdet3d.Quant{own}') is not None:
        return f"To quantize it: {name}=dict(type='Quant{own}'). "
    if 'conv_cfg' in signature(type(part).__init__).parameters:
        return f"To quantize it: {name}=dict(conv_cfg=dict(type='QuantConv2d')). "
    return f'There is no Quant type of {own}. '
