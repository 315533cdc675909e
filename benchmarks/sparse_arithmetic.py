#!/usr/bin/env python
"""SQNR of the tiny BEVFusion's LiDAR map as each runtime computes it, against float.

The encoder is calibrated by ``mse`` and traced for every runtime: for libspconv with the first
convolution float, for Autoware by choice of the layers in INT8. Tensors that are not INT8 are FP16
where the runtime has them so.

Example:
    python benchmarks/sparse_arithmetic.py --frames 4
"""

from __future__ import annotations

import argparse
from itertools import islice

import torch
from accuracy_lidar import CONFIG, LIDAR, STAGES, build
from mmengine.config import Config
from mmengine.runner import Runner
from torch import Tensor, nn

import mmdet3d_quant as mq
from mmdet3d_quant.check.runs import sqnr
from mmdet3d_quant.core.modes import set_mode
from mmdet3d_quant.export.sparse import trace
from mmdet3d_quant.export.sparse.arithmetic import AUTOWARE, LIBSPCONV, OPENVINO, with_int8
from mmdet3d_quant.export.sparse.run import ScnEncoder, ScnNetwork
from mmdet3d_quant.runs import from_config as fc

ROWS = {
    'libspconv': with_int8(LIBSPCONV, STAGES['all but first']),
    'openvino': OPENVINO,
    **{f'autoware {name}': with_int8(AUTOWARE, layers) for name, layers in STAGES.items()},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--frames', type=int, default=4, help='default: %(default)s')
    parser.add_argument('--calib-batches', type=int, default=16, help='default: %(default)s')
    args = parser.parse_args()
    cfg = fc.read_config(CONFIG)
    _, calibration = fc.build_calibration_loader(cfg)
    model = build(naive=True)  # ranges of the first convolution, too
    mq.calibrate(model, list(islice(calibration, args.calib_batches)), 'mse')
    frames = voxels_of(model, cfg, args.frames)
    encoder = getattr(model, LIDAR)
    with torch.no_grad(), set_mode(encoder, 'float'):
        plain = torch.cat([encoder(*frame, 1) for frame in frames])
    maps = {}
    for name, arithmetic in ROWS.items():
        network = ScnNetwork(trace(encoder, arithmetic=arithmetic), fp16_tensors=arithmetic.half)
        maps[name] = torch.cat([ScnEncoder(network)(*frame, 1) for frame in frames])
        print(f'{name:24} {sqnr(plain, maps[name]):6.1f} dB')
    between = sqnr(maps['libspconv'], maps['autoware all but first'])
    print(f'Autoware to libspconv, all but the first convolution: {between:.1f} dB')


def voxels_of(model: nn.Module, cfg: Config, count: int) -> list[tuple[Tensor, Tensor]]:
    """Voxels and cells of the first frames of validation."""
    seen: list[tuple[Tensor, Tensor]] = []
    encoder = getattr(model, LIDAR)
    hook = encoder.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    loader = Runner.build_dataloader(dict(cfg.val_dataloader, batch_size=1), seed=0)
    with torch.no_grad():
        for batch in islice(loader, count):
            model.test_step(batch)
    hook.remove()
    return seen


if __name__ == '__main__':
    main()
