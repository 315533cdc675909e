"""Steps of tools/demo.py, and the results that they pass on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import calibrate
import export_onnx
import make_synthetic_nuscenes
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.runner import Runner
from rich.progress import track
from terminal import Steps
from torch import nn

from mmdet3d_quant.check.speed import file_sizes, measure_speed
from mmdet3d_quant.data.boxes import load_boxes, save_boxes
from mmdet3d_quant.data.evaluation import Scorer, Scores, predict
from mmdet3d_quant.export import capture_inputs
from mmdet3d_quant.files.once import digest
from mmdet3d_quant.files.outputs import sha256, whole
from mmdet3d_quant.report import facts, write_report
from mmdet3d_quant.report.pictures import draw_frames
from mmdet3d_quant.runs import from_config as fc
from mmdet3d_quant.runs.paths import replace_start

ROOT = Path(__file__).resolve().parents[1]


class Demo:
    """A method per step, to be called in their order; each leaves what the next ones need.

    Args:
        config: INT8 config of a detector on the synthetic nuScenes.
        checkpoint: Its float weights.
        work_dir: Folder for all results.
        steps: Announces the steps, and reuses what an earlier run made.
    """

    def __init__(self, config: Path, checkpoint: str, work_dir: str, steps: Steps) -> None:
        self.given, self.checkpoint = config, checkpoint
        self.steps, self.console = steps, steps.console
        self.work = Path(work_dir)
        self.int8 = self.work / 'int8.pth'
        self.folders = {name: self.work / 'onnx' / name for name in ('float', 'int8')}
        self.key: dict[str, Any] = {}  # what decided everything so far
        self.results: dict[str, list] = {}
        self.scores: dict[str, Scores] = {}

    def load(self, command: str) -> None:
        """Builds the model with its float weights; the command line is for the report."""
        cfg = fc.read_config(self.given)
        self.model = fc.build_model(cfg)
        fc.load_weights(self.model, self.checkpoint, calibrated=False)
        self.source = facts.provenance_facts(cfg, self.checkpoint, command)
        self.source['config'] = str(self.given.relative_to(ROOT))
        checkpoint = self.source['checkpoint']
        self.console.print(f'{self.checkpoint}, SHA-256 {checkpoint["sha256"][:16]}...')
        self.key.update(checkpoint=checkpoint['sha256'], versions=self.source['versions'])
        self.key['code'] = digest([ROOT / 'mmdet3d_quant', ROOT / 'tools'])

    def make_data(self, train_samples: int, val_samples: int) -> None:
        """Generates the frames, and opens the validation set."""
        root = (self.work / 'nuscenes').resolve()
        command = ['--out', str(root), '--samples', str(train_samples), '--overwrite']
        command += ['--val-samples', str(val_samples)]
        data = dict(command=command, code=digest([ROOT / 'mmdet3d_quant/synthetic']))

        def make() -> None:
            for left in root.glob('.part-*'):  # of a run that was killed
                shutil.rmtree(left)
            make_synthetic_nuscenes.main(command)

        self.steps.once(root, data, make)
        cfg = fc.read_config(self.given)
        self.config = self.work / 'config.py'
        Config(replace_start(cfg.to_dict(), cfg.data_root, f'{root}/')).dump(self.config)
        self.cfg = fc.read_config(self.config)
        self.key.update(data=data, config=self.cfg.pretty_text)
        self.loader = Runner.build_dataloader(self.cfg.val_dataloader, seed=0)
        metainfo = self.cfg.val_dataloader.dataset.metainfo
        self.scorer = Scorer(self.cfg.val_evaluator.to_dict(), metainfo)

    def score(self, name: str, model: Callable[[], nn.Module]) -> None:
        """Scores a model on the validation frames."""
        path = self.work / f'boxes_{name.replace(" ", "_").lower()}.pth'

        def make() -> None:
            batches = track(self.loader, name, total=len(self.loader), console=self.console)
            save_boxes(predict(model(), batches), path)

        self.steps.once(path, {**self.key, 'model': name}, make)
        self.results[name] = load_boxes(path)
        scores = self.scores[name] = self.scorer.score(self.results[name])
        self.console.print(f'{name}: mAP {scores.mAP:.4f}, NDS {scores.NDS:.4f}')

    def calibrate(self, method: str) -> None:
        """Runs tools/calibrate.py on the training frames."""
        command = [str(self.config), self.checkpoint, '--out', str(self.int8), '--method', method]
        self.key['method'] = method
        self.steps.once(self.int8, self.key, lambda: calibrate.main(command))
        self.meta = fc.load_weights(self.model, self.int8, calibrated=True)
        self.key['int8'] = sha256(self.int8)

    def export(self) -> None:
        """Runs tools/export_onnx.py, float and INT8."""
        for name, folder in self.folders.items():
            command = [str(self.config), str(self.int8), '--out-dir', str(folder)]
            command += ['--float', '--no-verify', '--no-compile'] if name == 'float' else []
            key = {**self.key, 'precision': name}
            self.steps.once(folder, key, lambda c=command: export_onnx.main(c))

    def time_files(self) -> None:
        """Measures float and INT8 files on the first validation frame."""
        self.speed = self.work / 'speed.json'
        key = {**self.key, 'machine': self.source['machine']}

        def make() -> None:
            batch = pseudo_collate([self.loader.dataset[0]])
            with torch.no_grad():
                inputs = capture_inputs(self.model, batch)
            with whole(self.speed) as part:
                part.write_text(json.dumps(measure_speed(inputs, self.folders), indent=1))

        self.steps.once(self.speed, key, make)

    def report(
        self, drawn: Sequence[str], num_pictures: int, score_thr: float
    ) -> tuple[dict[str, Any], Path]:
        """Writes the report, with the boxes of some models; returns its numbers and its path."""
        first = next(iter(self.scores.values()))
        told = dict(
            title='BEVFusion in INT8: tiny model, synthetic nuScenes',
            scores={name: facts.score_facts(s) for name, s in self.scores.items()},
            data=facts.data_facts(first),
            differences=facts.difference_facts(self.scores),
            **json.loads(self.speed.read_text()),
            sizes=file_sizes(self.folders),
            weights=facts.weight_bytes(self.model),
            calibration=facts.calibration_facts(
                self.model, self.meta['calibration'], self.meta.get('macs')
            ),
            provenance=self.source,
            seconds=dict(self.steps.seconds),
        )
        shown = {name: self.results[name] for name in drawn}
        frames = draw_frames(self.loader.dataset, shown, num_pictures, score_thr)
        pictures = {f'Validation {name}': figure for name, figure in frames.items()}
        return told, write_report(self.work / 'report', told, pictures)
