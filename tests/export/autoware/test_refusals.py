"""What Autoware's plugins and nodes do not have: the error names the layer and what would help."""

import copy
from dataclasses import replace

import pytest
import torch
from mmdet3d.models.voxel_encoders import HardSimpleVFE
from torch import nn

from mmdet3d_quant.export import ExportError, export_suite
from mmdet3d_quant.export.sparse import trace
from mmdet3d_quant.export.sparse.arithmetic import AUTOWARE
from mmdet3d_quant.export.sparse.program import ScnError
from tests.export.sparse.encoders import calibrated
from tests.zoo import small_zoo

ONE_TASK = dict(tasks=[dict(num_class=2, class_names=['car', 'bus'])])


@pytest.fixture(scope='module')
def encoder():
    return calibrated('bevfusion')


def with_kernel(size):
    def spoil(encoder):
        conv = encoder.conv_input[0]
        conv.kernel_size = [size] * 3
        shape = (len(conv.weight), *conv.kernel_size, conv.weight.shape[-1])
        conv.weight = nn.Parameter(torch.ones(shape))

    return spoil


def inverse(encoder):
    encoder.conv_out[0].inverse = True


def transposed(encoder):
    encoder.conv_out[0].transposed = True


def no_statistics(encoder):
    norm = encoder.encoder_layers.encoder_layer2[0].norm1
    norm.running_mean = norm.running_var = None


def norm_first(encoder):
    stage = encoder.encoder_layers.encoder_layer1[2]
    conv, norm, relu = stage.children()
    stage._modules.update({'0': norm, '1': relu, '2': conv})


def fp8(encoder):
    conv = encoder.encoder_layers.encoder_layer3[0].conv1
    for quantizer in (conv._input_quantizer, conv._weight_quantizer):
        quantizer.spec = replace(quantizer.spec, num_bits=(4, 3))


@pytest.mark.parametrize(
    ('spoil', 'says'),
    [
        (with_kernel(5), r'conv_input\.0\).*5x5x5 has 125 places.*most 32: train with 3x3x3 and'),
        (with_kernel(1), r'conv_input\.0\).*1x1x1 .*ImplicitGemm; a submanifold kernel of 3x3x3'),
        (inverse, r'conv_out\.0 .*autoware does not have: an inverse .*; train it without'),
        (transposed, r'conv_out\.0 .*autoware does not have: a transposed .*; train it without'),
        (no_statistics, r'layer2\.0\.bn1 .*cannot be folded: .*train it with track_running_stats'),
        (norm_first, r'layer1\.2\.0 .*cannot be folded: .*Train with each batch norm right behind'),
        (fp8, r'layer3\.0\.conv1 has fp8; autoware has int8: set its format to int8 and calibrate'),
    ],
)
def test_layers_that_the_plugins_lack(encoder, spoil, says):
    spoiled = copy.deepcopy(encoder)
    trace(spoiled, arithmetic=AUTOWARE)
    spoil(spoiled)
    with pytest.raises((ExportError, ScnError), match=says):
        trace(spoiled, arithmetic=AUTOWARE)


def no_velocity(model):
    for task in model.pts_bbox_head.task_heads:
        del task.vel, task.heads['vel']


def with_voxels(model):
    model.pts_voxel_encoder = HardSimpleVFE()


@pytest.mark.parametrize(
    ('spoil', 'head', 'says'),
    [
        (no_velocity, ONE_TASK, r'pts_bbox_head does not predict vel, .*vel=\(2, 2\)'),
        (with_voxels, ONE_TASK, 'pts_voxel_encoder is a HardSimpleVFE: .*pillars only. Take '
         '--runtime cuda-bevfusion, or train with a PillarFeatureNet'),
        (lambda model: None, {}, r'pts_bbox_head has 6 tasks.*Train with tasks=\[dict\(num_class'),
    ],
)  # fmt: skip
def test_centerpoints_that_the_node_lacks(spoil, head, says, tmp_path):
    model = small_zoo('centerpoint', pts_bbox_head=head)
    spoil(model)
    with pytest.raises(ExportError, match=says):
        export_suite(
            model, dict(bev=torch.rand(1, 8, 32, 48)), tmp_path, {}, False,
            tell=lambda n: None, runtime='autoware',
        )  # fmt: skip
