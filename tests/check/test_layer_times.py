"""Times of layers in OpenVINO, by name."""

import pytest
import torch
from torch import nn

import mmdet3d_quant as mq
from mmdet3d_quant.check.layer_times import layer_of, layer_times
from mmdet3d_quant.core.errors import QuantError
from mmdet3d_quant.export import export_onnx
from mmdet3d_quant.export.tracing import TRACED
from mmdet3d_quant.layers import QuantConv2d

pytest.importorskip('openvino')


class Net(nn.Module):
    """A container inside of a container, and a layer with a hundred times the work."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(
            nn.Sequential(QuantConv2d(3, 64, 3, padding=1), nn.ReLU()),
            nn.Sequential(QuantConv2d(64, 64, 3, padding=1), nn.ReLU()),
        )
        self.last = QuantConv2d(64, 4, 1)
        self.eval()

    def forward(self, x):
        return self.last(self.blocks(x))


def test_every_layer_is_timed_by_its_name(tmp_path):
    model, x = Net(), torch.randn(1, 3, 48, 48)
    mq.calibrate(model, [x])
    for quantized in (False, True):
        path = tmp_path / ('int8.onnx' if quantized else 'float.onnx')
        export_onnx(model, (x,), path, ['x'], ['y'], quantized=quantized)
    times = layer_times(tmp_path / 'float.onnx', tmp_path / 'int8.onnx', runs=5)
    layers = {n for n, m in model.named_modules() if isinstance(m, QuantConv2d)}
    assert set(times) == layers == {'blocks.0.0', 'blocks.1.0', 'last'}
    assert max(times, key=lambda n: times[n][1]) == 'blocks.1.0'
    assert all(seconds > 0 for pair in times.values() for seconds in pair)


def test_files_without_common_layers_are_refused(tmp_path):
    for name in ('float', 'int8'):
        net = nn.Sequential(nn.ReLU())
        torch.onnx.export(net, torch.randn(1, 3, 4, 4), str(tmp_path / f'{name}.onnx'), **TRACED)
    with pytest.raises(QuantError, match='no layers of the same names'):
        layer_times(tmp_path / 'float.onnx', tmp_path / 'int8.onnx', runs=1)


@pytest.mark.parametrize(
    'node, layer',
    [
        ('/pts_backbone/blocks.0/blocks.0.9/Conv/WithoutBiases', 'pts_backbone.blocks.0.9'),
        ('/a/b/b.0/ffn/layers.1/MatMul', 'a.b.0.ffn.layers.1'),
        ('/up/ConvTranspose', 'up'),
        ('/pts_neck/deblocks.0/deblocks.0.2/Relu', ''),
        ('/a/DequantizeLinear_abcd_acdb_/a/Conv/WithoutBiases', ''),
        ('ConvolutionBackpropData_630', ''),
        ('', ''),
    ],
)
def test_scopes_are_names(node, layer):
    assert layer_of(node) == layer
