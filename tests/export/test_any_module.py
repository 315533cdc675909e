"""Files of modules without a class of ours: clean, in INT8, and equal in both engines."""

import warnings

import numpy as np
import pytest
import torch
from mmdet3d.registry import MODELS

from mmdet3d_quant import calibrate
from mmdet3d_quant.check.ladder import climb
from mmdet3d_quant.check.lint import layers, lint, read_graph
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.copies import tensors
from mmdet3d_quant.engines import ENGINES
from mmdet3d_quant.export import Cut, export_onnx
from tests.models.zoo import ZOO
from tests.versions import DEFORMABLE_ENGINES

#: Of a residual add, pyramids, concats, gates, and a transformer's stream.
NAMES = ('ResNet-18', 'FPN', 'CSPDarknet', 'VoVNet', 'DLA-34', 'DLANeck', 'Swin')
#: Judged layer by layer: a rounding tie that falls the other way spreads to the outputs.
DEEP = ('DLA-34',)
DCN = dict(dcn=dict(type='DCNv2', deform_groups=1, fallback_on_stride=False))


def decibels(a, b):
    return 10 * np.log10((a**2).sum() / max(((a - b) ** 2).sum(), 1e-30))


def exported(model, x, path, **options):
    """Calibrates and exports; returns the file's graph, its inputs, and torch's outputs by name."""
    model.eval()
    calibrate(model, [[x]], 'max')
    with torch.no_grad():
        wanted = list(tensors(model(x)))
    given = {f'in{i}': t for i, t in enumerate(tensors(x))}
    names = [f'out{i}' for i in range(len(wanted))]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of the tracer
        export_onnx(model, [x], path, list(given), names, **options)
    arrays = {n: t.numpy() for n, t in given.items()}
    return read_graph(path), arrays, dict(strict_zip(names, wanted))


@pytest.mark.parametrize('name', NAMES)
def test_a_file_is_clean_in_int8_and_right(name, tmp_path):
    cfg, x = ZOO[name][:2]
    torch.manual_seed(0)
    model = MODELS.build(dict(cfg, type='Quant', of=cfg['type']))
    graph, arrays, wanted = exported(model, x, tmp_path / 'model.onnx')
    assert not lint(graph) and all(layer.int8 for layer in layers(graph))
    found = ENGINES['onnxruntime'](tmp_path / 'model.onnx')(arrays)
    for n, t in wanted.items():
        assert name in DEEP or decibels(t.numpy(), found[n]) > 55, n
    if name in DEEP:
        given = {n: torch.as_tensor(a) for n, a in arrays.items()}
        cut = Cut(name, model, given, tuple(wanted))
        path, engines = tmp_path / 'model.onnx', {'onnxruntime': ENGINES['onnxruntime']}
        rungs = {r.stage: r for r in climb(cut, model, path, engines, real=False)}
        assert not any(r.fault for r in rungs.values())
        alone = rungs['onnxruntime'].layers
        assert len(alone) >= 66 and min(alone.values()) > 55


@pytest.mark.parametrize('engine', DEFORMABLE_ENGINES)
def test_a_file_with_deformable_convolutions_is_clean_and_right(engine, tmp_path):
    """Of blocks with them all is INT8 but they themselves."""
    cfg, x = ZOO['ResNet-50'][:2]
    torch.manual_seed(0)
    stages = dict(stage_with_dcn=(False, False, True, False))
    model = MODELS.build(dict(cfg, type='Quant', of=cfg['type'], **DCN, **stages))
    for name, layer in model.named_modules():
        if name.endswith('conv_offset'):
            torch.nn.init.normal_(layer.weight, std=0.1)
    graph, arrays, wanted = exported(model, x, tmp_path / 'model.onnx', custom_ops=True)
    assert not lint(graph) and all(layer.int8 for layer in layers(graph))
    deformed = list(graph.of('MMCVModulatedDeformConv2d'))
    assert len(deformed) == 6 and len(list(graph.of('Conv'))) == 53
    found = ENGINES[engine](tmp_path / 'model.onnx')(arrays)
    for n, t in wanted.items():
        assert decibels(t.numpy(), found[n]) > 30, n  # of four stages
