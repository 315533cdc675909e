"""Channels with next to no weights: FP16 and every engine can hold their scales and biases."""

import copy
import itertools

import numpy as np
import onnx
import pytest
import torch
from mmdet3d.models.layers import SparseBasicBlock
from torch import nn

from mmdet3d_quant import calibrate
from mmdet3d_quant.check.lint import lint, read_graph
from mmdet3d_quant.check.lint.profiles import profile_of
from mmdet3d_quant.check.verify import sqnr
from mmdet3d_quant.core.quantizer import Quantizer
from mmdet3d_quant.engines import ONNXRuntime, OpenVINO
from mmdet3d_quant.export import export_onnx
from mmdet3d_quant.export.sparse import trace
from mmdet3d_quant.export.sparse.run import ScnNetwork
from mmdet3d_quant.export.targets import TARGETS
from mmdet3d_quant.export.unsigned import unsigned_names, with_unsigned
from mmdet3d_quant.export.weight_scales import raise_scales
from mmdet3d_quant.files.typed import to_float32
from mmdet3d_quant.layers import QuantConcat, QuantConv2d, QuantConvTranspose2d, QuantLinear
from mmdet3d_quant.models.resnet import QuantBasicBlock
from tests.export.sparse.encoders import build, cloud

LAYERS = {
    'conv': lambda: QuantConv2d(8, 8, 3, padding=1),
    'pointwise': lambda: QuantConv2d(8, 8, 1),
    'strided': lambda: QuantConv2d(8, 8, 3, stride=2, dilation=2),
    'grouped': lambda: QuantConv2d(8, 8, 3, padding=1, groups=2),
    'depthwise': lambda: QuantConv2d(8, 8, 3, padding=1, groups=8),
    'tiles': lambda: QuantConvTranspose2d(8, 8, 2, stride=2),
    'transposed': lambda: QuantConvTranspose2d(8, 8, 4, stride=2, padding=1),
    'transposed grouped': lambda: QuantConvTranspose2d(8, 16, 3, stride=2, groups=2),
    'linear': lambda: QuantLinear(8, 8),
    'linear of tokens': lambda: QuantLinear(8, 8),
}
INPUTS = {'maps': (1, 8, 6, 6), 'linear': (4, 8), 'linear of tokens': (2, 5, 8)}
#: Largest weights of the channels, or their factors in batch norm; the first is an ordinary one.
SIZES = torch.tensor([1, 0, 1e-40, 1e-30, 1e-12, 1e-9, 1e-7, 1e-6])
#: What makes channels die. Batch norm is folded into each kind but linear layers of tokens.
DEATHS = ('weights', 'all weights', 'batch norm', 'negative batch norm')
ENGINES = {
    'as written': ONNXRuntime,
    'default': lambda path: ONNXRuntime(path, optimized=True),
    'openvino': OpenVINO,
}


