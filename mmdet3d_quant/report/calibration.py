"""A calibration on one page: how well every layer fits its range, worst first."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from mmdet3d_quant.calibration import Band, CalibratedRange, Calibration, Strata
from mmdet3d_quant.calibration.health import (
    LEAST_BITS,
    LEAST_SQNR,
    MOST_CLIPPED,
    MOST_LOST,
    MOST_LOST_CHANNELS,
    MOST_UNSTEADY,
)
from mmdet3d_quant.calibration.histogram import Histogram
from mmdet3d_quant.files.outputs import whole
from mmdet3d_quant.files.plain import finite_or_none
from mmdet3d_quant.improve import Equalization
from mmdet3d_quant.report.svg import to_svg
from mmdet3d_quant.report.template import load

#: Bars of a drawn histogram.
_BARS = 64
#: What each flag means and what to do.
ADVICE = {
    'noisy': f'SQNR below {LEAST_SQNR:g} dB: INT8 tells little of this tensor. Try auto or another '
    'method for this layer, or keep it float (docs/calibration.md tells how).',
    'clipped': f'More than {MOST_CLIPPED:.0%} of the values lie beyond the range. Try max or a '
    'higher percentile.',
    'unsteady': f'The largest value of a batch is more than {MOST_UNSTEADY:g} times that of '
    'another: use more and more varied batches.',
    'constant': 'All values are the same: is the input to this layer what it should be?',
    'dead': 'All values are zero.',
    'lost': f'More than {MOST_LOST:.0%} of the values other than zero round to zero: a few large '
    'ones take the range. Look at the frames that they are in, or try a percentile.',
    'channels': f'More than {MOST_LOST_CHANNELS:.0%} of the channels round to zero as a whole: '
    'their units differ, as in features of points or a depth map. Keep the layer float, or '
    'scale the channels alike.',
    'narrow': f'One input of the add or concat keeps fewer than {LEAST_BITS:g} bits, since '
    'another one is much larger. Inputs of a concat: tools/calibrate.py --equalize-concats scales '
    'them alike and leaves the float model as it is. Else keep the join float.',
}


def write_ranges(
    path: str | Path,
    calibration: Calibration,
    about: Mapping[str, Any],
    strata: Sequence[Strata] = (),
    equalized: Equalization | None = None,
) -> Path:
    """Writes an HTML page that needs no other file, and the JSON behind it.

    Args:
        path: Page to write; the JSON gets the same name with ``.json``.
        calibration: Calibration to show.
        about: Plain facts to show at the end: config, checkpoint, command, versions.
        strata: Fit of the sparse layers by distance, if the model has some.
        equalized: What was done to concats before, if that was asked for.

    Returns:
        ``path``.

    Raises:
        OSError: If one of the files cannot be written.
    """
    path = Path(path)
    facts = range_facts(calibration, about, strata, equalized)
    pictures = dict(sqnr=to_svg(draw_sqnr(facts)))
    if len(calibration.looks) > 1:
        pictures['looks'] = to_svg(draw_looks(facts))
    drawn = _thumbnails(facts['ranges'])
    template = load('calibration.html')
    text = template.render(**facts, pictures=pictures, drawn=drawn, advice=ADVICE)
    with whole(path) as page, whole(path.with_suffix('.json')) as data:
        page.write_text(text, encoding='utf-8')
        data.write_text(json.dumps(facts, indent=1, allow_nan=False) + '\n')
    return path


def range_facts(
    calibration: Calibration,
    about: Mapping[str, Any],
    strata: Sequence[Strata] = (),
    equalized: Equalization | None = None,
) -> dict[str, Any]:
    """Collects all numbers of the page, as plain values that JSON takes.

    Returns:
        ``ranges`` (per quantizer, worst SQNR first), ``flags`` (number of quantizers by flag),
        ``coverage``, ``looks``, ``strata`` (per sparse layer, in the order of the model),
        ``equalized`` (None if not asked for), and the rest of the calibration.
    """
    histograms = calibration.statistics.histograms
    rows = [
        _row(order, entry, histograms[entry.name]) for order, entry in enumerate(calibration.ranges)
    ]
    rows.sort(key=lambda row: math.inf if row['sqnr'] is None else row['sqnr'])
    looks = [
        dict(
            num_batches=k.num_batches, median=finite_or_none(k.median), high=finite_or_none(k.high)
        )
        for k in calibration.looks
    ]
    return dict(
        method=calibration.method,
        num_batches=calibration.num_batches,
        num_weights=calibration.num_weights,
        groups=[list(group) for group in calibration.groups],
        kept_float=dict(calibration.kept_float),
        coverage=calibration.coverage.plain(),
        settled_at=calibration.settled_at,
        flags=dict(Counter(flag for row in rows for flag in row['flags'])),
        looks=looks,
        ranges=rows,
        strata=[dict(name=s.name, amax=s.amax, bands=[_band(b) for b in s.bands]) for s in strata],
        equalized=None if equalized is None else equalized.plain(),
        about=dict(about),
    )


def _band(band: Band) -> dict[str, Any]:
    return dict(
        band=band.band,
        num_voxels=band.num_voxels,
        clipped=finite_or_none(band.clipped),
        sqnr=finite_or_none(band.sqnr),
    )


def _row(order: int, entry: CalibratedRange, histogram: Histogram) -> dict[str, Any]:
    counts, edges = histogram.trimmed()
    width = -(-len(counts) // _BARS)
    padded = np.zeros(-(-len(counts) // width) * width, dtype=np.int64)
    padded[: len(counts)] = counts
    health = entry.health
    return dict(
        name=entry.name,
        order=order,
        amax=entry.amax,
        method=entry.method,
        format=entry.format,
        largest=entry.largest,
        share=entry.amax / entry.largest if entry.largest else None,
        sqnr=finite_or_none(health.sqnr),
        clipped=health.clipped,
        unsteady=finite_or_none(health.unsteady),
        num_elements=entry.num_elements,
        num_tensors=entry.num_tensors,
        group=entry.group,
        largest_in=entry.largest_in,
        lost=health.lost,
        lost_channels=health.lost_channels,
        bits=[round(b, 2) for b in health.bits],
        flags=list(health.flags),
        histogram=dict(
            counts=padded.reshape(-1, width).sum(1).tolist(), bin_width=float(edges[1]) * width
        ),
    )


def draw_sqnr(facts: Mapping[str, Any]) -> Figure:
    """Draws the SQNR of every layer, in the order of the model."""
    rows = sorted(facts['ranges'], key=lambda row: row['order'])
    values = [math.nan if row['sqnr'] is None else row['sqnr'] for row in rows]
    figure = Figure(figsize=(9, 2.4), layout='constrained')
    axes = figure.add_subplot()
    axes.bar(range(len(rows)), values, color=['#c2410c' if r['flags'] else '#0369a1' for r in rows])
    axes.axhline(LEAST_SQNR, color='#c2410c', linewidth=0.8, linestyle='--')
    axes.set(xlabel='quantizer, in the order of the model', ylabel='SQNR, dB')
    axes.margins(x=0.01)
    return figure


def draw_looks(facts: Mapping[str, Any]) -> Figure:
    """Draws the change of the ranges at each doubling of the number of batches."""
    looks = [look for look in facts['looks'] if look['high'] is not None]
    batches = [look['num_batches'] for look in looks]
    figure = Figure(figsize=(9, 2.2), layout='constrained')
    axes = figure.add_subplot()
    for key, label in (('high', '95 % move less'), ('median', 'median')):
        axes.plot(batches, [100 * look[key] for look in looks], 'o-', label=label)
    axes.set_xscale('log', base=2)
    axes.set(xlabel='batches', ylabel='change of the range, %', xticks=batches)
    axes.set_xticklabels(map(str, batches))
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def _thumbnails(rows: list[dict[str, Any]]) -> dict[str, Markup]:
    """Draws small histograms, by name: logarithmic counts, the range as a line."""
    figure = Figure(figsize=(1.5, 0.42))
    axes = figure.add_axes((0, 0, 1, 1))
    drawn = {}
    for row in rows:
        axes.clear()
        axes.set_axis_off()
        counts, width = row['histogram']['counts'], row['histogram']['bin_width']
        edges = np.arange(len(counts) + 1) * width
        axes.stairs(np.log1p(counts), edges, fill=True, color='#0369a1')
        axes.axvline(row['amax'], color='#c2410c', linewidth=1.5)
        axes.set_xlim(0, max(edges[-1], row['amax'] * 1.02))
        drawn[row['name']] = to_svg(figure)
    return drawn
