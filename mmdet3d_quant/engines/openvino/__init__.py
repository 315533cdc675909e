"""OpenVINO on the CPU: the engine, and what its graphs need before they are compiled."""

from mmdet3d_quant.engines.openvino.engine import LayerTime, OpenVINO

__all__ = ['LayerTime', 'OpenVINO']
