#!/usr/bin/env python
"""How much of mmdet3d's published models is quantized by the output of tools/quantize_config.py.

Real config files, full widths, random weights. The work of the dense parts is counted at the full
size of their inputs; they are calibrated, exported and compiled at a smaller one. Sparse encoders
are counted on voxels drawn at random.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mmdet3d
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import mmdet3d_quant as mq
from mmdet3d_quant.check.lint import lint, read_graph
from mmdet3d_quant.core.coverage import coverage
from mmdet3d_quant.core.macs import counting
from mmdet3d_quant.core.modes import float_state_dict
from mmdet3d_quant.engines.tensorrt_rtx import compile_onnx, is_installed
from mmdet3d_quant.export import detector_cuts, export_onnx, generate_inputs
from mmdet3d_quant.export.examples import sparse_encoder
from mmdet3d_quant.export.graph import custom_ops
from mmdet3d_quant.jobs.child_configs import quantize_config
from mmdet3d_quant.runs import from_config as fc
from mmdet3d_quant.runs.image_size import image_size

ROOT = Path(__file__).resolve().parents[1]
ZOO = Path(mmdet3d.__file__).parent / '.mim' / 'configs'
BEVFUSION = ROOT / 'configs/bevfusion/bevfusion_lidar-cam_r50_voxel0075_second_secfpn_nus-3d.py'
#: Largest side of the inputs that are run, and voxels of a sparse encoder.
SIDE, VOXELS = 128, 20_000
NO_DCN = dict(backbone=dict(dcn=None, stage_with_dcn=(False,) * 4))
PLAIN_MONO = dict(**NO_DCN, bbox_head=dict(dcn_on_last_conv=False))
SWIN = dict(
    _delete_=True,
    type='mmdet.SwinTransformer',
    embed_dims=96,
    depths=[2, 2, 6, 2],
    num_heads=[3, 6, 12, 24],
    window_size=7,
    out_indices=[1, 2, 3],
)
MULTI_VIEW = """
model = dict(
    type='MVXTwoStageDetector',
    data_preprocessor=dict(type='Det3DDataPreprocessor', pad_size_divisor=32),
    img_backbone=dict(
        type='mmdet.ResNet', depth=101, num_stages=4, out_indices=(0, 1, 2, 3), frozen_stages=1,
        norm_cfg=dict(type='BN2d', requires_grad=False), norm_eval=True, style='caffe',
        dcn=dict(type='DCNv2', deform_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, False, True, True)),
    img_neck=dict(
        type='mmdet.FPN', in_channels=[256, 512, 1024, 2048], out_channels=256, start_level=1,
        add_extra_convs='on_output', num_outs=4, relu_before_extra_convs=True),
)
default_scope = 'mmdet3d'
test_dataloader = dict(dataset=dict(type='NuScenesDataset'))
"""


@dataclass(frozen=True)
class Model:
    """A published model: its config, or the text of one, and what of it is changed."""

    name: str
    config: Path | str
    changes: dict[str, Any] = field(default_factory=dict)


def zoo(name: str, config: str, **changes: Any) -> Model:
    return Model(name, ZOO / config, changes)


_FCOS3D = 'fcos3d/fcos3d_r101-caffe-dcn_fpn_head-gn_8xb2-1x_nus-mono3d.py'
_PGD = 'pgd/pgd_r101-caffe_fpn_head-gn_16xb2-1x_nus-mono3d.py'
_CENTER = 'centerpoint/centerpoint_{}_second_secfpn_{}8xb4-cyclic-20e_nus-3d.py'
MODELS = (
    zoo('PointPillars', 'pointpillars/pointpillars_hv_secfpn_8xb6-160e_kitti-3d-3class.py'),
    zoo('SECOND', 'second/second_hv_secfpn_8xb6-80e_kitti-3d-3class.py'),
    zoo('CenterPoint pillar', _CENTER.format('pillar02', '')),
    zoo('CenterPoint voxel', _CENTER.format('voxel0075', '')),
    zoo('CenterPoint DCN', _CENTER.format('pillar02', 'head-dcn_')),
    zoo('SSN', 'ssn/ssn_hv_secfpn_sbn-all_16xb2-2x_nus-3d.py'),
    zoo('SSN RegNet', 'ssn/ssn_hv_regnet-400mf_secfpn_sbn-all_16xb2-2x_nus-3d.py'),
    zoo('RegNet FPN', 'regnet/pointpillars_hv_regnet-400mf_fpn_sbn-all_8xb4-2x_nus-3d.py'),
    zoo('FCOS3D', _FCOS3D),
    zoo('FCOS3D without DCN', _FCOS3D, **PLAIN_MONO),
    zoo('PGD', _PGD),
    zoo('PGD without DCN', _PGD, **PLAIN_MONO),
    zoo('SMOKE', 'smoke/smoke_dla34_dlaneck_gn-all_4xb8-6x_kitti-mono3d.py'),
    zoo(
        'SMOKE without DCN',
        'smoke/smoke_dla34_dlaneck_gn-all_4xb8-6x_kitti-mono3d.py',
        neck=dict(use_dcn=False),
    ),
    zoo('ImVoxelNet', 'imvoxelnet/imvoxelnet_8xb4_kitti-3d-car.py'),
    zoo('MVX-Net', 'mvxnet/mvxnet_fpn_dv_second_secfpn_8xb2-80e_kitti-3d-3class.py'),
    Model('DETR3D backbone, neck', MULTI_VIEW),
    Model('BEVFusion R50', BEVFUSION),
    Model(
        'BEVFusion Swin-T',
        BEVFUSION,
        dict(img_backbone=SWIN, img_neck=dict(in_channels=[192, 384, 768])),
    ),
)
EXAMPLE = """
examples:
  python benchmarks/zoo_coverage.py
  python benchmarks/zoo_coverage.py --only PointPillars SMOKE --no-compile
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [m.name for m in MODELS]
    parser.add_argument('--only', nargs='+', choices=names, metavar='NAME', help=', '.join(names))
    parser.add_argument('--side', type=int, default=SIDE, help='largest side of inputs that run')
    parser.add_argument('--no-compile', action='store_true', help='leave the compiler out')
    parser.add_argument('--sm', default='SM89', help='GPU generation; default: %(default)s')
    return parser.parse_args()


