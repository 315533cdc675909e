"""The table of docs/detectors.md from docs/detectors.json."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdet3d_quant.files.outputs import whole

BEGIN, END = '<!-- table of models: begin -->', '<!-- table of models: end -->'
HEADINGS = (
    'model', 'layers', 'share', 'without deformable', 'float mode', 'reloaded',
    'worst layer, ONNX Runtime', 'worst layer, OpenVINO', 'lint', 'NVIDIA\'s compiler',
)  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    """The cells of one model, in the order of :data:`HEADINGS`."""
    if 'error' in row:
        return [row['model'], f'**{row["error"]}**', *[''] * (len(HEADINGS) - 2)]
    return [
        row['model'],
        f'{row["quantized"]}/{row["layers"]}',
        _percent(row['share']),
        _percent(row['share_without_deformable']),
        'equal' if row['float_equal'] else '**differs**',
        'equal' if row['reload_equal'] else '**differs**',
        *(_worst(row['files'], engine) for engine in ('onnxruntime', 'openvino')),
        _lint(row['files']),
        _compiler(row['files']),
    ]


def _percent(share: float) -> str:
    text = f'{100 * share:.1f} %'
    return text if share == 1 or not text.startswith('100') else '> 99.9 %'


def _worst(files: Sequence[dict[str, Any]], engine: str) -> str:
    found = [file['engines'][engine] for file in files]
    worst = min(f['worst_db'] for f in found)
    below = sum(f['below'] for f in found)
    text = f'{worst:.1f} dB'
    return f'**{text}**, {below} below' if below else text


def _lint(files: Sequence[dict[str, Any]]) -> str:
    rules: Counter[str] = Counter()
    for file in files:
        rules.update(file['lint'])
    return ', '.join(f'{rule} {count}' for rule, count in sorted(rules.items())) or 'clean'


def _compiler(files: Sequence[dict[str, Any]]) -> str:
    told = []
    for file in files:
        verdict = file.get('compiler')
        if verdict is None:
            return '-'
        plugins = ' around the plugins' if verdict['around_plugins'] else ''
        if not verdict['accepted']:
            told.append(f'**refused**: {verdict["error"]}')
        else:
            told.append(f'{verdict["int8"]}/{verdict["products"]} INT8{plugins}')
    return '; '.join(told)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table, between its marks."""
    lines = [HEADINGS, ['---'] * len(HEADINGS), *map(cells, rows)]
    table = '\n'.join(f'| {" | ".join(line)} |' for line in lines)
    return f'{BEGIN}\n{table}\n{END}'


def write_page(rows: Sequence[dict[str, Any]], page: Path) -> None:
    """Puts the table into a page, between its marks."""
    text = page.read_text()
    before, _, rest = text.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f'{page} lacks the lines {BEGIN} and {END}, between which the table goes')
    with whole(page) as part:
        Path(part).write_text(before + markdown(rows) + after)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; none if there is no file."""
    return json.loads(path.read_text()) if path.is_file() else []


def write_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes the rows of all models."""
    with whole(path) as part:
        Path(part).write_text(json.dumps(rows, indent=1) + '\n')
