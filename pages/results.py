"""Write docs/results.md: what INT8 costs each detector, from the files that scripts left.

``python -m pages.results``, that is ``make pages``, reads ``docs/results`` and the metafiles.
``python -m pages.results --add NAME REPORT`` takes a new file into that folder: a ``report.json``
of ``tools/demo.py``, or a ``NAME_results.json`` of ``benchmarks/accuracy_detectors.py``.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from mmengine.fileio import load

ROOT = Path(__file__).resolve().parents[1]
PAGE, FOLDER = ROOT / 'docs/results.md', ROOT / 'docs/results'
#: What of a report is kept.
KEPT = ('scores', 'data', 'differences', 'latency', 'sizes', 'provenance')
#: What a row is, by the end of its name.
KINDS = {
    'float': 'the model as it was trained',
    'INT8 without --empty-cells': 'PTQ, simulated, without `--empty-cells --bias-correction`',
    'INT8': 'PTQ, simulated in torch',
    'INT8 simulated': 'PTQ, simulated in torch',
    'INT8, files in OpenVINO': 'deployed: PTQ, the exported files',
    'INT8 files': 'deployed: PTQ, the exported files',
    'QAT': 'QAT, simulated in torch',
    'QAT, files in OpenVINO': 'deployed: QAT, the exported files',
}
HEAD = """# Results

`make pages` writes this page from the files of `docs/results/`, each written by a script on the
version that stands with it, and from the metafiles of `configs/`. Scores are those of mmdet3d's
`NuScenesMetric`, on generated nuScenes ([what that proves](accuracy.md)). The interval is where
95 % of the differences to float fall when layouts of frames are drawn again.
"""
TAIL = """
## What is not here

A number is on this page only if the file of its script is in the checkout. So the scores by sensor,
method and number of bits, BEVFusion with Swin and the rows after QAT are in
[accuracy.md](accuracy.md) and [qat.md](qat.md), with the scripts that measured them. What each step
of a calibration buys back, also of models for near objects: [recipes.md](recipes.md). Beside
Model-Optimizer and NNCF: [peers.md](peers.md). Published models, by layer and without trained
weights: [detectors.md](detectors.md). Nothing here was measured on nuScenes itself, nor on an Orin
or in TensorRT.
"""


def row(*cells: object) -> str:
    """Writes a row of a table."""
    return f'| {" | ".join(map(str, cells))} |\n'


def table(*heads: str) -> str:
    """Writes the head of a table."""
    return row(*heads) + '|---' * len(heads) + '|\n'


def kind(name: str) -> str:
    """Says what a row of a report is.

    Raises:
        ValueError: If it is of no kind that the page knows.
    """
    if name not in KINDS:
        raise ValueError(
            f'a report has the row {name!r}: say in KINDS of pages/results.py what it is'
        )
    return KINDS[name]


def scores(report: dict[str, Any]) -> str:
    """Writes the scores of a detector: float, PTQ, QAT, deployed."""
    text = table('', 'mAP', 'NDS', 'mAP − float, points', '95 % interval')
    for name, told in report['scores'].items():
        apart = report['differences'].get(name)
        change, interval = '', ''
        if apart:
            change = f'{100 * apart["difference"]:+.2f}'
            interval = f'{100 * apart["low"]:+.2f} to {100 * apart["high"]:+.2f}'
        points = [cell.replace('-', '−') for cell in (change, interval)]
        text += row(kind(name), f'{told["mAP"]:.4f}', f'{told["NDS"]:.4f}', *points)
    return text


def speed(report: dict[str, Any]) -> str:
    """Writes milliseconds and megabytes of the files, float and INT8; empty without them."""
    if 'latency' not in report:
        return ''
    text = '\n' + table('file', 'float, ms', 'INT8, ms', 'float, MB', 'INT8, MB')
    for name, times in report['latency'].items():
        sizes = report['sizes'][name]
        told = [f'{1e3 * times[p]:.1f}' for p in ('float', 'int8')]
        text += row(f'`{name}`', *told, *(f'{sizes[p] / 1e6:.2f}' for p in ('float', 'int8')))
    return text


def provenance(report: dict[str, Any]) -> str:
    """Writes where the numbers of a detector come from."""
    of, data = report['provenance'], report['data']
    machine, versions = of['machine'], of['versions']
    engine = f'mmdet3d-quant {versions["mmdet3d_quant"]}, OpenVINO {versions["openvino"]}'
    cpu = f'{machine["processor"]}, {machine["cores"]} cores'
    cpu += f' ({", ".join(machine["int8_instructions"]) or "no VNNI"})'
    return (
        f'\n{data["frames"]} frames of {data["scenery"]} layouts. {engine}, '
        f'torch {versions["torch"]}, mmdet3d {versions["mmdet3d"]}; {cpu}.\n\n'
        f'`{of["command"]}` with `{of["config"]}` and `{of["checkpoint"]["name"]}` (SHA-256 '
        f'{of["checkpoint"]["sha256"][:12]}...).\n'
    )


def weights() -> str:
    """Writes the trained float models of the metafiles."""
    text = '\n## Float models\n\n' + table('model', 'sensors', 'mAP', 'NDS', 'weights')
    index = load(ROOT / 'model-index.yml')['Import']
    for file in index:
        for model in load(ROOT / file)['Models']:
            if 'Weights' in model:
                (result,) = model['Results']
                told = [f'{result["Metrics"][key]:.1f}' for key in ('mAP', 'NDS')]
                path = f'`{model["Weights"]}`'
                text += row(model['Name'], model['Metadata'].get('Sensors', ''), *told, path)
    return text + '\nHow they were trained: [trained weights](../checkpoints/README.md).\n'


def page(reports: dict[str, dict[str, Any]]) -> str:
    """Writes the page.

    Args:
        reports: By name of the detector.

    Returns:
        Markdown.

    Raises:
        ValueError: If a report has a row that the page does not know.
    """
    text = HEAD
    for name, report in reports.items():
        text += f'\n## {name}\n\n'
        text += scores(report) + speed(report) + provenance(report)
    return text + weights() + TAIL


def read() -> dict[str, dict[str, Any]]:
    """Reads the files of docs/results/ by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob('*.json'))}


def add(name: str, report: Path) -> None:
    """Takes what the page shows of a report into docs/results/."""
    told = json.loads(report.read_text())
    kept = {key: told[key] for key in KEPT if key in told}
    for of in kept['scores'].values():
        of.pop('ap', None)
    of = kept['provenance']  # the folder of this machine is of no use to others
    of['command'] = re.sub(r' --work-dir \S+', '', of['command'])
    (FOLDER / f'{name}.json').write_text(json.dumps(kept, indent=1) + '\n')


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description='Write docs/results.md.')
    parser.add_argument('--add', nargs=2, metavar=('NAME', 'REPORT'), help='a file to take in')
    args = parser.parse_args(argv)
    if args.add:
        add(args.add[0], Path(args.add[1]))
    PAGE.write_text(page(read()))


if __name__ == '__main__':
    main()
