"""What TensorRT's explicit quantization asks of an ONNX graph, checked without TensorRT."""

from mmdet3d_quant.check.lint.graph import Graph, LintError, read_graph
from mmdet3d_quant.check.lint.layers import Layer, layers
from mmdet3d_quant.check.lint.reformat import Reformat, reformats
from mmdet3d_quant.check.lint.rules import RULES, Finding, Rule, lint

__all__ = [
    'RULES',
    'Finding',
    'Graph',
    'Layer',
    'LintError',
    'Reformat',
    'Rule',
    'layers',
    'lint',
    'read_graph',
    'reformats',
]
