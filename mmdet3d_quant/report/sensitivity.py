"""A sensitivity analysis on one page: which layers cost accuracy, and what it costs to undo it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mmdet3d_quant.core.decibels import decibels
from mmdet3d_quant.files.outputs import whole
from mmdet3d_quant.report.svg import to_svg
from mmdet3d_quant.report.template import load

_FRONT, _REST, _CHOSEN = '#c2410c', '#0369a1', '#15803d'


def write_sensitivity(path: str | Path, facts: Mapping[str, Any]) -> Path:
    """Writes an HTML page that needs no other file, and the JSON behind it.

    Args:
        path: Page to write; the JSON gets the same name with ``.json``.
        facts: Of ``jobs.sensitivity``.

    Returns:
        ``path``.

    Raises:
        OSError: If one of the files cannot be written.
    """
    path = Path(path)
    filters = dict(db=_db, sign=_signed, percent=_percent, mega=_mega)
    pictures = dict(units=to_svg(draw_units(facts)))
    if facts['order']:
        pictures['order'] = to_svg(draw_order(facts))
    text = load('sensitivity.html', filters).render(**facts, pictures=pictures)
    with whole(path) as page, whole(path.with_suffix('.json')) as data:
        page.write_text(text, encoding='utf-8')
        data.write_text(json.dumps(facts, indent=1, allow_nan=False) + '\n')
    return path


def draw_units(facts: Mapping[str, Any]) -> Figure:
    """Draws every unit: the time that it adds in float, and the noise that this removes."""
    figure = Figure(figsize=(9, 4), layout='constrained')
    axes = figure.add_subplot()
    whole_time, whole_noise = facts['int8']['seconds'], facts['noise'] or 1.0
    for best, colour, label in ((False, _REST, 'unit'), (True, _FRONT, 'Pareto front')):
        units = [u for u in facts['units'] if u['front'] == best and u['noise'] > 0]
        x = [100 * u['cost']['seconds'] / whole_time for u in units]
        y = [100 * u['noise'] / whole_noise for u in units]
        axes.scatter(x, y, s=18, color=colour, label=label)
        if best:
            order = sorted(range(len(x)), key=lambda i: x[i])
            axes.plot([x[i] for i in order], [y[i] for i in order], color=colour, linewidth=0.8)
            for unit, at, high in zip(units, x, y):
                axes.annotate(unit['name'], (at, high), fontsize=7, xytext=(3, 3),
                              textcoords='offset points')  # fmt: skip
    axes.set_yscale('log')
    axes.set(xlabel='time added by float, % of all INT8', ylabel='noise removed, % of all')
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def draw_order(facts: Mapping[str, Any]) -> Figure:
    """Draws SQNR against time while one unit after the other becomes float."""
    figure = Figure(figsize=(9, 3), layout='constrained')
    axes = figure.add_subplot()
    first = facts['int8']['seconds']
    points = [(first, facts['noise']), *((s['seconds'], s['noise']) for s in facts['order'])]
    points = [(100 * (t / first - 1), decibels(1, noise)) for t, noise in points if noise > 0]
    axes.plot(*zip(*points), 'o-', color=_REST, markersize=3)
    mixed = facts['mixed']
    if mixed is not None and mixed['units']:
        at = 100 * (mixed['total']['seconds'] / first - 1)
        axes.axvline(at, color=_CHOSEN, label='the written config')
        axes.legend()
    axes.set(xlabel='time added, % of all INT8', ylabel='predicted SQNR, dB')
    axes.grid(alpha=0.3)
    return figure


def _db(noise: float | None) -> str:
    return '' if not noise else f'{decibels(1, noise):.1f}'


def _signed(value: float | None, digits: int = 2) -> str:
    return '' if value is None else f'{value:+.{digits}f}'


def _percent(value: float, digits: int = 1) -> str:
    return f'{100 * value:.{digits}f}'


def _mega(value: float) -> str:
    return f'{value / 1e6:+.2f}'
