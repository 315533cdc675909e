"""Write docs/support.md: targets, layers and the types in which they run.

From ``export/targets.py``, what the linter knows of engines, and the result of
``benchmarks/support_matrix.py``. ``python -m pages.support``, that is ``make pages``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmdet3d_quant.check.lint import RULES
from mmdet3d_quant.check.lint.effects import FLOAT, UNSEEN
from mmdet3d_quant.check.lint.profiles import PROFILES
from mmdet3d_quant.check.lint.rules.effects import EFFECTS
from mmdet3d_quant.export.targets import ALIASES, MMDET3D, TARGETS, Target
from mmdet3d_quant.layers.swap import WHY_FLOAT

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULT = ROOT / 'docs/support.md', ROOT / 'docs/support.json'
HEAD = """# Which layer runs in what

`make pages` writes this page from `export/targets.py`, the linter's table of effects, and what
`benchmarks/support_matrix.py` found.

## Targets

"""
TARGET = (
    '`--target`',
    'engine',
    'types outside of Q/DQ',
    'activations',
    'weights in the file',
    'opset',
    'sparse LiDAR file',
    '`build_engines.sh`',
)
LAYERS = """
## Layers

Small nets with the layer in question between two others, quantized by the function of
`type='Quant'`, exported for each target and compiled: files for TensorRT by NVIDIA's compiler
(TensorRT for RTX {compiler}, {sm}; nobody ran the other generations), files for OpenVINO by
OpenVINO {openvino} on a CPU with {instructions}.

*INT8 file*: the file with Q/DQ, *float file*: the one without. Of a convolution or product the cell
tells the type of its numbers, of others the type that they write: a softmax that writes INT8
computes in float. `–`: it is not told as a layer of its own.

"""
OUT = """
## What takes a layer out of INT8

The linter finds these in any file ([lint.md](lint.md)); where an engine was not seen to do it, the
cell says so.

"""
KEPT = """
## What `type='Quant'` does not swap

| layer | why |
|---|---|
"""
TAIL = """
Sparse convolutions are in a file of their own, for libspconv, in INT8 or FP16
([lidar_file.md](lidar_file.md)).
"""


def row(cells: Sequence[str]) -> str:
    """Writes a row of a table."""
    return f'| {" | ".join(cells)} |\n'


def plain(target: Target) -> Target:
    """What of a target decides how the file of a module looks."""
    return replace(target, name='', flags=(), libspconv=False, script=False, boxes=MMDET3D)


def alike(name: str) -> str:
    """Names of the targets that give a module the same file as one does."""
    same = [n for n, t in TARGETS.items() if plain(t) == plain(TARGETS[name])]
    return ', '.join(f'`{n}`' for n in same)


def target_row(target: Target) -> str:
    """Writes what a target's files hold."""
    names = [target.name, *(n for n, t in ALIASES.items() if t == target.name)]
    chosen = 'as the file says: FP16, float32 where FP16 cannot hold it'
    if not target.strong:
        chosen = 'FP16 or float32, as the engine likes' if target.half else 'float32'
    return row([
        ', '.join(f'`{name}`' for name in names),
        PROFILES[target.name].title,
        chosen,
        'INT8, UINT8 where never negative' if target.unsigned else 'INT8',
        'INT8' if target.weights == 'int8' else 'float32 before a Q',
        f'{target.opset}; {target.opsets[0]} to {target.opsets[1]}',
        'yes' if target.libspconv else 'no',
        'yes' if target.script else 'no',
    ])  # fmt: skip


def cell(target: str, types: Sequence[str], product: bool) -> str:
    """Writes the types in which a layer runs, or those that it writes."""
    if not types:
        return '–'
    free = TARGETS[target].half and not TARGETS[target].strong
    told = ', '.join('FP16 or FP32' if free and t == 'FP32' else t for t in types)
    return told if product else f'writes {told}'


def layers(result: dict[str, Any]) -> str:
    """Writes the table of layers, targets and precisions."""
    names = list(next(iter(result['cases'].values())))
    heads = [f'{alike(n)}: {kind} file' for n in names for kind in ('INT8', 'float')]
    text = row(['layer', *heads]) + '|---' * (1 + len(heads)) + '|\n'
    for case, found in result['cases'].items():
        product = case in result['products']
        kinds = [(n, kind) for n in names for kind in ('INT8', 'float')]
        cells = [cell(n, found[n][kind], product) for n, kind in kinds]
        text += row([case, *cells])
    told = dict(result, instructions=', '.join(result['instructions'] or ['nothing known']))
    return LAYERS.format(**told) + text


def outs() -> str:
    """Writes which rules of the linter are of layers that leave INT8, by engine."""
    text = row(['rule', '', *(p.title for p in PROFILES.values())])
    text += '|---' * (2 + len(PROFILES)) + '|\n'
    titles = {rule.id: rule.title for rule in RULES}
    for rule, cases in EFFECTS.items():
        by_engine = []
        for name in PROFILES:
            seen = [e[name] for e in cases.values() if name in e and e[name].what == FLOAT]
            sure = any(effect.seen != UNSEEN for effect in seen)
            by_engine.append('–' if not seen else 'float' if sure else 'float (not seen)')
        if any(told != '–' for told in by_engine):
            text += row([f'[{rule}](lint.md#{rule.lower()})', titles[rule], *by_engine])
    return OUT + text


def page(result: dict[str, Any]) -> str:
    """Writes the page.

    Args:
        result: Of ``benchmarks/support_matrix.py``.

    Returns:
        Markdown.
    """
    text = HEAD + row(TARGET) + '|---' * len(TARGET) + '|\n'
    text += ''.join(target_row(target) for target in TARGETS.values())
    kept = ''.join(row([f'`{name}`', why]) for name, why in WHY_FLOAT.items())
    return text + layers(result) + outs() + KEPT + kept + TAIL


if __name__ == '__main__':
    PAGE.write_text(page(json.loads(RESULT.read_text())))
