"""Judgement of a LiDAR encoder's file: what is wrong with it is told, and nothing else."""

import math

import onnx
import pytest
import torch

from mmdet3d_quant.check.sparse import judge_lidar
from mmdet3d_quant.core.modes import quantizers
from mmdet3d_quant.export.sparse import export_lidar
from tests.export.sparse.encoders import build, calibrated, cloud


@pytest.fixture(scope='module')
def model():
    return calibrated('bevfusion')


@pytest.fixture
def path(model, tmp_path):
    export_lidar(model, tmp_path / 'lidar.onnx')
    return tmp_path / 'lidar.onnx'


def attribute(model, node, name):
    return next(a for a in model.graph.node[node].attribute if a.name == name)


def test_good_files_have_no_fault(model, path):
    found = judge_lidar(model, path, *cloud(model))
    assert found.fault == '' and (found.cut, found.output) == ('lidar', 'lidar')
    assert (found.int8_convs, found.all_convs) == (13, 14)
    assert 10 < found.fake_quant < found.libspconv + 3 and found.onnxruntime is None
    plain = build('bevfusion')
    export_lidar(plain, path, 'zyx')
    found = judge_lidar(plain, path, *cloud(plain), quantized=False)
    assert found.fault == '' and found.fake_quant == math.inf and found.libspconv > 50


def test_another_file_is_told(model, path):
    spoiled = onnx.load(path)
    attribute(spoiled, 20, 'input_dynamic_range').f *= 50
    onnx.save(spoiled, path)
    assert 'libspconv: lidar agrees with torch to' in judge_lidar(model, path, *cloud(model)).fault


def test_values_beyond_fp16_are_told(path):
    hot = build('bevfusion')
    norm = hot.conv_out[1]
    norm.running_mean.data.zero_()
    norm.weight.data[:], norm.bias.data[:] = 2e4, 6e4
    export_lidar(hot, path)
    fault = judge_lidar(hot, path, *cloud(hot), quantized=False).fault
    assert fault.startswith('libspconv: ') and fault.endswith('of lidar are NaN or infinite')


def test_a_layer_without_room_is_told(model, path):
    spoiled = onnx.load(path)
    attribute(spoiled, 1, 'output_bound').i = 100
    onnx.save(spoiled, path)
    assert judge_lidar(model, path, *cloud(model)).fault.startswith('conv1 (')


def test_ranges_that_do_not_fit_are_told_on_data_only(path):
    model = calibrated('bevfusion')
    name = next(n for n in quantizers(model) if n.endswith('conv_out.0._input_quantizer'))
    quantizers(model)[name].amax = 1000 * quantizers(model)[name].amax
    export_lidar(model, path)
    fault = judge_lidar(model, path, *cloud(model)).fault
    assert '1 range(s) do not fit' in fault and 'pts_middle_encoder.conv_out.0' in fault
    assert judge_lidar(model, path, *cloud(model), real=False).fault == ''


def test_the_encoder_stays_as_it_is(model, path):
    before = {n: (q.mode, q._amax.clone()) for n, q in quantizers(model).items() if q.calibrated}
    judge_lidar(model, path, *cloud(model))
    for name, (mode, amax) in before.items():
        assert quantizers(model)[name].mode == mode
        assert torch.equal(quantizers(model)[name]._amax, amax)