def dying(kind, death, bias):
    """A layer of which one channel at most lives, and the batch norm behind it."""
    layer = LAYERS[kind]()
    shift = torch.full_like(layer.bias.data, bias).index_fill(0, torch.tensor(0), 0)
    parts = [layer]
    if death.endswith('weights'):
        sizes = torch.zeros(8) if death.startswith('all') else SIZES
        rest = [d for d in range(layer.weight.dim()) if d != layer.weight_axis]
        shape = [-1 if d == layer.weight_axis else 1 for d in range(layer.weight.dim())]
        layer.weight.data.mul_(sizes.view(shape) / layer.weight.abs().amax(rest, keepdim=True))
        layer.bias.data = shift
    else:
        layer.bias = None
        norm = (nn.BatchNorm1d if kind == 'linear' else nn.BatchNorm2d)(len(shift))
        norm.weight.data = SIZES.repeat(len(shift) // 8) * (-1 if 'negative' in death else 1)
        norm.bias.data = shift
        parts.append(norm)
    return nn.Sequential(*parts)


class Dying(nn.ModuleDict):
    """Every kind of layer dying every death that it can, side by side, by kind and death."""

    def __init__(self, bias):
        unfolded = ('linear of tokens', 'transposed grouped')
        cases = itertools.product(LAYERS, DEATHS)
        cases = [(k, d) for k, d in cases if not ('batch' in d and k in unfolded)]
        super().__init__({f'{kind}, {death}': dying(kind, death, bias) for kind, death in cases})

    def forward(self, maps, rows, tokens):
        given = {'linear': rows, 'linear of tokens': tokens}
        return [net(given.get(name.partition(',')[0], maps)) for name, net in self.items()]


def dying_layers(bias):
    """The layers, calibrated, each with a rounding behind; and their inputs."""
    torch.manual_seed(0)
    net, inputs = Dying(bias).eval(), [torch.rand(shape) for shape in INPUTS.values()]
    calibrate(net, [tuple(inputs)])
    for name, layer in net.items():
        behind = Quantizer()
        behind.amax = 1.27 * abs(bias or 1)  # the bias is its hundredth step
        net[name] = nn.Sequential(layer, behind)
    return net.eval(), inputs


def is_new(model, known):
    """Whether a graph is none of ``known``, to which it is added; targets share most of theirs."""
    key = model.opset_import[0].version, model.graph.SerializeToString(deterministic=True)
    new = key not in known
    known.add(key)
    return new


def runs(net, inputs, path):
    """Outputs of fake quantization and of each engine, of every graph of a target and its weights.

    Files are typed float32, as what engines round of FP16 is no matter of scales.
    """
    known = set()
    given = {f'x{i}': x for i, x in enumerate(inputs)}
    for target in TARGETS:
        for weights in ('float', 'int8'):
            names = [f'y{i}' for i in range(len(net) if isinstance(net, Dying) else 1)]
            model = export_onnx(
                net, inputs, path, [*given], names, target=target, weights=weights, fp16=False
            )
            deconvolutions = sum(n.op_type == 'ConvTranspose' for n in model.graph.node)
            in_float = 0 if profile_of(target).deconvolutions else deconvolutions
            found = [f.rule.id for f in lint(read_graph(path))]
            # Q14: layers whose weights are all zero have one tensor in common.
            assert [rule for rule in found if rule != 'Q14'] == ['Q36'] * in_float
            if not is_new(model, known):
                continue
            with torch.no_grad():
                wanted = with_unsigned(net, unsigned_names(model))(*inputs)
            wanted = wanted if isinstance(wanted, list) else [wanted]
            for name, engine in ENGINES.items():
                outputs = engine(path)({key: x.numpy() for key, x in given.items()})
                where = name, target, weights
                yield where, [y.numpy() for y in wanted], [outputs[n] for n in names]


@pytest.mark.parametrize('bias', [0, -1e4])
def test_every_engine_computes_dead_channels_as_fake_quantization_does(bias, tmp_path):
    net, inputs = dying_layers(bias)
    state = copy.deepcopy(net.state_dict())
    for where, wanted, found in runs(net, inputs, tmp_path / 'x.onnx'):
        for case, expected, y in zip(net, wanted, found):
            # The rounding of sums in float32, and no other integer behind.
            assert np.abs(y - expected).max() <= 1e-6 * np.abs(expected).max(), (case, *where)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


class Joined(nn.Module):
    """A branch that lives and one that died by its batch norm, on one grid, and their reader."""

    def __init__(self):
        super().__init__()
        self.alive = QuantConv2d(8, 8, 1)
        self.dead = nn.Sequential(QuantConv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.join = QuantConcat()
        self.reader = QuantConv2d(16, 4, 3)

    def quant_ties(self):
        return [['join._input_quantizer', 'reader._input_quantizer']]

    def forward(self, x):
        return self.reader(self.join([self.alive(x), self.dead(x)]))


class Residual(nn.Sequential):
    """Two blocks; the main branch of the first died, so that it hands on its input."""

    def __init__(self):
        super().__init__(QuantBasicBlock(8, 8), QuantBasicBlock(8, 8))
        self.dead = self[0].norm2

    def forward(self, x):
        return self[1](self[0](x))


@pytest.mark.parametrize('bias', [0, 1])
@pytest.mark.parametrize('kind', [Joined, Residual])
def test_a_dead_member_of_a_tie_group(kind, bias, tmp_path):
    torch.manual_seed(0)
    net, x = kind().eval(), torch.rand(1, 8, 6, 6)
    norm = net.dead if kind is Residual else net.dead[1]
    norm.weight.data, norm.bias.data = torch.zeros(8), torch.full((8,), float(bias))
    calibrate(net, [x])
    for where, (wanted,), (found,) in runs(net, [x], tmp_path / 'x.onnx'):
        # ONNX Runtime rounds ordinary biases, too, which moves a sum in some hundred by a step.
        assert sqnr(torch.tensor(wanted), found) > 60, where


def layer_with(weight, bias, amax):
    layer = QuantLinear(weight.shape[1], len(weight))
    layer.weight.data, layer.bias.data = weight, bias
    layer._weight_quantizer.amax = layer.weight_amax()
    layer._input_quantizer.amax = amax
    return layer.eval()


def test_scales_that_engines_can_hold_stay_to_the_bit():
    torch.manual_seed(0)
    layer = layer_with(torch.randn(6, 32) * 10.0 ** torch.arange(-4, 2)[:, None], torch.randn(6), 3)
    before = layer._weight_quantizer.amax.clone()
    raise_scales(layer)
    assert torch.equal(layer._weight_quantizer.amax, before)


def test_a_layer_of_small_weights_stays_and_is_found(tmp_path):
    torch.manual_seed(0)
    layer = layer_with(torch.randn(4, 32) * 1e-7, torch.zeros(4), 1e5)
    x = torch.randn(3, 32) * 2e4
    export_onnx(layer, [x], tmp_path / 'x.onnx', ['x'], ['y'])
    assert {f.rule.id for f in lint(read_graph(tmp_path / 'x.onnx'))} == {'Q24'}
    found = ONNXRuntime(tmp_path / 'x.onnx')({'x': x.numpy()})['y']
    assert sqnr(layer(x).detach(), found) > 100


@pytest.mark.parametrize('sign', [torch.randn, torch.rand])
def test_room_for_a_bias_costs_no_more_than_promised(sign):
    torch.manual_seed(0)
    layer = layer_with(sign(4, 4608) * 1e-3, torch.tensor([1e3, -1e4, 1e5, 1e6]), 0.1)
    x = sign(64, 4608) * 0.03
    wanted = layer(x)
    raise_scales(layer)
    step = layer._weight_quantizer.amax.flatten() / 127 * 0.1 / 255
    assert bool((layer.bias.abs() / step <= 2**30 * 1.001).all())
    for expected, found in zip(wanted.T.detach(), layer(x).T.detach()):
        assert sqnr(expected, found) > 65


def dim(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.weight.data[:4] = torch.tensor([0, 1e-12, 1e-30, -1e-6])


def cut_branches(model):
    for module in model.modules():
        if isinstance(module, SparseBasicBlock):
            module.norm2.weight.data.zero_()


@pytest.mark.parametrize('kill', [dim, cut_branches])
def test_channels_of_sparse_convolutions_that_die_by_folding(kill):
    model = build('bevfusion', True)
    kill(model)
    voxels = cloud(model)
    calibrate(model, [(*voxels, 1)])
    with torch.no_grad():
        wanted = model(*voxels, 1)
    program = trace(model)
    ranges = [limit for op in program.convs for limit in op.weight_ranges or ()]
    assert ranges and (np.float16(np.array(ranges) / 127) > 0).all()
    assert sqnr(wanted, ScnNetwork(program)(*voxels)) > 40  # weights are stored in FP16


@pytest.mark.parametrize('bias', [1, -1e4])
def test_scales_survive_in_files_typed_fp16(bias, tmp_path):
    """Engines are at most a step of the rounding behind apart from fake quantization.

    ONNX Runtime's default level gets it in float32: it divides FP16 biases in FP16, where those
    beyond 65504 steps saturate, of dead channels or not.
    """
    path, plain = tmp_path / 'x.onnx', tmp_path / 'plain.onnx'
    net, inputs = dying_layers(bias)
    given = {f'x{i}': x.numpy() for i, x in enumerate(inputs)}
    with torch.no_grad():
        wanted = [y.numpy() for y in net(*inputs)]
    known = set()
    for target in [t.name for t in TARGETS.values() if t.strong]:
        model = export_onnx(net, inputs, path, [*given], [*net], target=target)
        if not is_new(model, known):
            continue
        onnx.save(to_float32(model), plain)
        for run in (ONNXRuntime(path), OpenVINO(path), ONNXRuntime(plain, optimized=True)):
            outputs = run(given)
            for case, expected in zip(net, wanted):
                error = np.abs(outputs[case].astype(np.float32) - expected).max()
                step = float(net[case][1].amax) / 127
                assert error <= 1.01 * step + np.abs(expected).max() / 1024, (case, target, run)
