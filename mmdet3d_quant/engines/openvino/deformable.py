"""OpenVINO's operator for the deformable convolutions of mmcv, as rules of its reader."""

from __future__ import annotations

from typing import Any

import numpy as np

from mmdet3d_quant.engines.deformable import DOMAIN, OPERATORS
from mmdet3d_quant.engines.openvino import nodes


def rules() -> list[Any]:
    """Makes the rules by which OpenVINO reads mmcv's deformable convolutions.

    Returns:
        List of extensions for ``Core.add_extension``.
    """
    from openvino.frontend.onnx import ConversionExtension

    return [ConversionExtension(name, DOMAIN, _read) for name in OPERATORS]


def _read(node: Any) -> list[Any]:
    """Makes the operators of one node, which has its inputs in the order of mmcv."""
    operators = nodes.operators()
    count = node.get_input_size()
    inputs = [node.get_input(i) for i in range(count)]
    mask, bias = inputs[2] if count > 3 else None, inputs[4] if count > 4 else None
    stride, padding, dilation = (
        list(node.get_attribute(name)) for name in ('stride', 'padding', 'dilation')
    )
    made = operators.deformable_convolution(
        inputs[0],
        inputs[1],
        inputs[3 if count > 3 else 2],
        stride,
        padding,
        padding,
        dilation,
        mask=mask,
        group=node.get_attribute('groups'),
        deformable_group=node.get_attribute('deform_groups'),
        bilinear_interpolation_pad=True,  # at the border, as mmcv: what is outside is zero
    )
    if bias is not None:
        axes = operators.constant(np.array([0, 2, 3]))
        made = operators.add(made, operators.unsqueeze(bias, axes))
    return [made.output(0)]
