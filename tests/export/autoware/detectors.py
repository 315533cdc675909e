"""Small detectors whose sparse encoder is quantized, too, and their files for Autoware."""

import copy

import onnx
import torch
from mmdet3d.registry import MODELS
from mmengine.config import ConfigDict

from mmdet3d_quant import calibrate
from mmdet3d_quant.export import capture_inputs, export_suite

CAMERA = ('img_backbone', 'img_neck', 'view_transform', 'fusion_layer')


def detector(cfg, batch, camera, **encoder):
    """A calibrated detector of random weights with all of its encoder in INT8."""
    cfg = copy.deepcopy(cfg)
    if not camera:
        for part in CAMERA:
            cfg.pop(part)
        cfg['pts_backbone']['in_channels'] = 32
    cfg['pts_middle_encoder'].update(type='QuantBEVFusionSparseEncoder', skip=(), **encoder)
    torch.manual_seed(0)
    model = MODELS.build(ConfigDict(cfg)).eval()
    calibrate(model, [batch], 'max')
    return model


def files(model, batch, folder, inputs=None, **options):
    """The files for Autoware by stem, and the manifest."""
    inputs = capture_inputs(model, batch) if inputs is None else inputs
    _, manifest = export_suite(
        model, inputs, folder, {}, tell=lambda name: None, runtime='autoware', **options
    )
    return {n[:-5]: onnx.load(str(folder / n)) for n in manifest['files']}, manifest
