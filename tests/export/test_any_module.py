"""Files of modules without a class of ours: clean, in INT8, and equal in both engines."""

import warnings

import numpy as np
import pytest
import torch
from mmdet3d.registry import MODELS

from mmdet3d_quant import calibrate
from mmdet3d_quant.check.lint import layers, lint, read_graph
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.copies import tensors
from mmdet3d_quant.engines import ENGINES
from mmdet3d_quant.export import export_onnx
from tests.models.zoo import ZOO

#: Of a residual add, a top-down pyramid, concats, and a transformer's stream.
NAMES = ('ResNet-18', 'FPN', 'CSPDarknet', 'Swin')


def decibels(a, b):
    return 10 * np.log10((a**2).sum() / max(((a - b) ** 2).sum(), 1e-30))


@pytest.mark.parametrize('name', NAMES)
def test_a_file_is_clean_in_int8_and_right(name, tmp_path):
    cfg, x = ZOO[name][:2]
    torch.manual_seed(0)
    model = MODELS.build(dict(cfg, type='Quant', of=cfg['type']))
    model.eval()
    calibrate(model, [[x]], 'max')
    with torch.no_grad():
        wanted = list(tensors(model(x)))
    given = {f'in{i}': t for i, t in enumerate(tensors(x))}
    names = [f'out{i}' for i in range(len(wanted))]
    path = tmp_path / 'model.onnx'
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of the tracer
        export_onnx(model, [x], path, list(given), names)
    graph = read_graph(path)
    assert not lint(graph) and all(layer.int8 for layer in layers(graph))
    found = ENGINES['onnxruntime'](path)({n: t.numpy() for n, t in given.items()})
    for n, t in strict_zip(names, wanted):
        assert decibels(t.numpy(), found[n]) > 55, n
