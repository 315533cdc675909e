"""From a calibrated model to ONNX with Q/DQ nodes, and the proof that engines agree."""

from mmdet3d_quant.export.cuts import Cut, bevfusion_cuts
from mmdet3d_quant.export.onnx import ExportError, export_onnx

__all__ = ['Cut', 'ExportError', 'bevfusion_cuts', 'export_onnx']
