"""TensorRT as an engine: how its API is used, against a strict one that runs on a CPU."""

import sys
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from mmdet3d_quant import calibrate
from mmdet3d_quant.engines import ENGINES, ONNXRuntime
from mmdet3d_quant.engines import tensorrt as engine_module
from mmdet3d_quant.engines.files import EngineError
from mmdet3d_quant.engines.tensorrt import TensorRT
from mmdet3d_quant.export import export_onnx
from mmdet3d_quant.layers import QuantConv2d
from tests.engines import tensorrt_api


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    """A file with Q/DQ and a float layer, and inputs that lie otherwise in memory."""
    torch.manual_seed(0)
    net = nn.Sequential(QuantConv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    x = torch.randn(1, 3, 8, 9)
    calibrate(net, [x], 'max')
    path = tmp_path_factory.mktemp('tensorrt') / 'net.onnx'
    export_onnx(net, [x], path, ['x'], ['y'])
    return path, dict(x=np.asfortranarray(x.numpy()))


@pytest.fixture
def on_cpu(monkeypatch):
    """Lets the buffers of a GPU lie on the CPU."""
    monkeypatch.setitem(sys.modules, 'tensorrt', tensorrt_api)
    monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    monkeypatch.setattr('torch.cuda.current_stream', lambda: SimpleNamespace(cuda_stream=7))
    fake = SimpleNamespace(**{n: getattr(torch, n) for n in ('cuda', 'from_numpy')})
    fake.empty = lambda shape, dtype, device: torch.empty(shape, dtype=dtype)
    monkeypatch.setattr(engine_module, 'torch', fake)


def test_without_tensorrt_the_error_says_what_to_do(work, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tensorrt', None)
    with pytest.raises(EngineError, match='not installed here.*pip install tensorrt'):
        ENGINES['tensorrt'](work[0])
    monkeypatch.setitem(sys.modules, 'tensorrt', tensorrt_api)
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    with pytest.raises(EngineError, match='needs an NVIDIA GPU'):
        ENGINES['tensorrt'](work[0])


@pytest.mark.usefixtures('on_cpu')
def test_a_file_is_built_run_and_its_plan_loaded_again(work, tmp_path):
    path, inputs = work
    expected, plan = ONNXRuntime(path)(inputs)['y'], tmp_path / 'net.plan'
    for engine in (TensorRT(path, save_plan=plan), TensorRT(plan)):
        assert engine.input_shapes == {'x': (1, 3, 8, 9)}
        for factor in (1, 0):  # the buffers are bound once, and filled anew
            found = engine({'x': inputs['x'] * factor})
            assert list(found) == ['y']
            assert np.allclose(found['y'], expected, atol=1e-6) == bool(factor)
    flags = plan.read_bytes()[len(tensorrt_api.PREFIX) :].partition(b':')[0]
    assert flags == b'FP16,INT8'  # float layers in half precision


@pytest.mark.usefixtures('on_cpu')
def test_why_a_file_cannot_be_built(work, tmp_path):
    model = onnx.load(work[0])
    model.graph.node[-1].domain, model.graph.node[-1].op_type = 'mine', 'Nonsense'
    onnx.save(model, tmp_path / 'net.onnx')
    with pytest.raises(EngineError, match='TensorRT cannot run .*net.onnx: no Nonsense'):
        TensorRT(tmp_path / 'net.onnx')
    (tmp_path / 'other.plan').write_bytes(b'of another GPU')
    with pytest.raises(EngineError, match='built by another version or for another GPU'):
        TensorRT(tmp_path / 'other.plan')


@pytest.mark.usefixtures('on_cpu')
def test_a_build_and_a_run_that_fail_are_errors(work, monkeypatch):
    monkeypatch.setattr(tensorrt_api._Context, 'execute_async_v3', lambda self, stream: False)
    with pytest.raises(EngineError, match='could not run the engine'):
        TensorRT(work[0])(work[1])
    build = lambda self, network, config: None  # noqa: E731
    monkeypatch.setattr(tensorrt_api.Builder, 'build_serialized_network', build)
    with pytest.raises(EngineError, match='net.onnx: the engine could not be built'):
        TensorRT(work[0])


@pytest.mark.parametrize(
    'network, builder, strong, bits',
    [
        (['EXPLICIT_BATCH'], ['FP16', 'INT8'], False, 1),  # TensorRT 8
        (['EXPLICIT_BATCH', 'STRONGLY_TYPED'], ['FP16', 'INT8'], False, 1),  # 10
        (['EXPLICIT_BATCH', 'STRONGLY_TYPED'], ['FP16', 'INT8'], True, 3),
        ([], ['TF32'], True, 0),  # 11
    ],
)
def test_flags_of_networks_by_version(network, builder, strong, bits):
    known = SimpleNamespace(**{name: i for i, name in enumerate(network)})
    flags = SimpleNamespace(**dict.fromkeys(builder, 0))
    trt = SimpleNamespace(
        NetworkDefinitionCreationFlag=known, BuilderFlag=flags, __version__='8.6.1'
    )
    assert engine_module._network_flags(trt, strong) == bits
    if 'FP16' not in builder:
        with pytest.warns(UserWarning, match='export with --target tensorrt11'):
            engine_module._network_flags(trt, False)
    elif len(network) == 1:
        with pytest.raises(ValueError, match='misreads its FP16 scales: .*--target tensorrt8'):
            engine_module._network_flags(trt, True)


@pytest.mark.usefixtures('on_cpu')
def test_a_strongly_typed_file_is_built_without_flags_of_types(work, tmp_path, monkeypatch):
    model = onnx.load(work[0])
    onnx.helper.set_model_props(model, {'mmdet3d_quant.typing': 'strong'})
    onnx.save(model, tmp_path / 'net.onnx')
    seen = []
    build = lambda self, network, config: seen.append(set(config.flags))  # noqa: E731
    monkeypatch.setattr(tensorrt_api.Builder, 'build_serialized_network', build)
    with pytest.raises(EngineError, match='could not be built'):
        TensorRT(tmp_path / 'net.onnx')
    assert seen == [set()]
