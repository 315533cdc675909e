"""Graphs of modules whose batch norms pair oddly or stay: two engines against torch."""

import copy
import json
import warnings

import onnx
import pytest
import torch
from mmcv.cnn import ConvModule
from mmdet.models.backbones.res2net import Bottle2neck
from torch import nn

from mmdet3d_quant import calibrate, set_mode
from mmdet3d_quant.check.ladder import LAYER_DB, climb
from mmdet3d_quant.check.lint import Graph, lint
from mmdet3d_quant.check.verify import sqnr
from mmdet3d_quant.engines import ONNXRuntime, OpenVINO
from mmdet3d_quant.export import export_onnx, export_suite
from mmdet3d_quant.export.cuts import Cut
from mmdet3d_quant.export.onnx import kept_batch_norms
from mmdet3d_quant.layers import QuantConv2d, QuantConvTranspose2d
from tests.layers.nets import Net, bn, conv, crossed, odd, read_twice, spread
from tests.versions import without_old_openvino

ENGINES = {'ONNX Runtime': ONNXRuntime, 'OpenVINO': OpenVINO}


def res2net():
    down = nn.Sequential(QuantConv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32))
    kwargs = dict(scales=4, base_width=26, conv_cfg=dict(type='QuantConv2d'))
    return Bottle2neck(16, 8, stage_type='stage', downsample=down, **kwargs)


def pre_activation():
    def forward(m, x):
        y = m.conv1(m.bn1(x).relu())
        return x + m.conv2(m.bn2(y).relu())

    return Net(forward, bn1=bn(16), conv1=conv(16, 16), bn2=bn(16), conv2=conv(16, 16))


def grouped_transposed():
    layer = QuantConvTranspose2d(16, 8, 2, stride=2, groups=2)
    return Net(lambda m, x: m.conv(m.bn(m.up(x)).relu()), up=layer, bn=bn(8), conv=conv(8, 8))


def shared_convolution():
    def forward(m, x):
        return m.bn1(m.conv(x)).relu() + m.bn2(m.conv(x.relu()))

    return Net(forward, conv=conv(16, 16), bn1=bn(16), bn2=bn(16))


def wide(make):
    """The same module for 16 channels."""
    return lambda: nn.Sequential(conv(16, 4), nn.ReLU(), make())


#: Module -> number of batch norms that stay in its quantized graph, in its float one.
NETS = {
    'odd order': (wide(odd), 0, 0),
    'crossed order': (wide(crossed), 0, 0),
    'Res2Net': (res2net, 0, 0),
    'pre-activation': (pre_activation, 1, 1),
    'grouped transposed': (grouped_transposed, 1, 0),
    'shared convolution': (shared_convolution, 2, None),  # torch's exporter may fold float ones
    'read twice': (
        wide(lambda: Net(read_twice, conv=conv(), bn=bn())), 1, None
    ),
}  # fmt: skip


@pytest.mark.parametrize('kind', NETS)
def test_engines_agree_with_fake_quant_and_float(kind, tmp_path):
    make, kept, kept_float = NETS[kind]
    torch.manual_seed(0)
    model, x = spread(make()), torch.randn(1, 16, 12, 20)
    calibrate(model, [x])
    path = tmp_path / 'net.onnx'
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        graph = export_onnx(model, [x], path, ['x'], ['y'])
    assert count(graph) == kept == len(kept_batch_norms(onnx.load(path)))
    said = [str(w.message) for w in told if 'cannot be folded and stay' in str(w.message)]
    assert len(said) == bool(kept)
    for name, reason in kept_batch_norms(graph).items():
        assert model.get_submodule(name) and f'  {name}: {reason}' in said[0]
    cut = Cut('net', model, dict(x=x), ('y',))
    for rung in climb(cut, copy.deepcopy(model), path, ENGINES):
        assert not rung.fault and all(db > LAYER_DB for db in rung.layers.values()), rung

    graph = export_onnx(model, [x], path, ['x'], ['y'], quantized=False)
    assert kept_float is None or count(graph) == kept_float
    with set_mode(model, 'float'), torch.no_grad():
        expected = model(x)
    for engine in ENGINES.values():
        assert sqnr(expected, engine(path)(dict(x=x.numpy()))['y']) > 100


