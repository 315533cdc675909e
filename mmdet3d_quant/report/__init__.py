"""A report of a quantized detector on one page: scores, speed, size, pictures, provenance."""

from mmdet3d_quant.report.page import render, write_report

__all__ = ['render', 'write_report']
