#!/usr/bin/env python
"""Model-Optimizer and NNCF on the same float graphs and frames, by the same judges.

Every quantizer calibrates on the same tensors and is measured on others: SQNR of every output
against float in ONNX Runtime, convolutions in INT8 and kernels by NVIDIA's compiler (TensorRT for
RTX, no GPU), and time in OpenVINO, where all files take turns. A second table has files typed FP16
for engines that run types as the file says: ours, and what Model-Optimizer's AutoCast makes of the
same file. The peers run in environments of their own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from engine_speed import CONFIG as FULL
from engine_speed import settle_norms
from mmengine.config import DictAction
from mmengine.runner import Runner
from peer_files.judge import Judge
from peer_files.make import Frames, Peers, int8_files, typed_files
from peer_files.table import int8_table, missed, typed_table
from torch import nn

import mmdet3d_quant as mq
from mmdet3d_quant.export import Cut, bevfusion_cuts, capture_inputs, generate_inputs
from mmdet3d_quant.files.outputs import whole
from mmdet3d_quant.files.plain import finite_or_text
from mmdet3d_quant.report.facts import machine_facts
from mmdet3d_quant.runs import from_config as fc

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'tools'))
from terminal import open_console, run_tool  # noqa: E402

TINY = ROOT / 'configs/bevfusion_tiny/bevfusion_tiny_lidar-cam_int8_synthetic.py'
WEIGHTS = ROOT / 'checkpoints/bevfusion_tiny_lidar-cam_synthetic.pth'
PARTS = ('camera.backbone', 'camera.vtransform', 'fuser', 'head.bbox')
PACKAGES = {
    'modelopt': ('torch', 'nvidia-modelopt[onnx]==0.47.0'),
    'nncf': ('nncf==3.4.0', 'openvino', 'onnx', 'onnxruntime'),
}
#: Packages whose versions are told, of every environment.
TOLD = (
    *('nvidia-modelopt', 'nncf', 'torch', 'onnx', 'onnxruntime', 'onnxruntime-gpu', 'openvino'),
    *('tensorrt_rtx_cu12_libs', 'mmdet3d-quant'),
)
EXAMPLE = """
examples:
  # the tiny model, trained, on its data of tools/make_synthetic_nuscenes.py
  python benchmarks/peers.py --setup .venv-peers --out work_dirs/peers

  # the ResNet-50 model, random weights and inputs, one camera
  python benchmarks/peers.py --full-size --frames 4 --judged 2 --setup .venv-peers \\
      --out work_dirs/peers-full
