"""A small BEVFusion: the INT8 config of the full one with fewer pixels, voxels and channels."""

import socket
from pathlib import Path

import torch
from mmengine.config import Config

from mmdet3d_quant.core.compat import removeprefix
from mmdet3d_quant.core.modes import float_state_dict
from mmdet3d_quant.data.samples import frame_settings
from mmdet3d_quant.runs import from_config as fc

ROOT = Path(__file__).resolve().parents[1]
INT8 = ROOT / 'configs/bevfusion/bevfusion_lidar-cam_r50_voxel0075_second_secfpn_int8_nus-3d.py'
RANGE = [-38.4, -38.4, -5.0, 38.4, 38.4, 3.0]
GRID = [256, 256, 41]
VOXEL = [0.3, 0.3, 0.2]


def small_config(frame: Path, path: Path) -> Path:
    """Writes the config for a frame to ``path``."""
    cfg = Config.fromfile(INT8).to_dict()
    m = cfg['model']
    m['data_preprocessor']['voxelize_cfg'].update(point_cloud_range=RANGE, voxel_size=VOXEL)
    m['img_backbone'].update(base_channels=8)
    m['img_neck'].update(in_channels=[64, 128, 256], out_channels=32)
    m['view_transform'].update(
        in_channels=32,
        out_channels=16,
        image_size=[64, 192],
        feature_size=[8, 24],
        xbound=[-38.4, 38.4, 1.2],
        ybound=[-38.4, 38.4, 1.2],
        dbound=[1.0, 40.0, 1.0],
    )
    m['pts_middle_encoder'].update(
        sparse_shape=GRID,
        base_channels=8,
        output_channels=16,
        encoder_channels=((8, 16), (16, 16), (16, 16), (16,)),
    )
    m['pts_middle_encoder'].update(encoder_paddings=((0, 1), (0, 1), (0, (1, 1, 0)), (0,)))
    m['fusion_layer'].update(in_channels=[16, 32], out_channels=32)
    m['pts_backbone'].update(in_channels=32, out_channels=[16, 32], layer_nums=[1, 1])
    m['pts_neck'].update(in_channels=[16, 32], out_channels=[32, 32])
    m['bbox_head'].update(in_channels=64, num_proposals=20)
    for part in ('test_cfg', 'bbox_coder'):
        m['bbox_head'][part].update(voxel_size=VOXEL[:2], pc_range=RANGE[:2])
    for part in ('test_cfg', 'train_cfg'):
        m['bbox_head'][part].update(grid_size=GRID)
    m['bbox_head']['train_cfg'].update(point_cloud_range=RANGE, voxel_size=VOXEL)
    cfg.update(frame_settings(cfg, frame))
    test = cfg['test_dataloader']['dataset']
    train = dict(test, test_mode=False, pipeline=cfg['train_pipeline'])
    train['pipeline'] = [s for s in train['pipeline'] if s['type'] != 'LoadPointsFromMultiSweeps']
    cfg['train_dataloader'].update(
        num_workers=0, persistent_workers=False, batch_size=2, dataset=train
    )
    for step in (*test['pipeline'], *train['pipeline']):
        if step['type'] == 'ImageAug3D':
            sizes = [0.1, 0.14] if step['is_train'] else [0.12, 0.12]
            step.update(final_dim=[64, 192], resize_lim=sizes)
        if 'point_cloud_range' in step:
            step.update(point_cloud_range=RANGE)
    Config(cfg).dump(path)
    return path


def small_float_config(frame: Path, path: Path) -> Path:
    """The same with float types, as the public project has them too."""
    cfg = Config.fromfile(small_config(frame, path))
    for part in cfg.model.values():
        if isinstance(part, dict) and part.get('type', '').startswith('Quant'):
            name = removeprefix(part['type'], 'Quant')
            part['type'] = f'mmdet.{name}' if name == 'ResNet' else name
    cfg.dump(path)
    return path


def save_float(config: Path, path: Path) -> Path:
    """Writes a checkpoint of random float weights for a config."""
    torch.manual_seed(0)
    state = float_state_dict(fc.build_model(fc.read_config(config)))
    torch.save(dict(state_dict=state, meta=dict(epoch=1)), path)
    return path


def free_port() -> str:
    """A port for processes to meet at, which nobody has."""
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        return str(server.getsockname()[1])
