"""Strongly typed files: FP16 but for what FP16 cannot hold, INT8 between Q/DQ."""

import copy

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import nn

from mmdet3d_quant import calibrate
from mmdet3d_quant.check.lint import lint, read_graph
from mmdet3d_quant.check.verify import sqnr
from mmdet3d_quant.core.formats import INT8
from mmdet3d_quant.engines import ONNXRuntime, OpenVINO
from mmdet3d_quant.engines.tensorrt_rtx import compile_onnx, is_installed
from mmdet3d_quant.export import ExportError, export_onnx
from mmdet3d_quant.export.half_ranges import half_range
from mmdet3d_quant.export.typed import kept_float32
from mmdet3d_quant.layers import QuantConv2d

HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT


class Net(nn.Module):
    """Two INT8 convolutions, and between them numbers that grow by a factor."""

    def __init__(self, factor=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = QuantConv2d(3, 8, 3, padding=1), QuantConv2d(8, 4, 1)
        self.factor = factor

    def forward(self, x):
        x = self.first(x).relu() * self.factor
        return self.last(x / self.factor), x.mean((2, 3)) / self.factor


def made(net, path, target='tensorrt-rtx', **options):
    x = torch.randn(1, 3, 12, 16)
    calibrate(net, [x], 'max')
    model = export_onnx(net, [x], path, ['x'], ['y', 'z'], target=target, **options)
    return model, dict(x=x.numpy())


def kinds(values):
    return [v.type.tensor_type.elem_type for v in values]


@pytest.mark.parametrize('weights', ['float', 'int8'])
def test_all_is_fp16_where_it_fits_and_the_numbers_are_those_of_float32(weights, tmp_path):
    net = Net().eval()
    model, inputs = made(net, tmp_path / 'half.onnx', weights=weights)
    single, _ = made(net, tmp_path / 'single.onnx', fp16=False)
    assert kinds([*model.graph.input, *model.graph.output]) == [HALF] * 3
    assert kinds([*single.graph.input, *single.graph.output]) == [FLOAT] * 3
    assert kept_float32(model) == {} and lint(read_graph(tmp_path / 'half.onnx')) == []
    expected = ONNXRuntime(tmp_path / 'single.onnx')(inputs)
    for engine in (ONNXRuntime, OpenVINO):
        found = engine(tmp_path / 'half.onnx')(inputs)
        assert all(sqnr(expected[n], found[n]) > 30 for n in expected)


@pytest.mark.parametrize('factor, word', [(1e5, 'reaches'), (1e-7, 'stays within'), (900, 'sums')])
def test_what_fp16_cannot_hold_stays_float32_with_its_reason(factor, word, tmp_path):
    """The same graph in FP16 throughout would give infinity, zero, or an overflowing mean."""
    net = Net(factor).eval()
    model, inputs = made(net, tmp_path / 'half.onnx', quantized=False)
    reasons = kept_float32(model)
    assert reasons and any(word in text for text in reasons.values())
    assert not any('Conv' in name for name in reasons) or factor != 900
    found = ONNXRuntime(tmp_path / 'half.onnx')(inputs)
    with torch.no_grad():
        expected = copy.deepcopy(net)
        for layer in (expected.first, expected.last):
            layer._input_quantizer.mode = layer._weight_quantizer.mode = 'float'
        wanted = expected(torch.from_numpy(inputs['x']))
    assert all(sqnr(w, f) > 50 for w, f in zip(wanted, found.values()))


def test_inputs_and_outputs_are_fp16_and_beyond_it_an_error(tmp_path):
    """The runtime hands over FP16 whatever the file would rather have."""

    class Scaled(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def forward(self, x):
            return x * self.factor

    def made_with(factor):
        return export_onnx(
            Scaled(factor), [torch.ones(1, 3) * 9000], tmp_path / 'm.onnx', ['x'], ['y'],
            quantized=False, target='tensorrt11',
        )  # fmt: skip

    model = made_with(2.0)
    assert kinds([*model.graph.input, *model.graph.output]) == [HALF] * 2
    assert any(
        'reaches 1.8e' in text or 'reaches 9e' in text for text in kept_float32(model).values()
    )
    assert ONNXRuntime(tmp_path / 'm.onnx')(dict(x=np.full((1, 3), 9000, 'f4')))['y'].max() == 18000
    with pytest.raises(ExportError, match='y reaches 9e.04, beyond the 65504 of FP16'):
        made_with(10.0)


def test_attention_over_a_large_map_is_a_mean_and_stays_fp16(tmp_path):
    """A row of a softmax sums to one, so 70,000 keys of values up to 4 stay within 4."""

    class Attention(nn.Module):
        def forward(self, q, k, v):
            return (q @ k.transpose(1, 2)).softmax(-1) @ v

    keys = 20000
    inputs = [torch.randn(1, 4, 8), torch.randn(1, keys, 8), torch.randn(1, keys, 8)]
    model = export_onnx(
        Attention(), inputs, tmp_path / 'm.onnx', ['q', 'k', 'v'], ['y'],
        quantized=False, target='tensorrt11',
    )  # fmt: skip
    assert kept_float32(model) == {}


@pytest.mark.parametrize('amax', [1e-7, 0.3, 4.0, 123.456, 6e6, 1e9])
def test_a_range_is_moved_to_the_nearest_scale_of_fp16(amax):
    amax = torch.tensor([amax])
    expected = np.float32(amax.item() / 127).astype(np.float16)
    found = half_range(amax, INT8)
    if 0 < expected < np.inf:
        assert (found / 127).item() == float(expected)  # to the bit, so the file has it
    else:
        assert found.item() == amax.item()


def test_the_compiler_takes_it_with_both_convolutions_in_int8(tmp_path):
    if not is_installed():
        pytest.skip('the compiler is not installed')
    for factor in (1.0, 1e5):
        made(Net(factor).eval(), tmp_path / 'net.onnx')
        (verdict,) = compile_onnx(tmp_path / 'net.onnx', ['SM86']).values()
        assert verdict.accepted, verdict.error
        assert verdict.int8 == len(verdict.products) == 2


@pytest.mark.parametrize('options', [{}, dict(target='tensorrt', fp16=True)])
def test_a_weight_beyond_fp16_is_an_error_with_layer_and_channel(options, tmp_path):
    conv = nn.Conv2d(3, 4, 1)
    with torch.no_grad():
        conv.weight[2, 1] = 1e5
    options = dict(dict(target='tensorrt11'), **options)
    with pytest.raises(ExportError, match='/?Conv: channel 2 of .*weight reaches 1e.05'):
        export_onnx(
            conv, [torch.ones(1, 3, 2, 2)], tmp_path / 'm.onnx', ['x'], ['y'],
            quantized=False, **options,
        )  # yapf: disable  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_scales_that_fp16_does_not_have_are_an_error_that_counts_them(tmp_path):
    net = Net().eval()
    x = torch.randn(1, 3, 12, 16)
    calibrate(net, [x], 'max')
    net.first._input_quantizer.amax = 1e-6
    with pytest.raises(ExportError, match='first._input_quantizer: 1 of 1 scale.* 0 in FP16'):
        export_onnx(net, [x], tmp_path / 'm.onnx', ['x'], ['y', 'z'], target='tensorrt11')


def test_arguments_of_strongly_typed_targets(tmp_path):
    net = Net().eval()
    for options, message in (
        (dict(opset_version=17), r'must be 19 \(the first with FP16 scales\) to 21, not 17'),
        (dict(layernorm='custom'), 'tensorrt11 has no custom layer norm: take tensorrt8'),
    ):
        with pytest.raises(ValueError, match=message):
            made(net, tmp_path / 'm.onnx', 'tensorrt11', **options)
    assert {o.version for o in made(net, tmp_path / 'm.onnx')[0].opset_import} == {19}
    stored = [i for i in onnx.load(tmp_path / 'm.onnx').graph.initializer if len(i.dims) == 4]
    assert {np.dtype(onnx.numpy_helper.to_array(i).dtype) for i in stored} == {np.dtype('int8')}


def test_another_name_of_a_target_gives_the_same_graph(tmp_path):
    graphs = [
        made(Net().eval(), tmp_path / 'm.onnx', t)[0].graph for t in ('tensorrt', 'tensorrt8')
    ]
    assert [g.SerializeToString() for g in graphs].count(graphs[0].SerializeToString()) == 2
