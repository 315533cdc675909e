"""The linter: silent on a good graph, and every planted defect found by its rule."""

import copy
import importlib.util
import json
import sys
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
import torchvision
from mmdet3d.registry import MODELS
from onnx import TensorProto, helper, numpy_helper
from pytorch_quantization import nn as stock
from torch import nn

from mmdet3d_quant import calibrate, set_mode
from mmdet3d_quant.check.lint import RULES, Graph, LintError, layers, lint, read_graph, reformats
from mmdet3d_quant.check.lint.layers import coverage
from mmdet3d_quant.check.lint.picture import draw
from mmdet3d_quant.export import export_onnx
from mmdet3d_quant.export import onnx as exporter
from mmdet3d_quant.export.tracing import TRACED
from mmdet3d_quant.layers import QuantConv2d, QuantConvTranspose2d, QuantLinear
from tests.check.planted import PLANTED
from tests.small import ROOT

sys.path.insert(0, str(ROOT / 'tools'))


def tool():
    spec = importlib.util.spec_from_file_location('tool_lint', ROOT / 'tools/lint_onnx.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOOL = tool()


class Net(nn.Module):
    """A ResNet, its neck, and a transposed convolution."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.img_backbone = MODELS.build(
            dict(type='QuantResNet', depth=50, base_channels=8, out_indices=(1, 2, 3))
        )
        self.img_neck = MODELS.build(
            dict(
                type='QuantGeneralizedLSSFPN',
                in_channels=[64, 128, 256],
                out_channels=16,
                num_outs=3,
                upsample_cfg=dict(mode='bilinear', align_corners=False),
            )
        )
        self.up = QuantConvTranspose2d(16, 24, 3, stride=2)

    def forward(self, x):
        return self.up(self.img_neck(self.img_backbone(x))[0])


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp('lint') / 'good.onnx'
    net = Net().eval()
    x = torch.randn(1, 3, 64, 96)
    calibrate(net, [x])
    export_onnx(net, [x], path, ['img'], ['out'])
    return path


class Edit:
    """A model under the knife."""

    def __init__(self, model):
        self.model = copy.deepcopy(model)
        self.graph = self.model.graph
        self.look = Graph(self.model)

    def conv(self, i=10, kind='Conv'):
        return list(self.look.of(kind))[i]

    def of(self, kind, i=0):
        return list(self.look.of(kind))[i]

    def activation(self, conv):
        """Q and DQ on the input of a convolution."""
        pair = self.look.pair(conv.input[0])
        return pair.q, pair.dq

    def weight(self, conv):
        pair = self.look.pair(conv.input[1])
        return pair.q, pair.dq

    def constant(self, value):
        name = f'planted{len(self.graph.initializer)}'
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def insert(self, kind, inputs, before, **attributes):
        """A new node before another one; returns its output."""
        name = f'planted{len(self.graph.node)}'
        node = helper.make_node(kind, inputs, [name], name=name, **attributes)
        at = next(i for i, n in enumerate(self.graph.node) if n is before or n == before)
        self.graph.node.insert(at, node)
        return name

    def qdq(self, tensor, before, scale=0.1, zero=None):
        s = self.constant(np.float32(scale))
        z = self.constant(np.int8(0) if zero is None else zero)
        return self.insert(
            'DequantizeLinear',
            [self.insert('QuantizeLinear', [tensor, s, z], before), s, z],
            before,
        )

    def scale(self, nodes, change):
        """Replaces the scale of some nodes."""
        value = self.look.constant(nodes[0].input[1])
        name = self.constant(np.asarray(change(value.copy())).astype(np.float32))
        for node in nodes:
            node.input[1] = name

    def zero(self, nodes, value):
        name = self.constant(value)
        for node in nodes:
            node.input[2] = name


def factor(number):
    return lambda scale: scale * number


def one_entry(number):
    def change(scale):
        scale.flat[0] = number
        return scale

    return change


def batch_norm(e):
    conv = e.conv()
    reader = e.look.readers[conv.output[0]][0][0]
    c = e.look.constant(e.weight(conv)[0].input[0]).shape[0]
    ones = [e.constant(np.ones(c, np.float32)) for _ in range(4)]
    reader.input[0] = e.insert('BatchNormalization', [conv.output[0], *ones], reader)


def float_conv(e):
    conv = e.conv()
    conv.input[0], conv.input[1] = e.activation(conv)[0].input[0], e.weight(conv)[0].input[0]


def passing(e, which):
    conv = e.conv()
    conv.input[which] = e.insert('Relu', [conv.input[which]], conv)


def before_relu(e):
    relu = next(n for n in e.look.of('Relu') if e.look.producer[n.input[0]].op_type == 'Conv')
    relu.input[0] = e.qdq(relu.input[0], relu)


def bias(e):
    conv = e.conv()
    conv.input[2] = e.qdq(conv.input[2], conv)


def identity_add(e):
    """The add of a block without downsample: its identity branch from DQ to float."""
    for add in e.look.of('Add'):
        for i, tensor in enumerate(add.input):
            pair = e.look.pair(tensor)
            if pair is not None:
                add.input[i] = pair.source
                return


def add_scales(e):
    """Both branches quantized, with scales of their own."""
    add = e.of('Add')
    for i, tensor in enumerate(list(add.input)):
        if e.look.pair(tensor) is None:
            add.input[i] = e.qdq(tensor, add, 0.37)


def joined(e):
    """A concat of maps; others put shapes together."""
    return next(n for n in e.look.of('Concat') if e.look.pair(n.input[0]) is not None)


def concat_scale(e):
    concat = joined(e)
    pair = e.look.pair(concat.input[0])
    e.scale([pair.q, pair.dq], factor(2))


def concat_mixed(e):
    concat = joined(e)
    concat.input[0] = e.look.pair(concat.input[0]).source


def several(e):
    """One of two readers of a tensor."""
    for readers in e.look.readers.values():
        found = [n for n, _ in readers if n.op_type == 'QuantizeLinear']
        if len(found) > 1:
            dq = e.look.readers[found[0].output[0]][0][0]
            e.scale([found[0], dq], factor(1.5))
            return
    raise AssertionError('no tensor with two readers')


def double(e):
    q, _ = e.activation(e.conv())
    q.input[0] = e.qdq(q.input[0], q)


def computed_scale(e):
    q, dq = e.activation(e.conv())
    q.input[1] = dq.input[1] = e.insert('Abs', [q.input[1]], q)


def axis(e, kind, wrong):
    for node in e.weight(e.conv(0 if kind == 'ConvTranspose' else 10, kind)):
        next(a for a in node.attribute if a.name == 'axis').i = wrong


def count(e):
    nodes = e.weight(e.conv())
    e.scale(nodes, lambda s: s[:-1])
    e.zero(nodes, np.zeros(e.look.constant(nodes[0].input[2]).size - 1, np.int8))


def per_channel(e):
    q, dq = e.activation(e.conv())
    e.scale([q, dq], lambda s: np.full(8, s))
    e.zero([q, dq], np.zeros(8, np.int8))


def no_dq(e):
    conv = e.conv()
    conv.input[0] = e.activation(conv)[0].output[0]


def output_q(e):
    q, _ = e.activation(e.conv())
    e.graph.output.append(helper.make_tensor_value_info(q.output[0], TensorProto.INT8, None))


def no_zero_point(e):
    for node in e.activation(e.conv()):
        del node.input[2]


def stored(e, index, value):
    """One value of the weight or bias of a convolution that is not finite."""
    conv = e.conv()
    name = conv.input[index] if index == 2 else e.weight(conv)[0].input[0]
    tensor = next(i for i in e.graph.initializer if i.name == name)
    array = numpy_helper.to_array(tensor).copy()
    array.flat[0] = value
    tensor.CopyFrom(numpy_helper.from_array(array, name))


def long_bias(e, i=10, kind='Conv'):
    conv = e.conv(i, kind)
    steps = e.look.pair(conv.input[0]).scale * e.look.pair(conv.input[1]).scale
    conv.input[2] = e.constant((steps * np.eye(1, steps.size) * 2.0**32)[0].astype(np.float32))


DEFECTS = {
    'batch norm': ('Q01', batch_norm),
    'input float': (
        'Q02',
        lambda e: e.conv().input.__setitem__(0, e.activation(e.conv())[0].input[0]),
    ),
    'weight float': (
        'Q03',
        lambda e: e.conv().input.__setitem__(1, e.weight(e.conv())[0].input[0]),
    ),
    'deconv weight float': (
        'Q03',
        lambda e: e.conv(0, 'ConvTranspose').input.__setitem__(
            1, e.weight(e.conv(0, 'ConvTranspose'))[0].input[0]
        ),
    ),
    'float island': ('Q04', float_conv),
    'op on the input': ('Q05', lambda e: passing(e, 0)),
    'op on the weight': ('Q05', lambda e: passing(e, 1)),
    'before the activation': ('Q06', before_relu),
    'bias': ('Q07', bias),
    'add scales': ('Q10', add_scales),
    'identity float': ('Q11', identity_add),
    'concat scales': ('Q12', concat_scale),
    'concat mixed': ('Q13', concat_mixed),
    'two scales of a tensor': ('Q14', several),
    'double': ('Q15', double),
    'zero point': ('Q20', lambda e: e.zero(e.activation(e.conv()), np.int8(3))),
    'weight zero point': (
        'Q20',
        lambda e: e.zero(
            e.weight(e.conv()),
            np.eye(1, e.look.constant(e.weight(e.conv())[0].input[2]).size, dtype=np.int8)[0],
        ),
    ),
    'unsigned': ('Q21', lambda e: e.zero(e.activation(e.conv()), np.uint8(0))),
    'no zero point': ('Q21', no_zero_point),
    'NaN scale': ('Q22', lambda e: e.scale(e.activation(e.conv()), factor(np.nan))),
    'infinite weight scale': ('Q22', lambda e: e.scale(e.weight(e.conv()), one_entry(np.inf))),
    'scale 0': ('Q23', lambda e: e.scale(e.activation(e.conv()), factor(0))),
    'weight scale 0': ('Q23', lambda e: e.scale(e.weight(e.conv()), one_entry(0))),
    'negative scale': ('Q23', lambda e: e.scale(e.activation(e.conv()), factor(-1))),
    'denormal scale': ('Q24', lambda e: e.scale(e.activation(e.conv()), one_entry(1e-40))),
    'tiny weight scale': ('Q24', lambda e: e.scale(e.weight(e.conv()), one_entry(1e-12))),
    'scale 0 in FP16': ('Q24', lambda e: e.scale(e.weight(e.conv()), one_entry(2.0**-25))),
    'huge scale': ('Q25', lambda e: e.scale(e.activation(e.conv()), one_entry(1e9))),
    'dead range': ('Q26', lambda e: e.scale(e.activation(e.conv()), one_entry(2.0**-24 / 127))),
    'NaN weight': ('Q33', lambda e: stored(e, 1, np.nan)),
    'infinite bias': ('Q33', lambda e: stored(e, 2, np.inf)),
    'computed scale': ('Q27', computed_scale),
    'conv axis': ('Q28', lambda e: axis(e, 'Conv', 1)),
    'deconv axis': ('Q28', lambda e: axis(e, 'ConvTranspose', 0)),
    'number of scales': ('Q29', count),
    'activation per channel': ('Q30', per_channel),
    'Q and DQ disagree': ('Q31', lambda e: e.scale(e.activation(e.conv())[1:], factor(2))),
    'no DQ': ('Q32', no_dq),
    'integers as output': ('Q32', output_q),
    'bias beyond INT32': ('Q34', long_bias),
    'deconv bias beyond INT32': ('Q34', lambda e: long_bias(e, 0, 'ConvTranspose')),
}


#: Their cases are in `test_lint_engines.py`.
ONLY_TENSORRT8 = {'Q35', 'Q40'}


def test_the_good_graph_has_no_findings_and_is_int8_throughout(good):
    graph = read_graph(good)
    assert lint(graph) == []
    found = layers(graph)
    assert len(found) == 53 + 4 + 1 and coverage(found) == 1


def test_every_rule_has_a_defect():
    found = {wanted for wanted, _ in DEFECTS.values()} | {case.rule for case in PLANTED.values()}
    assert found | ONLY_TENSORRT8 == {rule.id for rule in RULES}


@pytest.mark.parametrize('name', DEFECTS)
def test_a_planted_defect_is_found_by_its_rule(name, good):
    wanted, plant = DEFECTS[name]
    edit = Edit(onnx.load(good))
    plant(edit)
    found = lint(Graph(edit.model))
    assert wanted in {f.rule.id for f in found}, [(f.rule.id, f.node, f.detail) for f in found]
    # Few others: what follows from the same defect.
    assert len({f.rule.id for f in found}) <= 3
    assert all(f.node and f.rule.why and f.rule.mend for f in found)
    assert all(f.effect is f.rule.effects[f.case]['tensorrt8'] for f in found)
    assert wanted not in {f.rule.id for f in lint(Graph(edit.model), ignore=[wanted])}


def test_multiply_accumulates_are_those_of_the_layers(good):
    net, x, counted = Net().eval(), torch.randn(1, 3, 64, 96), []

    def count(module, inputs, output):
        weight = module.weight
        where = inputs[0] if isinstance(module, nn.ConvTranspose2d) else output
        counted.append(where.shape[0] * where.shape[2] * where.shape[3] * weight.numel())

    for module in net.modules():
        if isinstance(module, (QuantConv2d, QuantConvTranspose2d)):
            module.register_forward_hook(count)
    with set_mode(net, 'float'), torch.no_grad():
        net(x)
    assert sorted(layer.macs for layer in layers(read_graph(good))) == sorted(counted)


def test_a_graph_that_stock_quantizers_made_without_ties(tmp_path):
    """Residual branches stay float and tensors get a scale per reader: that is what is told."""
    net = Net().eval()
    x = torch.randn(1, 3, 64, 96)
    calibrate(net, [x], 'max')
    for name, module in list(net.named_modules()):
        if hasattr(module, 'residual_quantizer'):
            module.residual_quantizer.keep_float('stock has none')
        if name.endswith('downsample.0') or type(module).__name__ == 'QuantConcat':
            quantizer = module._input_quantizer
            quantizer.amax = quantizer.amax * 1.1
            module.quant_ties = lambda: []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, 'unequal_ties', lambda model: [])
        export_onnx(net, [x], tmp_path / 'stock.onnx', ['img'], ['out'])
    found = {f.rule.id for f in lint(read_graph(tmp_path / 'stock.onnx'))}
    assert found == {'Q11', 'Q14'}


def stock_resnet(folded):
    """torchvision's ResNet-18 with pytorch-quantization's layers, calibrated by its own means."""
    torch.manual_seed(0)
    net = torchvision.models.resnet18(weights=None).eval()
    for name, conv in list(net.named_modules()):
        if isinstance(conv, nn.Conv2d):
            sizes = conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding
            new = stock.QuantConv2d(*sizes, bias=folded)
            new.weight = conv.weight
            if folded:  # as folding a batch norm that was just initialised does
                nn.init.zeros_(new.bias)
            net.get_submodule(name.rpartition('.')[0])._modules[name.rpartition('.')[2]] = new
        if folded and isinstance(conv, nn.BatchNorm2d):
            net.get_submodule(name.rpartition('.')[0])._modules[name.rpartition('.')[2]] = (
                nn.Identity()
            )
    found = [m for m in net.modules() if isinstance(m, stock.TensorQuantizer)]
    for quantizer in found:
        quantizer.disable_quant()
        quantizer.enable_calib()
    with torch.no_grad():
        net(torch.randn(1, 3, 64, 64))
    for quantizer in found:
        quantizer.load_calib_amax()
        quantizer.enable_quant()
        quantizer.disable_calib()
    return net


@pytest.mark.parametrize('folded', [False, True])
def test_a_graph_of_stock_pytorch_quantization(folded, tmp_path, monkeypatch):
    """Its export, with nothing of ours: 20 convolutions, 8 residual adds."""
    monkeypatch.setattr(stock.TensorQuantizer, 'use_fb_fake_quant', True)
    path = tmp_path / 'stock.onnx'
    net, x = stock_resnet(folded), torch.randn(1, 3, 64, 64)
    torch.onnx.export(net, x, path, opset_version=13, **TRACED)
    graph = read_graph(path)
    *convolutions, last = layers(graph)  # its linear layer stays float
    assert coverage(convolutions) == 1 and len(convolutions) == 20 and not last.int8
    found = Counter(f.rule.id for f in lint(graph))
    assert found == Counter(Q11=8) + (Counter() if folded else Counter(Q01=20))


def conversions(model):
    return Counter((r.kind, r.layer) for r in reformats(Graph(model)))


def test_conversions_of_the_good_graph_are_its_input_and_what_is_interpolated(good):
    model = onnx.load(good)
    assert conversions(model) == {
        ('to INT8', '/img_backbone/conv1/Conv'): 1,
        ('to INT8', '/img_neck/lateral_convs.1/conv/Conv'): 1,
        ('to INT8', '/img_neck/lateral_convs.0/conv/Conv'): 1,
    }


def test_planted_conversions_are_found_where_they_are(good):
    before = conversions(onnx.load(good))
    edit = Edit(onnx.load(good))
    float_conv(edit)  # its output goes back to INT8, before the next convolution
    behind = edit.conv(11).name
    assert conversions(edit.model) - before == {('to INT8', behind): 1}
    edit = Edit(onnx.load(good))
    passing(edit, 0)  # on a dequantized tensor, before a convolution
    added = conversions(edit.model) - before
    assert added[('to float', edit.conv().name)] == 1  # and the float convolution's output
    assert set(added) == {('to float', edit.conv().name), ('to INT8', behind)}
    edit = Edit(onnx.load(good))
    _, dq = edit.activation(edit.conv())
    edit.graph.output.append(helper.make_tensor_value_info(dq.output[0], TensorProto.FLOAT, None))
    assert sum((conversions(edit.model) - before).values()) == 1
    edit = Edit(onnx.load(good))
    batch_norm(edit)  # float, so its output is converted
    assert [kind for kind, _ in conversions(edit.model) - before] == ['to INT8']


def test_the_picture_shows_every_conversion(good):
    graph = read_graph(good)
    axes = draw(layers(graph), lint(graph), 'good', reformats(graph)).axes[0]
    up, down = axes.get_lines()
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert {names[int(row)] for row in up.get_ydata()} == {
        '/img_backbone/conv1/Conv',
        '/img_neck/lateral_convs.1/conv/Conv',
        '/img_neck/lateral_convs.0/conv/Conv',
    }
    assert len(down.get_ydata()) == 0
    told = [text.get_text() for text in axes.get_legend().get_texts()]
    assert told == ['INT8', 'float', 'conversion to INT8: 3', 'conversion to float: 0']


def test_a_float_graph_has_no_findings_and_no_coverage(tmp_path):
    path = tmp_path / 'float.onnx'
    export_onnx(Net().eval(), [torch.randn(1, 3, 64, 96)], path, ['img'], ['out'], quantized=False)
    graph = read_graph(path)
    assert lint(graph) == [] and coverage(layers(graph)) == 0
    assert TOOL.main([str(path), '--allow-float']) == 0
    with pytest.raises(LintError, match='no Q/DQ'):
        TOOL.main([str(path)])


def test_the_tool_tells_people_and_programs(good, tmp_path, capsys):
    assert TOOL.main([str(good), '--min-coverage', '0.99']) == 0
    assert '58 of 58 convolutions in INT8, 100.0%' in capsys.readouterr().out
    edit = Edit(onnx.load(good))
    float_conv(edit)
    bad = tmp_path / 'bad.onnx'
    onnx.save(edit.model, bad)
    out, picture = tmp_path / 'lint.json', tmp_path / 'bad.png'
    assert TOOL.main([str(bad), '--json', str(out), '--picture', str(picture)]) == 1
    told = ' '.join(capsys.readouterr().out.split())
    assert 'Q04 float layer between INT8 layers' in told and '57 of 58' in told
    report = json.loads(out.read_text())[str(bad)]
    assert report['findings'][0]['id'] == 'Q04' and report['findings'][0]['mend']
    assert sum(not layer['int8'] for layer in report['layers']) == 1
    assert picture.read_bytes().startswith(b'\x89PNG')
    assert TOOL.main([str(bad), '--ignore', 'Q04', 'Q14']) == 0
    assert TOOL.main([str(bad), '--ignore', 'Q04', 'Q14', '--min-coverage', '1']) == 1


def test_bad_files_and_arguments(good, tmp_path, monkeypatch):
    cut = tmp_path / 'cut.onnx'
    cut.write_bytes(good.read_bytes()[:-1000])
    text = tmp_path / 'text.onnx'
    text.write_text('hello, this is not a model')
    (tmp_path / 'empty.onnx').write_bytes(b'')
    for path, message in (
        (cut, 'cut off'),
        (text, 'no ONNX file'),
        (tmp_path / 'empty.onnx', 'no ONNX file'),
        (tmp_path / 'none.onnx', 'does not exist'),
    ):
        with pytest.raises(LintError, match=message):
            read_graph(path)
    outside = tmp_path / 'outside.onnx'
    onnx.save(
        onnx.load(good),
        outside,
        save_as_external_data=True,
        location='weights.bin',
        size_threshold=0,
    )
    assert lint(read_graph(outside)) == []
    (tmp_path / 'weights.bin').unlink()
    with pytest.raises(LintError, match='another file'):
        read_graph(outside)
    monkeypatch.setattr('mmdet3d_quant.check.lint.graph.LARGEST', 1000)
    with pytest.raises(LintError, match='save_as_external_data'):
        read_graph(good)
    with pytest.raises(ValueError, match='no rule Q99'):
        lint(Graph(onnx.load(good)), ['Q99'])
    for args in (
        [],
        [str(good), str(good), '--picture', 'x.png'],
        [str(good), '--min-coverage', '7'],
    ):
        with pytest.raises(SystemExit):
            TOOL.main(args)


class Linears(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = QuantLinear(16, 32), QuantLinear(32, 8)

    def forward(self, x):
        return self.b(self.a(x).relu())


@pytest.mark.parametrize('shape', [(6, 16), (2, 3, 16)])  # Gemm, and MatMul
def test_linear_layers_are_layers(shape, tmp_path):
    net, x = Linears().eval(), torch.randn(shape)
    calibrate(net, [x])
    model = export_onnx(net, [x], tmp_path / 'm.onnx', ['x'], ['y'])
    graph = Graph(model)
    assert lint(graph) == [] and reformats(graph)[1:] == []
    assert [(k.macs, k.int8) for k in layers(graph)] == [(6 * 16 * 32, True), (6 * 32 * 8, True)]
    kind = 'Gemm' if len(shape) == 2 else 'MatMul'

    def planted(plant):
        edit = Edit(model)
        plant(edit, [n for n in edit.model.graph.node if n.op_type == kind][1])
        graph = Graph(edit.model)
        return {f.rule.id for f in lint(graph)}, [k.int8 for k in layers(graph)]

    def float_input(edit, node):
        node.input[0] = edit.look.pair(node.input[0]).source

    def float_weight(edit, node):
        reader = edit.look.producer[node.input[1]] if kind == 'MatMul' else node
        reader.input[0 if kind == 'MatMul' else 1] = edit.look.weight_pair(node).source

    def other_axis(edit, node):
        pair = edit.look.weight_pair(node)
        for n in (pair.q, pair.dq):
            (axis,) = (a for a in n.attribute if a.name == 'axis')
            axis.i = 1

    assert planted(float_input) == ({'Q02'}, [True, False])
    assert planted(float_weight) == ({'Q03'}, [True, False])
    found, int8 = planted(other_axis)
    assert 'Q28' in found and int8 == [True, False]
