"""The ladder names the step and the layer where something was broken, and nothing where not."""

import copy
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from mmdet3d_quant import calibrate
from mmdet3d_quant.check.ladder import climb, first_fault, missing_points
from mmdet3d_quant.check.probes import module_name, points_of, torch_points
from mmdet3d_quant.check.verify import require_agreement, verify
from mmdet3d_quant.engines import ONNXRuntime, OpenVINO
from mmdet3d_quant.export import Cut, ExportError, export_onnx
from mmdet3d_quant.export.half_ranges import round_ranges
from mmdet3d_quant.export.pairs import store_names, stored_names
from mmdet3d_quant.export.unsigned import make_unsigned, unsigned_names
from mmdet3d_quant.layers import QuantConcat, QuantConv2d, QuantConvTranspose2d

ENGINES = dict(onnxruntime=ONNXRuntime, openvino=OpenVINO)


class Net(nn.Module):
    """A chain, a branch, and a concat that asks one quantizer twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(QuantConv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.down = nn.Sequential(QuantConv2d(16, 16, 3, stride=2, padding=1), nn.ReLU())
        self.up = nn.Sequential(QuantConvTranspose2d(16, 16, 2, stride=2), nn.ReLU())
        self.concat = QuantConcat()
        self.last = QuantConv2d(32, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.last(self.concat([x, self.up(self.down(x))]))


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    """A calibrated net as a cut, and its file."""
    torch.manual_seed(0)
    net, x = Net(), torch.randn(1, 3, 24, 24)
    net.eval()
    nn.init.uniform_(net.stem[1].weight, 0.5, 1.5)
    calibrate(net, [x])
    path = tmp_path_factory.mktemp('ladder') / 'net.onnx'
    export_onnx(net, [x], path, ['x'], ['y'])
    return Cut('net', net, dict(x=x), ('y',)), path


def changed(path, folder, node, index, change):
    """A copy of a file with another constant as an input of a node."""
    model = onnx.load(path)
    target = next(n for n in model.graph.node if n.name == node)
    for made in [*model.graph.node, *model.graph.initializer]:
        if isinstance(made, onnx.TensorProto):
            if made.name == target.input[index]:
                made.CopyFrom(
                    numpy_helper.from_array(change(numpy_helper.to_array(made)), made.name)
                )
        elif made.op_type == 'Constant' and made.output[0] == target.input[index]:
            value = numpy_helper.to_array(made.attribute[0].t)
            made.attribute[0].t.CopyFrom(numpy_helper.from_array(change(value)))
    out = folder / 'changed.onnx'
    onnx.save(model, out)
    return out


def node(path, kind, part):
    return next(n.name for n in onnx.load(path).graph.node if n.op_type == kind and part in n.name)


def test_nothing_is_found_where_nothing_is_wrong(work):
    cut, path = work
    rungs = climb(cut, copy.deepcopy(cut.module), path, ENGINES)
    assert [r.stage for r in rungs] == [
        'float', 'fake-quant', 'reloaded', 'folded', 'onnxruntime', 'openvino', 'FP16'
    ]  # fmt: skip
    assert first_fault(rungs) is None
    for rung in rungs[2:]:
        assert len(rung.layers) == 6 and min(rung.layers.values()) > 60


def test_every_quantizer_of_an_activation_is_found_in_the_file(work):
    cut, path = work
    points = list(torch_points(cut, 'quant'))
    assert 'concat._input_quantizer#2' in points and len(points) == 6
    assert sorted(points_of(onnx.load(path), points).values()) == sorted(points)


@pytest.mark.parametrize(
    ('kind', 'part', 'index', 'layer'),
    [
        ('QuantizeLinear', '/down.0/_input_quantizer', 1, 'down.0'),
        ('DequantizeLinear', '/up.0/_input_quantizer', 1, 'up.0'),
        ('DequantizeLinear', '/up.0/_weight_quantizer', 1, 'up.0'),
        ('QuantizeLinear', '/last/_input_quantizer', 1, 'last'),
    ],
)
def test_a_scale_that_is_five_percent_off_is_named(work, tmp_path, kind, part, index, layer):
    cut, path = work
    name = node(path, kind, part)
    broken = changed(path, tmp_path, name, index, lambda v: (v * 1.05).astype(v.dtype))
    first = first_fault(climb(cut, copy.deepcopy(cut.module), broken, ENGINES))
    assert first.stage == 'onnxruntime' and first.fault.startswith(f'{layer}:'), first


class Wide(nn.Module):
    """Two convolutions, and between them a factor that the second undoes."""

    def __init__(self, factor):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = QuantConv2d(3, 8, 3, padding=1), QuantConv2d(8, 4, 1)
        self.factor = factor

    def forward(self, x):
        return self.last(self.first(x).relu() * self.factor / self.factor)


@pytest.mark.parametrize('target', ['tensorrt8', 'tensorrt11', 'openvino'])
@pytest.mark.parametrize('factor', [1.0, 6e4, 1e6])
def test_what_overflows_in_fp16_is_found_where_the_engine_may_compute_in_it(
    tmp_path, target, factor
):
    """The file for TensorRT 11 keeps it float32, and OpenVINO on a CPU computes in float32."""
    net, x = Wide(factor).eval(), 4 * torch.randn(1, 3, 24, 24)
    calibrate(net, [x], 'max')
    path = tmp_path / 'net.onnx'
    export_onnx(net, [x], path, ['x'], ['y'], target=target)
    module = copy.deepcopy(net)
    if target == 'tensorrt11':
        round_ranges(module)
    elif target == 'openvino':
        make_unsigned(module, unsigned_names(onnx.load(path)))
    cut = Cut('net', module, dict(x=x), ('y',))
    rungs = climb(cut, copy.deepcopy(module), path, ENGINES)
    first = first_fault(rungs)
    if target == 'tensorrt8' and factor > 1:
        assert (
            first.stage == 'FP16' and 'FP16 ends at 65504' in first.fault and '/Mul' in first.fault
        ), first
    else:
        assert first is None, first
    assert ('FP16' in [r.stage for r in rungs]) == (target != 'openvino')


def test_one_weight_is_named(work, tmp_path):
    cut, path = work

    def change(weight):
        weight = weight.copy()
        weight[3, 5, 1, 1] = np.abs(weight[3]).max() * np.where(weight[3, 5, 1, 1] > 0, -1, 1)
        return weight

    name = node(path, 'QuantizeLinear', '/down.0/_weight_quantizer')
    broken = changed(path, tmp_path, name, 0, change)
    first = first_fault(climb(cut, copy.deepcopy(cut.module), broken, ENGINES))
    assert first.stage == 'onnxruntime' and first.fault.startswith('down.0:'), first


def test_what_a_checkpoint_does_not_hold_is_found_at_reloading(work):
    cut, path = work
    other = copy.deepcopy(cut.module)
    with torch.no_grad():
        other.up[0].bias[2] += 0.1
    first = first_fault(climb(cut, other, path, {}))
    assert first.stage == 'reloaded' and first.fault.startswith('up.0:'), first


def test_an_engine_that_is_only_wrong_as_a_whole_is_told_apart(work):
    cut, path = work

    class Broken(ONNXRuntime):
        def __call__(self, inputs):
            outputs = super().__call__(inputs)
            return {**outputs, 'y': outputs['y'] * (1 if len(inputs) > 1 else 1.5)}

    first = first_fault(climb(cut, copy.deepcopy(cut.module), path, dict(broken=Broken)))
    assert first.stage == 'broken' and 'only the whole' in first.fault


def renamed(path, folder, stem):
    """A copy of a file in which nodes and inner tensors have other names."""
    model = onnx.load(path)
    kept = {v.name for v in (*model.graph.input, *model.graph.output)} | {''}
    inner = {o for n in model.graph.node for o in n.output} | {
        i.name for i in model.graph.initializer
    }
    new = {old: f'{stem}{i}' for i, old in enumerate(sorted(inner - kept))}
    for i, n in enumerate(model.graph.node):
        n.name = f'n{i}'
        n.input[:] = [new.get(x, x) for x in n.input]
        n.output[:] = [new.get(x, x) for x in n.output]
    for tensor in model.graph.initializer:
        tensor.name = new.get(tensor.name, tensor.name)
    del model.graph.value_info[:]
    onnx.save(model, folder / 'renamed.onnx')
    return folder / 'renamed.onnx'


def test_a_file_whose_tensors_were_renamed_is_judged_by_its_outputs_and_that_is_told(
    work, tmp_path
):
    cut, path = work
    rungs = climb(cut, copy.deepcopy(cut.module), renamed(path, tmp_path, 't'), ENGINES)
    assert first_fault(rungs) is None
    assert [r.points for r in rungs[1:]] == [(6, 6)] * 3 + [(0, 6)] * 3
    (text,) = missing_points(rungs)
    assert text.startswith('net: 0 of 6 quantizers were found in the file; layers across'), text
    name = node(path, 'QuantizeLinear', '/last/_input_quantizer')
    broken = changed(path, tmp_path, name, 1, lambda v: (v * 1.5).astype(v.dtype))
    first = first_fault(
        climb(cut, copy.deepcopy(cut.module), renamed(broken, tmp_path, 't'), ENGINES)
    )
    assert first.stage == 'onnxruntime' and 'equal inputs' not in first.fault
    assert 'of which 6 quantizer(s) were not found' in first.fault


def test_nodes_that_were_renamed_alone_cost_nothing(work, tmp_path):
    cut, path = work
    model = onnx.load(path)
    for i, n in enumerate(model.graph.node):
        n.name = f'n{i}'
    onnx.save(model, tmp_path / 'nodes.onnx')
    rungs = climb(cut, copy.deepcopy(cut.module), tmp_path / 'nodes.onnx', ENGINES)
    assert first_fault(rungs) is None and rungs[-1].points == (6, 6)


def test_layers_across_a_quantizer_that_is_not_found_are_not_judged_alone(work, tmp_path):
    cut, path = work
    model = onnx.load(path)
    names = stored_names(model)
    lost = next(t for t, n in names.items() if n == 'up.0._input_quantizer')
    store_names(model, {t: n for t, n in names.items() if t != lost})
    onnx.save(model, tmp_path / 'one.onnx')
    rungs = climb(cut, copy.deepcopy(cut.module), tmp_path / 'one.onnx', ENGINES)
    assert first_fault(rungs) is None
    assert rungs[-1].points == (5, 6) and rungs[-1].missing == ('up.0._input_quantizer',)
    assert 'concat._input_quantizer#2' not in rungs[-1].layers and len(rungs[-1].layers) == 4


@pytest.mark.parametrize('factor', [100, 0.01])
def test_a_range_that_does_not_fit_its_tensor_is_named(work, tmp_path, factor):
    cut, _ = work
    net = copy.deepcopy(cut.module)
    net.down[0]._input_quantizer.amax = net.down[0]._input_quantizer.amax * factor
    path = tmp_path / 'wide.onnx'
    export_onnx(net, list(cut.inputs.values()), path, ['x'], ['y'])
    wide = replace(cut, module=net)
    first = first_fault(climb(wide, copy.deepcopy(net), path, ENGINES))
    assert first.stage == 'fake-quant'
    assert '1 range(s) do not fit (least: 10 dB): down.0._input_quantizer: ' in first.fault
    assert ('uses 1.' in first.fault) is (factor > 1), first.fault
    (result,) = verify(wide, path)
    assert result.fault == first.fault
    with pytest.raises(ExportError, match='net.onnx: 1 range.s. do not fit.*down.0._input'):
        require_agreement([result])


def test_a_float_file_has_outputs_to_compare_only(work, tmp_path):
    cut, _ = work
    path = tmp_path / 'float.onnx'
    export_onnx(cut.module, list(cut.inputs.values()), path, ['x'], ['y'], quantized=False)
    rungs = climb(cut, copy.deepcopy(cut.module), path, ENGINES, quantized=False)
    stages = ['float', 'reloaded', 'folded', 'onnxruntime', 'openvino', 'FP16']
    assert [r.stage for r in rungs] == stages
    assert first_fault(rungs) is None and all(r.layers == {} for r in rungs)


@pytest.mark.parametrize(
    ('node_name', 'module'),
    [
        ('/a/a.0/conv/_input_quantizer/QuantizeLinear', 'a.0.conv._input_quantizer'),
        ('/a/a.1/a.1.2/QuantizeLinear_1', 'a.1.2'),
        ('Conv_7', ''),
    ],
)
def test_names_of_nodes_are_names_of_modules(node_name, module):
    assert module_name(node_name) == module
