"""The size of images that a config's pipelines make."""

import pytest
from mmengine.config import Config

from mmdet3d_quant.runs.image_size import image_size
from tests.zoo import ZOO


@pytest.mark.parametrize(
    'config, size',
    [
        ('fcos3d/fcos3d_r101-caffe-dcn_fpn_head-gn_8xb2-1x_nus-mono3d.py', (928, 1600)),
        ('pgd/pgd_r101-caffe_fpn_head-gn_4xb3-4x_kitti-mono3d.py', (384, 1248)),
        ('smoke/smoke_dla34_dlaneck_gn-all_4xb8-6x_kitti-mono3d.py', (384, 1280)),
        ('imvoxelnet/imvoxelnet_2xb4_sunrgbd-3d-10class.py', (480, 640)),
        ('mvxnet/mvxnet_fpn_dv_second_secfpn_8xb2-80e_kitti-3d-3class.py', (384, 1280)),
    ],
)
def test_published_configs(config, size):
    """Sizes of the papers' images, padded to multiples of 32."""
    assert image_size(Config.fromfile(ZOO / config)) == size


def dataset(*steps, kind='MyDataset'):
    return dict(model={}, test_dataloader=dict(dataset=dict(type=kind, pipeline=list(steps))))


def test_what_decides():
    height_first = dict(type='ImageAug3D', final_dim=[256, 704], resize_lim=[0.4, 0.5])
    assert image_size(dataset(height_first)) == (256, 704)
    assert image_size(dataset(dict(type='Resize', scale_factor=1.0), height_first)) == (256, 704)
    several = dict(type='RandomResize', scale=[(640, 192), (2560, 768)])
    assert image_size(dataset(several)) == (768, 2560)
    padded = dict(dataset(height_first), model=dict(data_preprocessor=dict(pad_size_divisor=100)))
    assert image_size(padded) == (300, 800)
    assert image_size(dataset(kind='mmdet3d.NuScenesDataset')) == (900, 1600)
    assert image_size(dataset()) is None and image_size(dict(model={})) is None
