"""Settings of a quantizer as frozen data, checked once at the boundary."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Collection, Iterable, Mapping

from mmdet3d_quant.core.formats import FORMATS, Bits, Format

MODES = ('float', 'observe', 'quant')
#: How a range is chosen, by name, and what that means. A new method is a line here and a function
#: in the table of :mod:`mmdet3d_quant.calibration.amax`.
METHODS = {
    'max': 'the largest value',
    'percentile': 'the range that so many percent of the values are in',
    'entropy': 'the range with the least divergence from the histogram',
    'mse': 'the range with the least squared error',
    'auto': "of the others the one with which the layer's output is least wrong",
}
#: How ranges of weights are chosen.
WEIGHT_METHODS = ('max', 'mse')


@dataclass(frozen=True)
class QuantSpec:
    """Signed symmetric quantization of one tensor.

    The grid is the numbers of the format times ``scale = amax / qmax``, with zero point 0: the
    pattern TensorRT takes for explicit quantization.

    Attributes:
        num_bits: A key of ``core.formats.FORMATS``: 2 to 8 for integers, (4, 3) for FP8.
        axis: Channel axis with one range per index, or None for one range per tensor.
    """

    num_bits: Bits = 8
    axis: int | None = None

    def __post_init__(self) -> None:
        if self.num_bits not in list(FORMATS):  # a list, so that nothing needs a hash
            known = ', '.join(map(str, FORMATS))
            raise ValueError(f'num_bits must be one of {known}, got {self.num_bits!r}')
        if self.axis is not None and not (isinstance(self.axis, int) and self.axis >= 0):
            raise ValueError(f'axis must be None or a number from 0 up, got {self.axis!r}')

    @property
    def format(self) -> Format:
        """The numbers of the grid, in steps."""
        return FORMATS[self.num_bits]


@dataclass(frozen=True)
class Method:
    """How a range is chosen from the statistics of a tensor.

    Attributes:
        name: One of :data:`METHODS`.
        percentile: Share of the absolute values inside the range, in percent; only used by
            the method ``percentile``.
    """

    name: str
    percentile: float = 99.99

    def __post_init__(self) -> None:
        if self.name not in list(METHODS):
            raise _unknown(self.name)
        if not (isinstance(self.percentile, (int, float)) and 0 < self.percentile <= 100):
            raise _no_percentile(self.percentile)

    @classmethod
    def parse(cls, text: str | Method) -> Method:
        """Reads ``'max'``, ``'mse'``, ``'entropy'``, ``'percentile'`` or ``'percentile:99.9'``.

        Spaces around the name and the number do not count.

        Raises:
            ValueError: If the name is unknown or the percentile is not in [1, 100].
        """
        if isinstance(text, Method):
            return text
        if not isinstance(text, str):
            raise _unknown(text)
        name, colon, value = (part.strip() for part in text.partition(':'))
        if name not in METHODS or (colon and name != 'percentile'):
            raise _unknown(text)
        if not colon:
            return cls(name)
        try:
            percentile = float(value)
        except ValueError:
            raise _no_percentile(value) from None
        if not 0 < percentile <= 100:
            raise _no_percentile(value)
        if percentile < 1:
            raise ValueError(
                f'percentile is in percent: {value!r} would clip nearly all; 0.9999 of the '
                'values is percentile:99.99'
            )
        return cls(name, percentile)

    def __str__(self) -> str:
        if self.name != 'percentile':
            return self.name
        text = f'{self.percentile:g}'
        return f'{self.name}:{text if float(text) == self.percentile else repr(self.percentile)}'


def _unknown(text: object) -> ValueError:
    return ValueError(
        f'unknown calibration method {text!r}: expected one of {", ".join(METHODS)}, '
        "or 'percentile:99.9' to choose the percentile"
    )


def _no_percentile(value: object) -> ValueError:
    return ValueError(f'percentile must be a number in (0, 100], got {value!r}')


def check_mode(mode: str) -> str:
    """Checks a mode; returns it.

    Raises:
        ValueError: If it is not one of :data:`MODES`.
    """
    if mode not in MODES:
        raise ValueError(f'unknown mode {mode!r}: expected one of {", ".join(MODES)}')
    return mode


def select(names: Iterable[str], pattern: str) -> list[str]:
    """Selects the names that a pattern matches.

    A pattern (shell wildcards, case-sensitive) names a module and everything inside it:
    ``'layer1.0'`` selects ``layer1.0.conv1`` too, ``'*.conv1'`` every ``conv1``.

    Args:
        names: Dotted module names.
        pattern: The pattern.

    Returns:
        The matching names, in their given order.
    """
    return [n for n in names if fnmatchcase(n, pattern) or fnmatchcase(n, pattern + '.*')]


def select_all(
    names: Collection[str], patterns: Iterable[str], what: str, who: str = ''
) -> list[str]:
    """Selects the names that any of several patterns matches.

    Args:
        names: Dotted module names.
        patterns: See :func:`select`.
        what: What the names are of, for the error.
        who: What takes the patterns, for the error.

    Returns:
        The matching names, each once, in the order of the patterns.

    Raises:
        ValueError: If a pattern matches none.
    """
    chosen: dict[str, None] = {}
    for pattern in patterns:
        found = select(names, pattern)
        if not found:
            place = f'{who}: ' if who else ''
            raise ValueError(
                f'{place}{pattern!r} names no {what}; these are: {", ".join(names) or "none"}'
            )
        chosen.update(dict.fromkeys(found))
    return list(chosen)


def as_bits(formats: str | Mapping[str, str] | tuple[()]) -> dict[str, Bits]:
    """Normalises a ``format`` argument to ``num_bits`` by pattern; ``()`` is none.

    Args:
        formats: The name of a format, for all, or a mapping from pattern to name.

    Raises:
        ValueError: If it is something else, or a name is unknown.
    """
    known = {fmt.name: bits for bits, fmt in FORMATS.items()}
    pairs = {'*': formats} if isinstance(formats, str) else formats or {}
    if not isinstance(pairs, Mapping):
        raise ValueError(f'format expects a name or {{pattern: name}}, got {formats!r}')
    for pattern, name in pairs.items():
        if name not in list(known):
            raise ValueError(
                f'format of {pattern!r} must be one of {", ".join(known)}, got {name!r}'
            )
    return {pattern: known[name] for pattern, name in pairs.items()}


def as_reasons(skip: str | Iterable[str] | Mapping[str, str]) -> dict[str, str]:
    """Normalises a ``skip`` argument to ``{pattern: reason}``.

    Args:
        skip: A pattern, several, or a mapping from pattern to the reason to keep it float.

    Raises:
        ValueError: If it is something else, or a pattern or reason is not a string.
    """
    if isinstance(skip, str):
        skip = [skip]
    if not isinstance(skip, Iterable):
        raise ValueError(f'skip expects a pattern, several, or {{pattern: reason}}, got {skip!r}')
    pairs = skip.items() if isinstance(skip, Mapping) else [(p, f'skip={p!r}') for p in skip]
    for pattern, reason in pairs:
        if not isinstance(pattern, str) or not isinstance(reason, str):
            raise ValueError(f'skip expects strings, got {pattern!r}: {reason!r}')
    return dict(pairs)
