"""Reads the times of QAT: when batch norm freezes, and the modes of quantizers by time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Modes of training, which observes no ranges.
_MODES = ('float', 'quant')


def read_time(value: Any, what: str) -> int:
    """Reads an epoch or iteration; files in JSON have them as text.

    Raises:
        ValueError: If it is no whole number from 0 up; names ``what``.
    """
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole and not (isinstance(value, str) and value.isdecimal()):
        raise ValueError(f'QATHook: {what} must be a whole number from 0 up, got {value!r}')
    if int(value) < 0:
        raise ValueError(f'QATHook: {what} must be a whole number from 0 up, got {value!r}')
    return int(value)


def read_schedule(schedule: Any) -> dict[int, dict[str, str]]:
    """Reads modes by time and name pattern.

    Returns:
        Dict from time to a dict from pattern to ``'float'`` or ``'quant'``.

    Raises:
        ValueError: If the schedule is something else, or has a time twice.
    """
    result: dict[int, dict[str, str]] = {}
    for key, modes in _items(schedule, 'schedule'):
        time = read_time(key, 'a time of the schedule')
        if time in result:
            raise ValueError(f'QATHook: the schedule has the time {time} twice')
        result[time] = dict(_items(modes, f'schedule[{time}]'))
        for pattern, mode in result[time].items():
            if not isinstance(pattern, str):
                raise ValueError(f'QATHook: schedule pattern {pattern!r} is no text')
            if mode not in _MODES:
                raise ValueError(
                    f"QATHook: schedule gives {pattern!r} the mode {mode!r}; expected 'float' "
                    "or 'quant' (ranges come from tools/calibrate.py, training observes none)"
                )
    return result


def _items(value: Any, what: str) -> Any:
    """The items of a dict; of None, none."""
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(
            f"QATHook: {what} must be a dict such as {{0: {{'*': 'float'}}}}, got {value!r}"
        )
    return (value or {}).items()
