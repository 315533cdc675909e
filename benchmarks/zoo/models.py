"""The models: config files of mmdet3d's wheel, and what of them is changed, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mmdet3d

from zoo import vovnet  # noqa: F401 - registers the stand-ins

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = Path(mmdet3d.__file__).parent / '.mim' / 'configs'
BEVFUSION = ROOT / 'configs/bevfusion/bevfusion_lidar-cam_r50_voxel0075_second_secfpn_nus-3d.py'


@dataclass(frozen=True)
class Model:
    """A published model.

    Attributes:
        name: In the table.
        config: File, or the text of one.
        changes: What of its ``model`` is changed.
    """

    name: str
    config: Path | str
    changes: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Writes the float config with its changes; returns its path."""
        path = folder / f'{self.name.replace(" ", "_").replace(",", "")}.py'
        if isinstance(self.config, str):
            path.write_text(self.config)
        else:
            # What the changes say of arguments is merged as a child config would.
            change = f'model = dict(**{self.changes!r})'
            path.write_text(f'_base_ = [{str(self.config)!r}]\n{change}\n')
        return path


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
#: Backbone and neck of detectors with a head that is not exported. Arguments: the two, as text,
#: and height and width of the images.
_MULTI_VIEW = """
model = dict(
    type='MVXTwoStageDetector',
    data_preprocessor=dict(type='Det3DDataPreprocessor', pad_size_divisor=32),
    img_backbone={backbone!r},
    img_neck={neck!r},
)
default_scope = 'mmdet3d'
test_dataloader = dict(
    dataset=dict(type='NuScenesDataset', pipeline=[dict(type='Resize3D', scale={size!r})]))
"""
_DCN = dict(type='DCNv2', deform_groups=1, fallback_on_stride=False)


def _resnet(depth: int, out_indices: tuple[int, ...]) -> dict[str, Any]:
    return dict(
        type='mmdet.ResNet',
        depth=depth,
        num_stages=4,
        out_indices=out_indices,
        frozen_stages=1,
        norm_cfg=dict(type='BN2d', requires_grad=False),
        norm_eval=True,
        style='caffe',
        dcn=_DCN,
        stage_with_dcn=(False, False, True, True),
    )


def _multi_view(name: str, size: tuple[int, int], **parts: Any) -> Model:
    return Model(name, _MULTI_VIEW.format(size=size, **parts))


def _zoo(name: str, config: str, **changes: Any) -> Model:
    return Model(name, CONFIGS / config, changes)


_FCOS3D = 'fcos3d/fcos3d_r101-caffe-dcn_fpn_head-gn_8xb2-1x_nus-mono3d.py'
_PGD = 'pgd/pgd_r101-caffe_fpn_head-gn_16xb2-1x_nus-mono3d.py'
_SMOKE = 'smoke/smoke_dla34_dlaneck_gn-all_4xb8-6x_kitti-mono3d.py'
_CENTER = 'centerpoint/centerpoint_{}_second_secfpn_{}8xb4-cyclic-20e_nus-3d.py'
_FPN = dict(
    type='mmdet.FPN',
    in_channels=[256, 512, 1024, 2048],
    out_channels=256,
    start_level=1,
    add_extra_convs='on_output',
    num_outs=4,
    relu_before_extra_convs=True,
)
MODELS = (
    _zoo('PointPillars', 'pointpillars/pointpillars_hv_secfpn_8xb6-160e_kitti-3d-3class.py'),
    _zoo('SECOND', 'second/second_hv_secfpn_8xb6-80e_kitti-3d-3class.py'),
    _zoo('CenterPoint pillar', _CENTER.format('pillar02', '')),
    _zoo('CenterPoint voxel', _CENTER.format('voxel0075', '')),
    _zoo('CenterPoint DCN', _CENTER.format('pillar02', 'head-dcn_')),
    _zoo('SSN', 'ssn/ssn_hv_secfpn_sbn-all_16xb2-2x_nus-3d.py'),
    _zoo('SSN RegNet', 'ssn/ssn_hv_regnet-400mf_secfpn_sbn-all_16xb2-2x_nus-3d.py'),
    _zoo('RegNet FPN', 'regnet/pointpillars_hv_regnet-400mf_fpn_sbn-all_8xb4-2x_nus-3d.py'),
    _zoo('FCOS3D', _FCOS3D),
    _zoo('FCOS3D without DCN', _FCOS3D, **PLAIN_MONO),
    _zoo('PGD', _PGD),
    _zoo('PGD without DCN', _PGD, **PLAIN_MONO),
    _zoo('SMOKE', _SMOKE),
    _zoo('SMOKE without DCN', _SMOKE, neck=dict(use_dcn=False)),
    _zoo('ImVoxelNet', 'imvoxelnet/imvoxelnet_8xb4_kitti-3d-car.py'),
    _zoo('MVX-Net', 'mvxnet/mvxnet_fpn_dv_second_secfpn_8xb2-80e_kitti-3d-3class.py'),
    _multi_view(
        'DETR3D backbone, neck', (1600, 900), backbone=_resnet(101, (0, 1, 2, 3)), neck=_FPN
    ),
    _multi_view(
        'PETR VoVNet backbone, neck',
        (800, 320),
        backbone=dict(type='StandInVoVNet'),
        neck=dict(type='StandInCPFPN', in_channels=[768, 1024], out_channels=256),
    ),
    _multi_view(
        'PETR R50 backbone, neck',
        (1408, 512),
        backbone=_resnet(50, (2, 3)),
        neck=dict(type='StandInCPFPN', in_channels=[1024, 2048], out_channels=256),
    ),
    Model('BEVFusion R50', BEVFUSION),
    Model(
        'BEVFusion Swin-T',
        BEVFUSION,
        dict(img_backbone=SWIN, img_neck=dict(in_channels=[192, 384, 768])),
    ),
)