def count(graph):
    return sum(n.op_type == 'BatchNormalization' for n in graph.graph.node)


@pytest.mark.parametrize('kind', ['DCN', 'DCNv2'])
def test_deformable_convolutions_keep_their_norm(kind, tmp_path):
    """In float graphs as in quantized ones; no engine here runs them."""
    dcn = ConvModule(4, 4, 3, conv_cfg=dict(type=kind, deform_groups=1), norm_cfg=dict(type='BN'))
    model, x = spread(nn.Sequential(conv(), bn(), dcn)), torch.randn(1, 4, 8, 8)
    calibrate(model, [x])
    for quantized in (False, True):
        path = tmp_path / 'm.onnx'
        graph = export_onnx(model, [x], path, ['x'], ['y'], quantized=quantized, custom_ops=True)
        assert count(graph) == 1 and list(kept_batch_norms(graph)) == ['2.bn']


@without_old_openvino
def test_a_norm_without_statistics_normalises_by_its_input(tmp_path):
    norm = bn(track_running_stats=False)
    model, x = spread(nn.Sequential(conv(), norm)), torch.randn(2, 4, 8, 8)
    calibrate(model, [x])
    with pytest.warns(UserWarning, match=r'  1: it keeps no running statistics'):
        export_onnx(model, [x], tmp_path / 'm.onnx', ['x'], ['y'])
    expected = model(x).detach()
    for engine in ENGINES.values():
        assert sqnr(expected, engine(tmp_path / 'm.onnx')(dict(x=x.numpy()))['y']) > LAYER_DB


def test_what_the_linter_says_of_a_norm_that_stays(tmp_path):
    model, x = spread(shared_convolution()), torch.randn(1, 16, 8, 8)
    calibrate(model, [x])
    graph = export_onnx(model, [x], tmp_path / 'm.onnx', ['x'], ['y'])
    assert [f.rule.id for f in lint(Graph(graph)) if f.rule.id == 'Q01'] == ['Q01', 'Q01']


@pytest.mark.parametrize('where', ['whole', 'inside', 'in place'])
def test_compiled_modules_are_exported_as_they_would_be_without(where, tmp_path):
    part, x = spread(odd()), torch.randn(1, 4, 8, 8)
    model = nn.Sequential(part, nn.ReLU())
    calibrate(model, [x])
    wanted = export_onnx(model, [x], tmp_path / 'm.onnx', ['x'], ['y'], target='openvino')
    if where == 'in place':
        if not hasattr(model, 'compile'):
            pytest.skip('torch 2.0 has no nn.Module.compile')
        model.compile()
    else:
        whole = where == 'whole'
        model = torch.compile(model) if whole else nn.Sequential(torch.compile(part), nn.ReLU())
    found = export_onnx(model, [x], tmp_path / 'm.onnx', ['x'], ['y'], target='openvino')
    assert found == wanted


def test_the_manifest_tells_which_norms_stay_and_why(tmp_path):
    detector, x = nn.Module(), torch.randn(1, 16, 8, 8)
    detector.pts_backbone = spread(pre_activation())
    calibrate(detector.pts_backbone, [x])
    for quantized in (False, True):
        export_suite(
            detector, dict(lidar=x), tmp_path, {}, quantized, tell=lambda name: None,
            target='openvino',
        )  # fmt: skip
        entry = json.loads((tmp_path / 'manifest.json').read_text())['files']['fuser.onnx']
        assert entry['nodes']['BatchNormalization'] == 1
        assert entry['batch_norm'] == {
            'pts_backbone.bn1': 'what it reads is not the output of a convolution that can take it'
        }
