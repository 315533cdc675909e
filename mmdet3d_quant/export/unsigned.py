"""UINT8 for activations that are never negative: twice as many steps, in the range for them."""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from onnx import NodeProto, numpy_helper
from torch import Tensor, nn

from mmdet3d_quant.core.compat import set_submodule
from mmdet3d_quant.core.formats import UINT8
from mmdet3d_quant.core.modes import quantizers
from mmdet3d_quant.core.quantizer import Quantizer
from mmdet3d_quant.core.unsigned import unsigned_amax
from mmdet3d_quant.export.nonnegative import nonnegative_tensors

#: Key in a file's ``metadata_props`` for the names of the unsigned quantizers, as JSON.
UNSIGNED_KEY = 'mmdet3d_quant.unsigned'


def to_unsigned(
    model: onnx.ModelProto,
    names: Mapping[str, str],
    ranges: Mapping[str, float],
    unsigned: Mapping[str, float],
) -> None:
    """Makes the quantizers of non-negative tensors unsigned, in place.

    Quantizers that share a scale keep sharing it: they become unsigned all or not at all. Which
    share one is read off the scales themselves, so the groups are at least the tie groups.

    Args:
        model: A graph whose activations have signed Q/DQ pairs with constant scales. The names of
            the quantizers made unsigned are stored under :data:`UNSIGNED_KEY`.
        names: Name of the quantizer by output of the QuantizeLinear node; of activations only.
        ranges: amax by name of the quantizer.
        unsigned: That of the unsigned grid, likewise.
    """
    graph = model.graph
    safe = nonnegative_tensors(graph)
    readers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in graph.node:
        for tensor in node.input:
            readers[tensor].append(node)
    groups: dict[tuple[float, float], list[NodeProto]] = defaultdict(list)
    for node in graph.node:
        if node.op_type == 'QuantizeLinear' and node.output[0] in names:
            name = names[node.output[0]]
            groups[ranges[name], unsigned[name]].append(node)
    chosen: list[str] = []
    zero = numpy_helper.from_array(torch.tensor(0, dtype=UINT8.dtype).numpy(), 'unsigned_zero')
    for (_, amax), group in groups.items():
        if not all(node.input[0] in safe for node in group):
            continue
        step = numpy_helper.from_array(unsigned_scale(amax), f'unsigned_scale_{len(chosen)}')
        graph.initializer.extend([step] if chosen else [zero, step])
        chosen += [names[node.output[0]] for node in group]
        for node in group:
            for pair in (node, *readers[node.output[0]]):
                pair.input[1:] = [step.name, zero.name]
    props = {p.key: p.value for p in model.metadata_props}
    props[UNSIGNED_KEY] = json.dumps(list(dict.fromkeys(chosen)))
    onnx.helper.set_model_props(model, props)


def unsigned_scale(amax: float) -> np.ndarray:
    """Computes the step size of the unsigned grid, ``amax / 255``, float32 without dimensions.

    It is kept away from zero.
    """
    return UINT8.step(torch.tensor(amax, dtype=torch.float32)).numpy()


def unsigned_names(model: onnx.ModelProto) -> list[str]:
    """Reads the names of a file's unsigned quantizers, relative to the exported module."""
    props = {p.key: p.value for p in model.metadata_props}
    return json.loads(props.get(UNSIGNED_KEY, '[]'))


class UnsignedQuantizer(Quantizer):
    """Quantizer with an unsigned grid, to compare with exported files; not for training.

    Args:
        quantizer: Quantizer to copy, per tensor, with a range.
    """

    grid = None  # no signed one may stand in for it

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__(quantizer.spec, label=quantizer.label)
        self.amax = unsigned_amax(quantizer)
        self.mode = quantizer.mode

    def forward(self, x: Tensor) -> Tensor:
        """``clamp(round(x / scale), 0, 255) * scale`` in mode quant, else as its parent."""
        if self.mode != 'quant':
            return super().forward(x)
        step = float(unsigned_scale(float(self._amax)))
        return torch.fake_quantize_per_tensor_affine(x, step, 0, UINT8.qmin, UINT8.qmax)


def with_unsigned(module: nn.Module, names: Collection[str]) -> Any:
    """Copies a module with the named quantizers unsigned."""
    module = copy.deepcopy(module)
    make_unsigned(module, names)
    return module


def make_unsigned(module: nn.Module, names: Collection[str]) -> None:
    """Makes the named quantizers of a module unsigned, in place."""
    signed = quantizers(module)
    for name in names:
        set_submodule(module, name, UnsignedQuantizer(signed[name]))