def write_float(model: Model, folder: Path) -> Path:
    """The float config with its changes, as a file."""
    path = folder / f'{model.name.replace(" ", "_").replace(",", "")}.py'
    if isinstance(model.config, str):
        path.write_text(model.config)
    else:
        # What the changes say of arguments is merged as a child config would.
        path.write_text(f'_base_ = [{str(model.config)!r}]\nmodel = dict(**{model.changes!r})\n')
    return path


@torch.no_grad()
def settle(detector: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Draws dense weights, and batch-norm statistics with which signals neither fade nor grow."""
    norms = [m for m in detector.modules() if isinstance(m, _BatchNorm)]
    for module in detector.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
    for norm in norms:
        norm.training, norm.momentum = True, 1.0
    with mq.set_mode(detector, 'float'):
        run(detector, inputs)
    for norm in norms:
        norm.training = False


def voxels(encoder: Any, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random features and coordinates of a sparse encoder, dense near the middle."""
    rng = torch.Generator().manual_seed(seed)
    shape = torch.tensor(encoder.sparse_shape)
    places = (torch.randn(VOXELS, 3, generator=rng) * 0.15 + 0.5).clamp(0, 0.999)
    cells = torch.unique((places * shape).int(), dim=0)
    coors = torch.cat([torch.zeros(len(cells), 1, dtype=torch.int32), cells], 1)
    return torch.rand(len(coors), encoder.in_channels, generator=rng), coors


def cropped(inputs: dict[str, Tensor], side: int) -> dict[str, Tensor]:
    """Inputs cut to a largest side; of a volume, to a quarter."""
    small = {}
    for name, x in inputs.items():
        limit = side // 4 if name == 'volume' else side
        first = 2 if name in ('volume', 'bev') else x.dim() - 2
        cut = [slice(0, limit) if first <= d < first + 2 else slice(None) for d in range(x.dim())]
        small[name] = x[tuple(cut)].contiguous()
    return small


def run(detector: Any, inputs: dict[str, Tensor], encode: bool = True) -> None:
    """Runs the cuts, and the sparse encoder."""
    encoder = sparse_encoder(detector)
    if encode and encoder is not None:
        encoder(*voxels(encoder), 1)
    for cut in detector_cuts(detector, inputs):
        cut.module(*cut.inputs.values())


@torch.no_grad()
def count(detector: nn.Module, full: dict[str, Tensor], small: dict[str, Tensor]) -> dict[str, int]:
    """Multiply-accumulates by layer, at full size where modules take tensors without values."""
    with mq.set_mode(detector, 'float'):
        shapes = copy.deepcopy(detector)
        with counting(shapes) as dense:
            try:
                run(shapes.to('meta'), {n: x.to('meta') for n, x in full.items()}, encode=False)
            except (NotImplementedError, RuntimeError):  # a deformable convolution, say
                dense.macs.clear()
        if not dense.macs:
            with counting(detector) as dense:
                run(detector, small, encode=False)
        encoder = sparse_encoder(detector)
        with counting(detector) as sparse:
            if encoder is not None:
                encoder(*voxels(encoder), 1)
    return {**dense.macs, **sparse.macs}


def float_equal(detector: nn.Module, original: nn.Module, inputs: dict[str, Tensor]) -> bool:
    """Whether the INT8 model in float mode computes what the float one does, bit for bit."""
    original.load_state_dict(float_state_dict(detector))
    with torch.no_grad(), mq.set_mode(detector, 'float'):
        for a, b in zip(detector_cuts(detector, inputs), detector_cuts(original, inputs)):
            torch.manual_seed(0)
            one, other = (cut.module(*cut.inputs.values()) for cut in (a, b))
            pair = zip(*((x,) if isinstance(x, Tensor) else x for x in (one, other)))
            if not all(torch.equal(x, y) for x, y in pair):
                return False
    return True


def measure(model: Model, folder: Path, args: argparse.Namespace) -> list[str]:
    """One row of the table."""
    start = time.perf_counter()
    config = write_float(model, folder)
    written = quantize_config(config, folder / f'{config.stem}_int8.py')
    cfg = fc.read_config(written.int8)
    torch.manual_seed(0)
    detector = fc.build_model(cfg)
    full = generate_inputs(detector, 1, image_size=image_size(cfg))
    small = full if 'depth' in full else cropped(full, args.side)  # a view has its own size
    settle(detector, small)
    equal = float_equal(detector, fc.build_model(fc.read_config(config)), small)
    found = coverage(detector, count(detector, full, small))
    mq.calibrate(detector, [small], 'max', forward=run)
    files, findings, verdicts = [], 0, []
    for cut in detector_cuts(detector, small):
        path = folder / f'{cut.name}.onnx'
        made = export_onnx(
            cut.module, list(cut.inputs.values()), path, list(cut.inputs), cut.output_names,
            custom_ops=True,
        )  # fmt: skip
        plugins = custom_ops(made)
        files.append(cut.name + (f' ({", ".join(plugins)})' if plugins else ''))
        findings += len(lint(read_graph(path)))
        if not plugins and not args.no_compile and is_installed():
            verdict = compile_onnx(path, [args.sm])[args.sm]
            verdicts.append('yes' if verdict.accepted else f'no: {verdict.error[:60]}')
    floats = [
        f'{group["module"]} {100 * (group["share"] or 0):.1f} %' for group in found.float_groups()
    ]
    return [
        model.name,
        f'{len(found.quantized)}/{len(found.layers)}',
        f'{100 * (found.share or 0):.1f} %',
        'equal' if equal else 'DIFFERS',
        '\n'.join(floats[:3]) + (f'\nand {len(floats) - 3} more' if floats[3:] else ''),
        '\n'.join(files),
        str(findings),
        ', '.join(dict.fromkeys(verdicts)) or '-',
        f'{time.perf_counter() - start:.0f}',
    ]


def main() -> None:
    args = parse_args()
    console = Console(width=150)
    warnings.filterwarnings('ignore')
    table = Table(title='INT8 by the output of quantize_config.py')
    headings = ('model', 'layers', 'share', 'float mode', 'float', 'files', 'lint', 'compiler', 's')
    for heading in headings:
        table.add_column(heading)
    for model in MODELS:
        if args.only and model.name not in args.only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                row = measure(model, Path(folder), args)
            except Exception as err:  # one row, whatever it is
                row = [model.name, f'{type(err).__name__}: {err}'[:300], *[''] * 7]
        console.print(*row[:4], *row[5:], sep='  ', markup=False)
        table.add_row(*row)
    console.print(table)


if __name__ == '__main__':
    main()
