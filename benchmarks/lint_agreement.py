#!/usr/bin/env python
"""The linter against NVIDIA's compiler: planted defects, graphs without, and random ones.

Every defect of `tests/check/planted.py` and its clean twin, two widths, typed float32 and FP16, and
`--seeds` graphs of `tests/check/generated.py`. Needs TensorRT for RTX, no GPU (docs/compiler.md);
about 10 minutes. With `--out docs/lint_agreement.json`, `python tools/lint_rules.py --out
docs/lint.md` puts the result on the page of the rules.

Example:
    python benchmarks/lint_agreement.py --seeds 400
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from mmdet3d_quant.check.compiled import TARGET  # noqa: E402
from mmdet3d_quant.check.lint import RULES  # noqa: E402
from mmdet3d_quant.check.lint.rules.effects import EFFECTS  # noqa: E402
from mmdet3d_quant.engines.tensorrt_rtx.compiler import check_installed  # noqa: E402
from tests.check.agreement import SM, SM_FP8, costs, grow, judge, kinds, plant  # noqa: E402
from tests.check.planted import PLANTED  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--seeds', type=int, default=400, help='random graphs; default: 400')
    parser.add_argument('--out', type=Path, help='write the result here, as JSON')
    args = parser.parse_args()
    check_installed()
    with tempfile.TemporaryDirectory() as folder:
        result = study(Path(folder) / 'graph.onnx', args.seeds)
    Console(width=100).print(as_table(result))
    for line in result['disagreements']:
        print(f'{line["graph"]}: {line["what"]}')
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + '\n')


def study(path: Path, seeds: int) -> dict[str, Any]:
    """Judges all graphs, and counts per rule."""
    rules: dict[str, Counter[str]] = defaultdict(Counter)
    totals: Counter[str] = Counter()
    disagreements: list[dict[str, Any]] = []
    version = ''

    def count(name, outcome, rule, clean):
        nonlocal version
        version = outcome.version or version
        totals.update(graphs=1, accepted=outcome.accepted, clean=clean)
        totals.update(layers=outcome.layers[0], int8=outcome.layers[1])
        for told in outcome.told:
            disagreements.append(dict(graph=name, rule=rule, what=told))

    jobs = [(name, *kind) for name in PLANTED for kind in kinds(name)]
    for name, channels, half in track(jobs, description='planted'):
        case = PLANTED[name]
        label = f'{name}, {channels} channels, {"FP16" if half else "float32"}'
        wrong, clean = (judge(plant(name, w, channels, half), path) for w in (True, False))
        effect = (
            EFFECTS[case.rule][case.case][TARGET].what
            if (TARGET in EFFECTS[case.rule][case.case])
            else ''
        )
        count(label, wrong, case.rule, False)
        count(f'{label}, clean', clean, case.rule, True)
        rules[case.rule].update(planted=1, found=case.rule in wrong.rules, agree=not wrong.told)
        rules[case.rule].update(
            twins=1, silent=clean.rules <= set(case.also), twins_agree=not clean.told
        )
        as_said = costs(wrong, clean, effect) if case.twin else None
        if as_said is not None:
            rules[case.rule].update(costs=1, costs_agree=as_said)
            if not as_said:
                told = (
                    f'{effect} for the linter; {clean.cost} kernels and bytes become {wrong.cost}'
                )
                disagreements.append(dict(graph=label, rule=case.rule, what=told))
    for seed in track(range(seeds), description='random'):
        outcome = judge(grow(seed), path)
        count(f'random {seed}', outcome, '', False)
        totals.update(random=1, random_agree=not outcome.told)
        for rule in outcome.rules:
            rules[rule].update(random=1, random_agree=not outcome.told)
    return dict(
        compiler=version,
        sm=f'{SM}, with FP8 {SM_FP8}',
        totals=dict(totals),
        rules={rule.id: dict(rules[rule.id]) for rule in RULES},
        disagreements=disagreements,
    )


def as_table(result: dict[str, Any]) -> Table:
    """The shares that agree, per rule."""
    totals = result['totals']
    table = Table(
        'rule', 'found', 'clean ones silent', 'verdict and layers agree', 'costs agree', 'random',
        title='{graphs} graphs, {layers} layers, {int8} in INT8'.format(**totals),
    )  # fmt: skip
    for id, found in result['rules'].items():
        count: Counter[str] = Counter(found)
        agree, twins = count['agree'] + count['twins_agree'], count['planted'] + count['twins']
        table.add_row(
            id,
            f'{count["found"]} of {count["planted"]}',
            f'{count["silent"]} of {count["twins"]}',
            f'{agree} of {twins}',
            f'{count["costs_agree"]} of {count["costs"]}',
            f'{count["random_agree"]} of {count["random"]}',
        )
    return table


if __name__ == '__main__':
    main()
