"""The whole set of the ResNet-50 BEVFusion against a table: a drop-in for CUDA-BEVFusion."""

import json
from collections import Counter

import onnx
import pytest
import torch

import mmdet3d_quant as mq
from mmdet3d_quant.check.lint import layers, lint, read_graph
from mmdet3d_quant.check.lint.layers import coverage
from mmdet3d_quant.core.compat import removesuffix, strict_zip
from mmdet3d_quant.engines.tensorrt_rtx import compile_onnx, is_installed
from mmdet3d_quant.export import export_suite, generate_inputs
from mmdet3d_quant.export.targets import TARGETS
from mmdet3d_quant.runs import from_config as fc
from tests.small import INT8

#: File -> inputs and outputs with their shapes, in the order in which the runtime binds them.
CONTRACT = {
    'camera.backbone.onnx': (
        {'img': (1, 6, 3, 256, 704), 'depth': (1, 6, 1, 256, 704)},
        {'camera_feature': (6, 32, 88, 80), 'camera_depth_weights': (6, 118, 32, 88)},
    ),
    'camera.vtransform.onnx': (
        {'feat_in': (1, 80, 360, 360)},
        {'feat_out': (1, 80, 180, 180)},
    ),
    'fuser.onnx': (
        {'camera': (1, 80, 180, 180), 'lidar': (1, 256, 180, 180)},
        {'middle': (1, 512, 180, 180)},
    ),
    'head.bbox.onnx': (
        {'middle': (1, 512, 180, 180)},
        {
            'score': (1, 10, 200),
            'rot': (1, 2, 200),
            'dim': (1, 3, 200),
            'reg': (1, 2, 200),
            'height': (1, 1, 200),
            'vel': (1, 2, 200),
        },
    ),
}
LIDAR = 'lidar.backbone.xyz.onnx'


#: Files whose convolutions are all in INT8, and how many convolutions they have.
CONVOLUTIONS = {'camera.backbone.onnx': 63, 'fuser.onnx': 15}
#: Layers in INT8, and their least share of the work; of the head, two that read its map.
INT8_WORK = {
    'camera.backbone.onnx': (63, 0.99),
    'fuser.onnx': (15, 0.99),
    'head.bbox.onnx': (2, 0.9),
}


@pytest.fixture(scope='module')
def detector():
    """A model with random weights and made-up ranges, and its inputs."""
    torch.manual_seed(0)
    model = fc.build_model(fc.read_config(INT8)).eval()
    for module in model.modules():
        if hasattr(module, 'weight_amax'):
            module._weight_quantizer.amax = module.weight_amax()
    for quantizer in mq.quantizers(model).values():
        if quantizer.float_reason is None and not quantizer.calibrated:
            quantizer.amax = 4.0
    return model, generate_inputs(model)


@pytest.fixture(scope='module')
def folder(detector, tmp_path_factory):
    """Its set."""
    out = tmp_path_factory.mktemp('full')
    export_suite(*detector, out, {}, tell=lambda name: None)
    return out


@pytest.mark.slow
def test_names_shapes_types_and_opset(folder):
    manifest = json.loads((folder / 'manifest.json').read_text())
    assert set(manifest['files']) == {*CONTRACT, LIDAR}
    for name, expected in CONTRACT.items():
        model = onnx.load(folder / name)
        assert [(o.domain, o.version) for o in model.opset_import] == [('', 17)]
        for values, wanted in strict_zip((model.graph.input, model.graph.output), expected):
            assert [v.name for v in values] == list(wanted)
            for value in values:
                tensor = value.type.tensor_type
                assert tuple(d.dim_value for d in tensor.shape.dim) == wanted[value.name]
                assert tensor.elem_type == onnx.TensorProto.FLOAT
    lidar = manifest['files'][LIDAR]
    assert lidar['order'] == 'xyz' and lidar['grid'] == [1440, 1440, 41]
    assert [v['shape'] for v in lidar['outputs'].values()] == [[1, 256, 180, 180]]


@pytest.mark.slow
@pytest.mark.parametrize('name', CONTRACT)
def test_nothing_is_found_and_the_work_is_in_int8(folder, name):
    graph = read_graph(folder / name)
    assert lint(graph) == []
    kinds = Counter(node.op_type for node in graph)
    assert not {'Shape', 'If', 'Loop'} & set(kinds)
    # The rows of dim and rot in the runtime's order; any other would compute a shape.
    assert kinds['Gather'] == (2 if name == 'head.bbox.onnx' else 0)
    # All shapes are known: a convolution of unknown size would count for one position.
    assert all(layer.macs > 1000 for layer in layers(graph))
    count, share = INT8_WORK.get(name, (0, 0))
    assert sum(layer.int8 for layer in layers(graph)) == count
    assert coverage(layers(graph)) >= share


@pytest.mark.slow
def test_the_script_builds_what_is_there(folder):
    script = (folder / 'build_engines.sh').read_text()
    for name in CONTRACT:
        flags = '--fp16 --int8 ' if name in INT8_WORK else '--fp16 '
        assert f'build {removesuffix(name, ".onnx")} {flags}--inputIOFormats=fp16:chw' in script
    assert 'build lidar' not in script


@pytest.mark.slow
@pytest.mark.skipif(not is_installed(), reason='TensorRT for RTX is not installed')
@pytest.mark.parametrize('target', [t.name for t in TARGETS.values() if not t.unsigned])
def test_nvidias_compiler_runs_every_convolution_in_int8(detector, target, tmp_path):
    only = [removesuffix(name, '.onnx') for name in CONVOLUTIONS]
    export_suite(*detector, tmp_path, {}, tell=lambda name: None, target=target, only=only)
    for name, count in CONVOLUTIONS.items():
        for sm, verdict in compile_onnx(tmp_path / name).items():
            assert verdict.accepted, (name, sm, verdict.error)
            assert [p.name for p in verdict.products if p.runs_in != 'Int8'] == [], (name, sm)
            assert len(verdict.products) == count