"""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--config', type=Path, default=TINY, help='with Quant* types; default: the tiny model')
    add('--checkpoint', default=str(WEIGHTS), help='its weights; default: the tiny model')
    add('--full-size', action='store_true', help='instead: the ResNet-50 model, random weights')
    add('--cams', type=int, default=1, help='cameras of --full-size; default: %(default)s')
    add('--parts', nargs='+', choices=PARTS, default=PARTS)
    add('--methods', nargs='+', default=['mse', 'auto'], help='of ours; the first is judged')
    add('--frames', type=int, default=32, help='to calibrate on; default: %(default)s')
    add('--judged', type=int, default=8, help='others, to measure on; default: %(default)s')
    add('--sm', default='SM86', help="GPU generation for NVIDIA's compiler; default: %(default)s")
    add('--threads', type=int, default=1, help='default: %(default)s')
    add('--runs', type=int, default=20, help='rounds in OpenVINO; default: %(default)s')
    add('--modelopt-python', help='Python with nvidia-modelopt[onnx]')
    add('--nncf-python', help='Python with nncf, openvino, onnx and onnxruntime')
    add('--setup', type=Path, help='folder to make such environments in, once')
    add('--out', type=Path, default=Path('work_dirs/peers'), help='default: %(default)s')
    add('--cfg-options', nargs='+', action=DictAction, help='KEY=VALUE overrides of the config')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    console = open_console()
    pythons = {'modelopt': args.modelopt_python, 'nncf': args.nncf_python}
    for name, given in pythons.items():
        if args.setup and not given:
            console.print(f'Environment of {name} in {args.setup / name}')
            pythons[name] = set_up(args.setup / name, PACKAGES[name])
    peers = Peers(**pythons)
    model, frames = (full_size if args.full_size else trained)(args)
    results = {}
    for cut in bevfusion_cuts(model, frames.seen[0]):
        if cut.name in args.parts:
            console.print(f'{cut.name}: files')
            results[cut.name] = judge(cut, frames, peers, args)
            console.print(text({cut.name: results[cut.name]}), markup=False, highlight=False)
    facts = dict(
        settings={k: v if isinstance(v, (int, list)) else str(v) for k, v in vars(args).items()},
        machine=machine_facts(),
        versions={
            name: versions(python)
            for name, python in dict(pythons, here=sys.executable).items()
            if python
        },
        parts={
            part: {kind: [asdict(row) for row in rows] for kind, rows in kinds.items()}
            for part, kinds in results.items()
        },
    )
    for name, content in (
        ('peers.json', json.dumps(finite_or_text(facts), indent=1) + '\n'),
        ('peers.md', text(results)),
    ):
        with whole(args.out / name) as part:
            Path(part).write_text(content)
        console.print(f'Wrote {args.out / name}')


def set_up(folder: Path, packages: tuple[str, ...]) -> str:
    """Makes an environment, unless it is there; returns its Python."""
    python = folder / 'bin/python'
    if not (folder / 'ready').is_file():
        subprocess.run([sys.executable, '-m', 'venv', str(folder)], check=True)
        subprocess.run([str(python), '-m', 'pip', 'install', '-q', *packages], check=True)
        (folder / 'ready').touch()
    return str(python)


def versions(python: str) -> dict[str, str]:
    """Versions of what a peer's numbers depend on."""
    code = (
        'import json, sys; from importlib.metadata import distributions; '
        'print(json.dumps({d.metadata["Name"]: d.version for d in distributions()}))'
    )
    done = subprocess.run([python, '-c', code], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    return {name: found[name] for name in TOLD if name in found}


def trained(args: argparse.Namespace) -> tuple[nn.Module, Frames]:
    """A model with weights, the first frames of its calibration data, and of its validation."""
    cfg = fc.read_config(args.config, args.cfg_options)
    model = fc.build_model(cfg)
    fc.load_weights(model, args.checkpoint, calibrated=False)
    _, loader = fc.build_calibration_loader(cfg)
    held = Runner.build_dataloader(cfg.val_dataloader, seed=0)

    def capture(source: Any, count: int) -> list:
        numbers = [i for batch in fc.batch_indices(source) for i in batch][:count]
        samples = (source.collate_fn([source.dataset[i]]) for i in numbers)
        with mq.set_mode(model, 'float'), torch.no_grad():
            return [capture_inputs(model, sample) for sample in samples]

    return model, Frames(capture(loader, args.frames), capture(held, args.judged))


def full_size(args: argparse.Namespace) -> tuple[nn.Module, Frames]:
    """The ResNet-50 model with random weights, batch norms of its inputs, and random inputs."""
    torch.manual_seed(0)
    model = fc.build_model(fc.read_config(FULL, args.cfg_options))
    model.init_weights()
    made = [generate_inputs(model, args.cams, seed) for seed in range(args.frames + args.judged)]
    for cut in bevfusion_cuts(model, made[0]):
        settle_norms(cut.module, list(cut.inputs.values()))
    return model, Frames(made[: args.frames], made[args.frames :])


def judge(cut: Cut, frames: Frames, peers: Peers, args: argparse.Namespace) -> dict[str, list]:
    """Makes the files of a part by all, and asks the judges: rows by table."""
    folder = args.out / cut.name
    folder.mkdir(parents=True, exist_ok=True)
    judges = Judge(frames.judged_of(cut), args.sm, args.threads, args.runs)
    rows = {}
    if mq.quantizers(cut.module):
        rows['int8'] = judges.int8(int8_files(cut, frames, peers, folder, args.methods))
    typed = typed_files(cut, frames, peers, folder)
    if typed:
        rows['typed'] = judges.typed(typed)
    return rows


def text(results: dict[str, dict[str, list]]) -> str:
    """All tables in Markdown, and the goals that are missed."""
    told = ''
    for part, kinds in results.items():
        if 'int8' in kinds:
            told += f'## {part}\n\n{int8_table(kinds["int8"])}\n'
            told += ''.join(f'- missed: {line}\n' for line in missed(kinds['int8'])) + '\n'
        if 'typed' in kinds:
            told += f'## {part}, typed FP16\n\n{typed_table(kinds["typed"])}\n'
    return told


if __name__ == '__main__':
    run_tool(main)
