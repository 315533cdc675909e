"""Rendering of numbers and pictures to one HTML file that needs no other."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.files.outputs import whole_folder
from mmdet3d_quant.report.pictures import draw_ap, save
from mmdet3d_quant.report.template import load

#: Order and kind of the headline scores: a score is better when higher, an error when lower.
HEADLINES = ('mAP', 'NDS', 'mATE', 'mASE', 'mAOE', 'mAVE', 'mAAE')
#: An interval drawn from fewer groups of frames than this is no guide.
_FEWEST = 10
_FACTS = (
    ('scores', 'data', 'differences', 'latency', 'engine', 'int8_convolutions', 'sizes')
    + ('weights', 'calibration', 'seconds', 'provenance')
)  # fmt: skip


def write_report(
    folder: str | Path, facts: Mapping[str, Any], pictures: Mapping[str, Figure] | None = None
) -> Path:
    """Writes ``report.html``, ``report.json`` and every picture as PNG; all of them or none.

    Args:
        folder: Folder to write to; earlier pictures of frames in it are removed.
        facts: The numbers, of ``report.facts``. ``title``, and any of ``scores`` (per model; the
            float one first), ``data``, ``differences``, ``latency`` (seconds per file and
            precision), ``engine`` (how the latency was measured), ``int8_convolutions``, ``sizes``
            (bytes per file and precision), ``weights``, ``calibration``, ``provenance`` and
            ``seconds`` (per step). What is missing is left out.
        pictures: Figures by caption.

    Returns:
        Path of ``report.html``.

    Raises:
        OSError: If the folder cannot be written to.
    """
    folder = Path(folder)
    drawn = {f'frame_{i}': figure for i, figure in enumerate((pictures or {}).values(), 1)}
    captions = dict(strict_zip(drawn, pictures or {}))
    if facts.get('scores'):
        drawn['ap'] = draw_ap({name: s['ap'] for name, s in facts['scores'].items()})
    with whole_folder(folder) as part:
        images = {}
        for name, figure in drawn.items():
            buffer = io.BytesIO()
            save(figure, buffer)
            (part / f'{name}.png').write_bytes(buffer.getvalue())
            images[name] = buffer.getvalue()
        (part / 'report.json').write_text(json.dumps(facts, indent=2, allow_nan=False) + '\n')
        (part / 'report.html').write_text(render(facts, images, captions), encoding='utf-8')
    for path in folder.glob('frame_*.png'):
        if path.stem not in drawn:
            path.unlink()
    return folder / 'report.html'


def render(
    facts: Mapping[str, Any],
    images: Mapping[str, bytes] | None = None,
    captions: Mapping[str, str] | None = None,
) -> str:
    """Renders the page.

    Args:
        facts: As :func:`write_report` takes them.
        images: PNG files by name: ``ap`` and those of ``captions``.
        captions: Captions of frames, by the names of their images.

    Returns:
        HTML with the images inside.
    """
    filters = dict(percent=_percent, points=_points, ms=_milliseconds, mb=_megabytes, url=_data_url)
    known = dict(headlines=HEADLINES, verdict=verdict, total=_total, times=_times)
    template = load('page.html', filters, **known)
    empty = dict.fromkeys(_FACTS)
    return template.render({**empty, **facts}, images=images or {}, captions=captions or {})


def verdict(name: str, difference: Mapping[str, Any]) -> str:
    """Says in words what a difference in mAP and its interval mean.

    Args:
        name: The model that is compared with the float one.
        difference: Entry of ``facts.difference_facts``; mAP from 0 to 1.
    """
    low, high, count = difference['low'], difference['high'], difference['scenery']
    said = f'{name}: mAP changes by {_points(difference["difference"])} points. '
    if count < _FEWEST:
        return said + f'{count} sceneries are too few to tell that from luck.'
    said += (
        f'On validation sets resampled from the {count} sceneries here, 95 % of the changes lie '
        f'between {_points(low)} and {_points(high)}: '
    )
    if low <= 0 <= high:
        return said + 'zero is among them, so the change may be luck.'
    return said + f'all {"below" if high < 0 else "above"} zero, so it is not luck of the scenery.'


def _total(table: Mapping[str, Mapping[str, float]], column: str) -> float:
    return sum(row[column] for row in table.values())


def _times(slow: float, fast: float) -> str:
    return f'{slow / fast:.2f}x' if fast else ''


def _percent(value: float | None) -> str:
    return '–' if value is None else f'{100 * value:.2f}'


def _points(value: float | None) -> str:
    """Formats a difference in percentage points, signed; a true minus and no minus zero."""
    text = f'{100 * (value or 0):+.2f}'
    return text.replace('-0.00', '+0.00').replace('+0.00', '0.00').replace('-', '−')


def _milliseconds(value: float) -> str:
    return f'{1e3 * value:.1f}'


def _megabytes(value: float) -> str:
    return f'{value / 1e6:.2f}'


def _data_url(png: bytes) -> str:
    return 'data:image/png;base64,' + base64.b64encode(png).decode()
