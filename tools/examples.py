"""Example inputs of a detector's files for the tools: the first frame of the data, or generated."""

from __future__ import annotations

import argparse

import torch
from mmengine.config import Config
from rich.console import Console
from torch import Tensor, nn

import mmdet3d_quant as mq
from mmdet3d_quant.core.errors import QuantError
from mmdet3d_quant.data.nuscenes import DatasetError
from mmdet3d_quant.export import capture_inputs, generate_inputs
from mmdet3d_quant.export.runtimes import DEFAULT_RUNTIME
from mmdet3d_quant.runs import from_config as fc
from mmdet3d_quant.runs.image_size import image_size


def add_input_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--inputs``, ``--num-cams`` and ``--image-size``."""
    parser.add_argument(
        '--inputs',
        choices=('auto', 'data', 'generated'),
        default='auto',
        help="what to verify on: the first frame of the config's data, or generated tensors; "
        'auto takes data where they can be read',
    )
    parser.add_argument('--num-cams', type=int, default=6, help='cameras of generated inputs')
    parser.add_argument(
        '--image-size',
        nargs=2,
        type=int,
        metavar=('HEIGHT', 'WIDTH'),
        help="of generated images; default: as the config's pipelines say",
    )
    parser.set_defaults(runtime=DEFAULT_RUNTIME)  # of tools that do not ask


def example_inputs(
    cfg: Config, model: nn.Module, args: argparse.Namespace, console: Console
) -> tuple[dict[str, Tensor], bool]:
    """Inputs of the cuts, from data where wanted and possible; and whether they are."""
    if args.inputs != 'generated':
        try:
            name, loader = fc.build_calibration_loader(cfg)
            first = fc.batch_indices(loader)[0][0]
            batch = loader.collate_fn([loader.dataset[first]])  # of one, whatever the config has
        except (fc.ConfigError, DatasetError, OSError) as err:
            if args.inputs == 'data':
                raise
            console.print(f'No data ({err}): the inputs are generated')
        else:
            console.print(f'Inputs: the first frame of {name}')
            # Float and uncalibrated models alike: only the tensors between the cuts are wanted.
            try:
                with mq.set_mode(model, 'float'), torch.no_grad():
                    return capture_inputs(model, batch, args.runtime), True
            except RuntimeError as err:  # an operator that this device lacks, as of dynamic voxels
                if args.inputs == 'data' or isinstance(err, QuantError):
                    raise
                console.print(f'The frame cannot be run here ({err}): the inputs are generated')
    size = args.image_size or image_size(cfg)
    return generate_inputs(model, args.num_cams, image_size=size), False
