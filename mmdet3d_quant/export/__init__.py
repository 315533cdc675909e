"""From a calibrated model to ONNX with Q/DQ nodes, and the proof that engines agree."""

from mmdet3d_quant.export.cuts import Cut, bevfusion_cuts
from mmdet3d_quant.export.examples import capture_inputs, generate_inputs
from mmdet3d_quant.export.families import detector_cuts
from mmdet3d_quant.export.onnx import ExportError, export_onnx
from mmdet3d_quant.export.suite import export_suite

__all__ = [
    'Cut',
    'ExportError',
    'bevfusion_cuts',
    'capture_inputs',
    'detector_cuts',
    'export_onnx',
    'export_suite',
    'generate_inputs',
]
