"""A small detector and its set of files, checked file by file."""

import json

import torch
from mmdet3d.registry import MODELS
from mmengine.config import ConfigDict

from mmdet3d_quant import calibrate, ties
from mmdet3d_quant.check.lint import layers, lint, read_graph
from mmdet3d_quant.check.lint.rules import is_quantized
from mmdet3d_quant.check.verify import verify
from mmdet3d_quant.data.samples import make_frame
from mmdet3d_quant.export import capture_inputs, export_suite
from mmdet3d_quant.runs import from_config as fc
from tests.small import small_config

SWIN = dict(
    type='mmdet.SwinTransformer',
    embed_dims=24,
    depths=[1, 1, 1, 1],
    num_heads=[3, 6, 12, 24],
    window_size=7,
    out_indices=(1, 2, 3),
)
#: The head's layers in INT8; its last convolution and what works on queries stay float.
ON_MAP = {'/shared_conv/Conv', '/heatmap_head/heatmap_head.0/conv/Conv'}
#: SQNR that float arithmetic has, dB. Outputs that quantization changes less than that need no
#: more: the head's weights are random, and its queries hardly see the map.
FLOAT_DB = 100


def small_detector(folder):
    cfg = fc.read_config(small_config(make_frame(folder / 'frame'), folder / 'small.py'))
    fc.build_model(cfg)
    return cfg, next(iter(fc.build_calibration_loader(cfg)[1]))


def exported(model_cfg, batch, folder):
    torch.manual_seed(0)
    model = MODELS.build(ConfigDict(model_cfg))  # which the public project's head wants
    model.eval()
    calibrate(model, [batch])
    inputs = capture_inputs(model, batch)
    cuts, manifest = export_suite(model, inputs, folder, {}, tell=lambda name: None)
    assert json.loads((folder / 'manifest.json').read_text()) == manifest
    for cut in cuts:
        for r in verify(cut, folder / f'{cut.name}.onnx'):
            assert r.onnxruntime > min(r.fake_quant + 3, FLOAT_DB), r
        graph = read_graph(folder / f'{cut.name}.onnx')
        assert not lint(graph), cut.name
        found = {layer.name: layer.int8 for layer in layers(graph)}
        if cut.name == 'head.bbox':
            assert {name for name, int8 in found.items() if int8} == ON_MAP
        elif is_quantized(graph):  # all but a Swin, whose layers are of float types
            assert all(int8 or '/img_backbone/' in name for name, int8 in found.items())
    return model, manifest


def files_with_swin(small, folder):
    """Of the manifest; tests/reference/ looks at them under the public project's detector."""
    cfg = small[0].model.to_dict()
    cfg['img_backbone'] = SWIN
    cfg['img_neck']['in_channels'] = [48, 96, 192]
    model, manifest = exported(cfg, small[1], folder)
    assert not any('img_backbone' in name for group in ties(model) for name in group)
    nodes = manifest['files']['camera.backbone.onnx']['nodes']
    assert nodes['QuantizeLinear'] > 10 and nodes['MatMul'] > 10
    return manifest['files']
