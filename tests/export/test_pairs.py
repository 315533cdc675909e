"""No Q/DQ pair gets lost between the quantizers of a model and its file."""

import onnx
import pytest
import torch
from torch import nn

from mmdet3d_quant import calibrate
from mmdet3d_quant.export import ExportError, export_onnx, tracing
from mmdet3d_quant.export.manifest import describe_pairs
from mmdet3d_quant.export.pairs import stored_names
from mmdet3d_quant.layers import QuantConcat, QuantConv2d


class Net(nn.Module):
    """A concat that rounds twice, and a branch whose result nobody asks for."""

    def __init__(self):
        super().__init__()
        self.first, self.second = QuantConv2d(3, 4, 1), QuantConv2d(8, 4, 1)
        self.aside = QuantConv2d(4, 4, 1)
        self.concat = QuantConcat()

    def forward(self, x):
        x = self.first(x)
        self.aside(x)
        return self.second(self.concat([x, x.relu()]))


@pytest.fixture
def net():
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(1, 3, 8, 8)
    calibrate(net, [x])
    return net, x


@pytest.mark.parametrize('weights', ['float', 'int8'])
def test_the_numbers_of_quantizers_and_pairs_are_told(net, tmp_path, weights):
    module, x = net
    model = export_onnx(module, [x], tmp_path / 'm.onnx', ['x'], ['y'], weights=weights)
    assert describe_pairs(model, module)['quantizers'] == dict(
        active=7,
        in_file=5,
        pairs=6,
        unused=['aside._input_quantizer', 'aside._weight_quantizer'],
    )
    assert sorted(stored_names(model).values()).count('concat._input_quantizer') == 2


@pytest.mark.parametrize('lost', ['all', 'second._input', 'concat._input'])
def test_an_exporter_that_drops_pairs_is_refused_with_their_names(net, tmp_path, monkeypatch, lost):
    module, x = net
    real = torch.onnx.export

    def dropping(module, inputs, path, **options):
        real(module, inputs, path, **options)
        model = onnx.load(path)
        gone = {}
        for node in list(model.graph.node):
            name = next((a.s.decode() for a in node.attribute if a.name == tracing._NAME), None)
            if name and (lost == 'all' or name.startswith(lost)) and (lost == 'all' or not gone):
                dq = next(n for n in model.graph.node if node.output[0] in n.input)
                gone[dq.output[0]] = node.input[0]
                model.graph.node.remove(node)
                model.graph.node.remove(dq)
        for node in model.graph.node:
            node.input[:] = [gone.get(i, i) for i in node.input]
        onnx.save(model, path)

    monkeypatch.setattr(torch.onnx, 'export', dropping)
    named = dict(all='first._input_quantizer').get(lost, f'{lost}_quantizer')
    left = 0 if lost == 'all' else 5
    text = f'has {left} Q/DQ pairs where the model rounds 8 times; missing: .*{named}'
    with pytest.raises(ExportError, match=text):
        export_onnx(module, [x], tmp_path / 'm.onnx', ['x'], ['y'])
    assert list(tmp_path.iterdir()) == []


def test_fp16_of_a_quantized_module_is_refused_before_it_is_traced(net, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.onnx, 'export', lambda *a, **k: pytest.fail('traced'))
    with pytest.raises(ValueError, match='first._input_quantizer is quantized'):
        export_onnx(net[0], [net[1]], tmp_path / 'm.onnx', ['x'], ['y'], fp16=True)
