#!/usr/bin/env python
"""Cost of INT8 in the tiny detectors: simulated, in files that an engine runs, and after QAT.

Rows of a detector: the float model; with pillars, INT8 calibrated without `--empty-cells` and bias
correction; INT8 as its config says, simulated by torch; its ONNX files in OpenVINO; both again
after the training of its QAT config. Where it has cameras also the float model with the images of
other frames, which tells what the cameras are worth. Every row is mAP and NDS on the validation
scenes with the 95 % interval of its difference to float (bootstrap over layouts).

Example:
    python benchmarks/accuracy_detectors.py --only pointpillars_tiny centerpoint_tiny

What a former run made or measured is read from the folder; remove the folder to begin anew.
NAME_results.json is for the page of results: `python -m pages.results --add NAME FILE`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from accuracy_ladder import ROOT, compared, measured, tell
from accuracy_sensors import strangers
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import track
from torch import nn

import mmdet3d_quant as mq
from mmdet3d_quant.check.detector import engine_detector
from mmdet3d_quant.data.evaluation import Scorer, Scores, predict
from mmdet3d_quant.engines import make_engine
from mmdet3d_quant.files.checkpoint import latest
from mmdet3d_quant.files.outputs import sha256, whole
from mmdet3d_quant.report import facts
from mmdet3d_quant.runs import from_config as fc

#: Detector -> folder of its configs.
DETECTORS = {
    'pointpillars_tiny': 'pointpillars_tiny',
    'centerpoint_tiny': 'centerpoint_tiny',
    'bevfusion_tiny_lidar-cam_swin': 'bevfusion_tiny',
}
#: Detectors with pillars, calibrated with these options; a row has them without.
PILLARS = ('pointpillars_tiny', 'centerpoint_tiny')
OPTIONS = ('--empty-cells', '--bias-correction', '*')
PLAIN = 'INT8 without --empty-cells'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--only', nargs='+', choices=DETECTORS, default=DETECTORS, metavar='NAME',
        help=', '.join(DETECTORS))  # fmt: skip
    add('--out', type=Path, default=Path('work_dirs/detectors'))
    add('--calib-batches', type=int, default=8, help='of the calib_dataloader')
    add('--no-qat', action='store_true', help='leave the training and its rows out')
    add('--threads', type=int, default=1, help='of the engine; default: %(default)s')
    return parser.parse_args()


def tool(name: str, *args: object) -> None:
    """Runs a tool of the project; stops if it fails."""
    done = subprocess.run([sys.executable, str(ROOT / 'tools' / name), *map(str, args)])
    if done.returncode:
        sys.exit(f'error: tools/{name} failed')


class Detector:
    """A tiny detector: its configs, and what is made of its float weights.

    Args:
        name: Key of :data:`DETECTORS`.
        args: Options of the script.
    """

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name, self.args = name, args
        self.out = args.out / name
        self.float = ROOT / 'checkpoints' / f'{name}_synthetic.pth'
        self.int8_config = self.config('int8')
        self.cfg = fc.read_config(self.int8_config)
        init_default_scope('mmdet3d')
        self.loader = Runner.build_dataloader(self.cfg.val_dataloader, seed=0)
        self.scorer = Scorer(self.cfg.val_evaluator, self.loader.dataset.metainfo)
        self.out.mkdir(parents=True, exist_ok=True)

    def config(self, kind: str) -> Path:
        """Path of the config of a kind, ``'int8'`` or ``'qat'``."""
        return ROOT / 'configs' / DETECTORS[self.name] / f'{self.name}_{kind}_synthetic.py'

    def calibrated(self) -> Path:
        """Calibrates; the QAT config names the checkpoint that it starts from."""
        path = Path(fc.read_config(self.config('qat')).load_from)
        return self.calibrate(path, *(OPTIONS if self.name in PILLARS else ()))

    def calibrate(self, path: Path, *options: str) -> Path:
        """Calibrates into a file, unless it is there."""
        if not path.is_file():
            batches = ('--num-batches', self.args.calib_batches)
            tool('calibrate.py', self.int8_config, self.float, '--out', path, *batches, *options)
        return path

    def trained(self) -> Path:
        """Trains the calibrated model on as the QAT config says."""
        self.calibrated()
        folder = self.out / 'qat'
        if latest(str(folder)) is None:
            tool('train.py', self.config('qat'), '--work-dir', folder, '--amp')
        return Path(latest(str(folder)) or sys.exit(f'error: no checkpoint in {folder}'))

    def model(self, checkpoint: Path, calibrated: bool = True) -> nn.Module:
        """The INT8 model with weights; in float mode without ranges."""
        model = fc.build_model(self.cfg)
        fc.load_weights(model, checkpoint, calibrated=calibrated)
        mq.set_mode(model, 'quant' if calibrated else 'float')
        return model

    def engines(self, checkpoint: Path) -> nn.Module:
        """The model with OpenVINO in the place of the layers that are in files."""
        folder = self.out / f'onnx_{checkpoint.stem}'
        if not (folder / 'manifest.json').is_file():
            arguments = (self.int8_config, checkpoint, '--out-dir', folder, '--no-verify')
            tool('export_onnx.py', *arguments)

        def engine(path: str | Path) -> object:
            return make_engine('openvino', path, self.args.threads)

        return engine_detector(self.model(checkpoint), folder, engine)

    def score(self, row: str, make: Callable[[], nn.Module], blind: bool = False) -> Scores:
        """Scores a row, or reads it from the folder if the weights are the same."""

        def run() -> Scores:
            batches = track(self.loader, f'  {self.name}, {row}')
            return self.scorer.score(predict(make(), strangers(batches) if blind else batches))

        key = dict(setting=row, checkpoint=sha256(self.float), batches=self.args.calib_batches)
        return measured(self.out, key, run)

    def rows(self) -> dict[str, Scores]:
        """All rows by name."""

        def as_float() -> nn.Module:
            return self.model(self.float, calibrated=False)

        found = {'float': self.score('float', as_float)}
        if self.cfg.val_dataloader.dataset.modality['use_camera']:
            row = 'float, images of other frames'
            found[row] = self.score(row, as_float, blind=True)
        if self.name in PILLARS:
            found[PLAIN] = self.score(
                PLAIN, lambda: self.model(self.calibrate(self.out / 'without.pth'))
            )
        starts = dict(INT8=self.calibrated)
        if not self.args.no_qat:
            starts['QAT'] = self.trained
        for row, start in starts.items():
            checkpoint = start()
            found[row] = self.score(row, lambda c=checkpoint: self.model(c))
            files = f'{row}, files in OpenVINO'
            found[files] = self.score(files, lambda c=checkpoint: self.engines(c))
        return found


def write_results(detector: Detector, rows: dict[str, Scores]) -> None:
    """Writes scores, differences, and where they come from, as a report of the demo has them."""
    provenance = facts.provenance_facts(
        detector.cfg, detector.float, shlex.join(['python', *sys.argv])
    )
    provenance['config'] = str(detector.int8_config.relative_to(ROOT))
    told = dict(
        scores={name: facts.score_facts(scores) for name, scores in rows.items()},
        data=facts.data_facts(rows['float']),
        differences=facts.difference_facts(rows),
        provenance=provenance,
    )
    with whole(detector.args.out / f'{detector.name}_results.json') as part:
        part.write_text(json.dumps(told, indent=1))


def main() -> None:
    args = parse_args()
    console = Console()
    for name in args.only:
        console.print(f'[bold]{name}')
        detector = Detector(name, args)
        rows = detector.rows()
        tell(compared(rows), args.out, name, console)
        write_results(detector, rows)


if __name__ == '__main__':
    main()
