"""Calibration plan: the method of each quantizer, by name patterns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Iterable, Iterator, Mapping, Union

from mmdet3d_quant.core.spec import WEIGHT_METHODS, Method, select

PlanLike = Union[str, Method, Iterable[str], Mapping[str, str], 'Plan']


@dataclass(frozen=True)
class Plan:
    """One method for all activations, and others for those that a pattern names.

    Attributes:
        default: Method of quantizers that no pattern names.
        overrides: Pattern (see :func:`mmdet3d_quant.core.spec.select`) and method; of several that
            fit, the last counts.
        weights: ``'max'`` or ``'mse'``, per output channel.
    """

    default: Method = Method('mse')
    overrides: tuple[tuple[str, Method], ...] = ()
    weights: str = 'max'

    def __post_init__(self) -> None:
        if self.weights not in WEIGHT_METHODS:
            raise ValueError(
                f'unknown method {self.weights!r} for weights: expected one of '
                + ', '.join(WEIGHT_METHODS)
            )

    @classmethod
    def parse(cls, method: PlanLike, weights: str | None = None) -> Plan:
        """Parses a plan.

        Args:
            method: A method; several texts, ``'mse'`` or ``'pattern=mse'``, or one with commas
                between; a mapping from pattern to method, with ``''`` for the default; or a plan,
                taken as it is. ``'weights=mse'``, as a plan prints it, is the one of weights.
            weights: See :class:`Plan`; None leaves what a plan says, else ``'max'``.

        Raises:
            ValueError: If a method is unknown, or is none of these.
        """
        if isinstance(method, Plan):
            return method if weights is None else replace(method, weights=weights)
        default, overrides, told = cls.default, [], cls.weights
        for pattern, text in _pairs(method):
            if pattern == 'weights':
                told = text.strip() if isinstance(text, str) else text
            elif pattern:
                overrides.append((pattern, Method.parse(text)))
            else:
                default = Method.parse(text)
        return cls(default, tuple(overrides), told if weights is None else weights)

    def methods(self, names: Iterable[str]) -> dict[str, Method]:
        """Looks up the method of each quantizer.

        Args:
            names: Names of the activation quantizers.

        Returns:
            Dict of methods by name.

        Raises:
            ValueError: If a pattern fits none of them.
        """
        methods = dict.fromkeys(names, self.default)
        for pattern, method in self.overrides:
            fitting = select(methods, pattern)
            if not fitting:
                raise ValueError(
                    f'calibration method {pattern}={method}: the pattern fits no activation '
                    f'quantizer; there are {", ".join(list(methods)[:3])}, ...'
                )
            methods.update(dict.fromkeys(fitting, method))
        return methods

    def names(self, name: str) -> bool:
        """Whether a pattern names a quantizer, whatever is the default."""
        return any(select([name], pattern) for pattern, _ in self.overrides)

    def __str__(self) -> str:
        parts = [str(self.default), *(f'{p}={m}' for p, m in self.overrides)]
        parts += [f'weights={self.weights}'] if self.weights != 'max' else []
        return ', '.join(parts)


def _pairs(method: Any) -> Iterator[tuple[str, Any]]:
    """Splits what :meth:`Plan.parse` takes into patterns, empty for the default, and methods."""
    if isinstance(method, Mapping):
        for pattern, text in method.items():
            if not isinstance(pattern, str):
                raise ValueError(f'calibration method {text!r}: its pattern {pattern!r} is no text')
            yield pattern.strip(), text
        return
    if isinstance(method, (str, Method)) or not isinstance(method, Iterable):
        method = [method]
    for text in method:
        if not isinstance(text, str):
            yield '', text
            continue
        for part in text.split(','):
            pattern, _, name = part.rpartition('=')
            yield pattern.strip(), name
