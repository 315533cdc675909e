"""OpenVINO on the CPU: the engine, and the graph transformations before compilation."""

from mmdet3d_quant.engines.openvino.engine import LayerTime, OpenVINO

__all__ = ['LayerTime', 'OpenVINO']
