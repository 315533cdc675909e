"""FP8 files: types, numbers in two engines, what NVIDIA's compiler runs, and what is refused."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from mmdet3d_quant import calibrate
from mmdet3d_quant.check.lint import lint, read_graph
from mmdet3d_quant.check.verify import sqnr
from mmdet3d_quant.core.modes import set_formats
from mmdet3d_quant.engines import ONNXRuntime, OpenVINO
from mmdet3d_quant.engines.tensorrt_rtx import compile_onnx, is_installed
from mmdet3d_quant.export import export_onnx
from mmdet3d_quant.export.graph import stored_tensors
from mmdet3d_quant.export.half_ranges import round_ranges
from mmdet3d_quant.export.weight_scales import raise_scales
from mmdet3d_quant.layers import QuantConv2d, QuantConvTranspose2d, QuantLinear
from tests.versions import OPENVINO_2025

FP8, INT8 = TensorProto.FLOAT8E4M3FN, TensorProto.INT8
STRONG = ('tensorrt10', 'tensorrt11', 'tensorrt-rtx')


class Net(nn.Module):
    """Convolutions of several kinds and a linear layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = QuantConv2d(8, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = QuantConv2d(16, 16, 3, padding=1, groups=16)
        self.up = QuantConvTranspose2d(16, 8, 2, stride=2)
        self.last = QuantLinear(8, 4)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        return self.last(self.up(self.depthwise(x).relu()).permute(0, 2, 3, 1))


def made(path, formats='fp8', target='tensorrt-rtx', **options):
    net, x = Net().eval(), torch.randn(1, 8, 12, 16)
    set_formats(net, formats)
    calibrate(net, [x], 'max')
    model = export_onnx(net, [x], path, ['x'], ['y'], target=target, **options)
    round_ranges(net)
    return model, net, dict(x=x.numpy())


def test_narrow_channels_keep_their_numbers():
    """Scales that FP16 rounds to zero are raised: FP8's steps shrink with the numbers."""
    torch.manual_seed(0)
    sizes = torch.tensor([1e-3, 1e-5, 8e-6, 4e-6])
    layer = QuantLinear(32, 4, bias=False).eval()
    layer.weight.data = torch.randn(4, 32) * sizes[:, None]
    set_formats(layer, 'fp8')
    x = torch.randn(16, 32)
    calibrate(layer, [x], 'max')
    before = layer._weight_quantizer.amax.flatten() / 448
    assert not before.half().all() and before[0] < 2**-16
    wanted = layer(x).detach()
    raise_scales(layer)
    assert layer._weight_quantizer.amax.div(448).half().all()
    exact = x @ layer.weight.T.detach()
    for channel in range(4):
        was, now = (sqnr(exact[:, channel], y[:, channel]) for y in (wanted, layer(x).detach()))
        assert now > was - 3 and now > 25


def zero_points(model):
    """Types by operator, and whether all values of zero points are zero."""
    stored = stored_tensors(model.graph)
    pairs = [n for n in model.graph.node if n.op_type.endswith('quantizeLinear')]
    pairs += [n for n in model.graph.node if n.op_type == 'QuantizeLinear']
    points = [stored[n.input[2]] for n in pairs]
    assert points and not any(numpy_helper.to_array(p).astype(np.float32).any() for p in points)
    assert all(list(p.dims) == list(stored[n.input[1]].dims) for n, p in zip(pairs, points))
    return {p.data_type for p in points}


@pytest.mark.parametrize('weights', ['float', 'int8'])
@pytest.mark.parametrize('half', [True, False])
def test_a_file_computes_what_fake_quantization_does(tmp_path, weights, half):
    model, net, inputs = made(tmp_path / 'm.onnx', weights=weights, fp16=half)
    assert model.opset_import[0].version == 19 and zero_points(model) == {FP8}
    kinds = {i.data_type for i in model.graph.initializer}
    assert (INT8 in kinds) is False and FP8 in kinds
    with torch.no_grad():
        wanted = net(torch.from_numpy(inputs['x'])).numpy()
    for engine in (ONNXRuntime,) if OPENVINO_2025 else (ONNXRuntime, OpenVINO):
        (found,) = engine(tmp_path / 'm.onnx')(inputs).values()
        assert sqnr(wanted, found.astype(np.float32)) > (40 if half else 45), engine
    assert lint(read_graph(tmp_path / 'm.onnx')) == []


def test_stored_weights_are_the_bytes_of_torchs_cast(tmp_path):
    if not hasattr(torch, 'float8_e4m3fn'):
        pytest.skip('torch 2.1 brought the type')
    model, net, _ = made(tmp_path / 'm.onnx', fp16=False)
    stored = stored_tensors(model.graph)
    pairs = (n for n in model.graph.node if n.op_type == 'DequantizeLinear')
    shapes = {tuple(stored[n.input[0]].dims): n for n in pairs if n.input[0] in stored}
    dq = shapes[16, 1, 3, 3]
    scale = numpy_helper.to_array(stored[dq.input[1]]).reshape(-1, 1, 1, 1)
    steps = net.depthwise.weight.detach() / torch.from_numpy(scale.copy())
    code = steps.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert stored[dq.input[0]].raw_data == code.tobytes()


@pytest.mark.skipif(not is_installed(), reason='TensorRT for RTX is not installed')
def test_nvidias_compiler_runs_every_layer_in_fp8(tmp_path):
    made(tmp_path / 'm.onnx')
    found = compile_onnx(tmp_path / 'm.onnx', ['SM86', 'SM89', 'SM120'])
    assert not found['SM86'].accepted
    for sm in ('SM89', 'SM120'):
        assert {p.op: p.runs_in for p in found[sm].products} == {'Conv': 'FP8', 'MatMul': 'FP8'}
        assert found[sm].fp8 == len(found[sm].products) == 4


def test_int8_and_fp8_in_one_file(tmp_path):
    model, net, inputs = made(tmp_path / 'm.onnx', {'first': 'fp8'})
    assert zero_points(model) == {FP8, INT8}
    with torch.no_grad():
        wanted = net(torch.from_numpy(inputs['x'])).numpy()
    (found,) = ONNXRuntime(tmp_path / 'm.onnx')(inputs).values()
    assert sqnr(wanted, found.astype(np.float32)) > 40
    if is_installed():
        compiled = compile_onnx(tmp_path / 'm.onnx', ['SM89'])['SM89']
        assert [p.runs_in for p in compiled.products] == ['FP8', 'Int8', 'Int8', 'Int8']


@pytest.mark.parametrize('target', ['tensorrt', 'tensorrt8', 'openvino'])
def test_a_target_that_does_not_run_it_is_refused_before_there_is_a_file(tmp_path, target):
    match = 'first._input_quantizer has fp8: take --target tensorrt10 or .*or set `format`'
    with pytest.raises(ValueError, match=match):
        made(tmp_path / 'm.onnx', target=target)
    assert not list(tmp_path.iterdir())


def test_an_opset_without_it_is_refused(tmp_path):
    with pytest.raises(ValueError, match='opset_version must be 19'):
        made(tmp_path / 'm.onnx', opset_version=17)
    model, _, _ = made(tmp_path / 'm.onnx', opset_version=21)
    assert model.opset_import[0].version == 21
    onnx.checker.check_model(model, full_check=True)
