"""CenterPoint's files for Autoware: tensors, and coding of boxes."""

import onnx
import pytest
import torch

from mmdet3d_quant.engines import ONNXRuntime
from mmdet3d_quant.export import export_suite
from tests.export.autoware import contract
from tests.zoo import small_zoo

NAMES = ('heatmap', 'reg', 'height', 'dim', 'rot', 'vel')


def centerpoint():
    task = dict(num_class=3, class_names=['car', 'bus', 'bicycle'])
    return small_zoo('centerpoint', pts_bbox_head=dict(tasks=[task]))


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    torch.manual_seed(0)
    model, folder = centerpoint(), tmp_path_factory.mktemp('onnx')
    bev = torch.rand(1, 8, 32, 48)
    _, manifest = export_suite(
        model, dict(bev=bev), folder, {}, False, tell=lambda n: None, runtime='autoware'
    )
    return model, bev, folder, manifest


def test_files_and_tensors_are_those_of_lidar_centerpoint(made):
    _, _, folder, manifest = made
    encoder, head = (onnx.load(str(folder / n)).graph for n in manifest['files'])
    assert list(manifest['files']) == [
        'pts_voxel_encoder_centerpoint.onnx', 'pts_backbone_neck_head_centerpoint.onnx',
    ]  # fmt: skip
    assert contract.ports(encoder.input)['input_features'][1][::2] == ['num_voxels', 11]
    assert contract.ports(encoder.output) == {
        'pillar_features': (contract.F32, ['num_voxels', 1, 8])
    }
    assert list(contract.ports(head.input)) == ['spatial_features']
    channels = [shape[1] for _, shape in contract.ports(head.output).values()]
    assert list(contract.ports(head.output)) == list(NAMES) and channels == [3, 2, 1, 3, 2, 2]


def test_boxes_are_coded_as_the_node_decodes_them(made):
    model, bev, folder, manifest = made
    found = ONNXRuntime(folder / 'pts_backbone_neck_head_centerpoint.onnx')(
        dict(spatial_features=bev.numpy())
    )
    with torch.no_grad():
        own = model.pts_bbox_head(model.pts_neck(model.pts_backbone(bev)))[0][0]
    length, width, height = own['dim'][0]
    assert (length - width).abs().mean() > 0.1  # so that the order shows
    wanted = torch.stack([width, length, height])
    # Two engines sum some hundred float32 products by layer, each in its own order.
    assert torch.allclose(torch.from_numpy(found['dim'][0]), wanted, atol=1e-5)
    yaw = torch.atan2(own['rot'][0, 0], own['rot'][0, 1])
    theirs = torch.atan2(*torch.from_numpy(found['rot'])[0])
    turned = torch.cos(-theirs - torch.pi / 2 - yaw)  # as the node turns it back
    assert torch.allclose(turned, torch.ones_like(turned), atol=1e-4)
    assert manifest['files']['pts_backbone_neck_head_centerpoint.onnx']['boxes']['coding'] == (
        'cuda-bevfusion'
    )
