"""Encoders, clouds, and an interpreter of files for libspconv that knows none of our code."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import helper
from torch import nn

from mmdet3d_quant import calibrate, fold_bn
from mmdet3d_quant.layers.sparse import SPARSE_CONVS
from mmdet3d_quant.models import QuantBEVFusionSparseEncoder, QuantSparseEncoder
from mmdet3d_quant.parents import BEVFusionSparseEncoder, PortableSparseEncoder

#: BEVFusion's structure in small, with the uneven padding before the last stage.
BEVFUSION = dict(
    in_channels=5,
    sparse_shape=[48, 40, 21],
    base_channels=8,
    output_channels=16,
    encoder_channels=((8, 8, 12), (12, 16), (16, 16)),
    encoder_paddings=((0, 0, 1), (0, (1, 1, 0)), (0, 0)),
    block_type='basicblock',
    norm_cfg=dict(type='BN1d', eps=1e-3, momentum=0.01),
)
#: SECOND's: no residuals, height first.
SECOND = dict(
    in_channels=4,
    sparse_shape=[41, 40, 48],
    base_channels=8,
    output_channels=16,
    encoder_channels=((8,), (12, 12), (16, 16), (16, 16)),
    encoder_paddings=((1,), (1, 1), (1, 1), ((0, 1, 1), 1)),
    norm_cfg=dict(type='BN1d', eps=1e-3, momentum=0.01),
)
KINDS = {
    'bevfusion': (BEVFusionSparseEncoder, QuantBEVFusionSparseEncoder, BEVFUSION),
    'second': (PortableSparseEncoder, QuantSparseEncoder, SECOND),
}


def enliven(model, seed=0):
    """Statistics of batch norm as training leaves them: none is 0 or 1, some scales negative."""
    rng = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            for values, low, high in (
                (module.weight, 0.5, 2.0),
                (module.bias, -0.3, 0.3),
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.3, 2.0),
            ):
                values.data.uniform_(low, high, generator=rng)
            module.weight.data[::5] *= -1
    return model.eval()


def build(kind, quantized=False, seed=0, **kwargs):
    torch.manual_seed(seed)
    *types, cfg = KINDS[kind]
    return enliven(types[quantized](**({**cfg, **kwargs})), seed)


def cloud(model, count=2500, seed=1):
    """Random voxels: features (N, C), coordinates (N, 4) in the order of the encoder."""
    rng = torch.Generator().manual_seed(seed)
    grid = model.sparse_shape
    coors = [torch.randint(0, n, (count,), generator=rng) for n in (1, *grid)]
    coors = torch.stack(coors, 1).unique(dim=0)
    coors = coors[torch.randperm(len(coors), generator=rng)]
    return torch.randn(len(coors), model.conv_input[0].in_channels, generator=rng), coors


def calibrated(kind, seed=0, **kwargs):
    model = build(kind, True, seed, **kwargs)
    calibrate(model, [(*cloud(model, seed=seed), 1)])
    return model


def with_half_weights(model):
    """The encoder as its file has it: batch norm folded, weights and biases FP16 numbers."""
    model = fold_bn(copy.deepcopy(model))
    for conv in model.modules():
        if isinstance(conv, SPARSE_CONVS):
            conv.weight.data = conv.weight.data.half().float()
            conv.bias.data = conv.bias.data.half().float()
    return model


def turned(coors):
    """Coordinates in the other order."""
    return coors[:, [0, 3, 2, 1]]


def attributes(node):
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def interpret(model: onnx.ModelProto, feats, coors):
    """Computes a file with dense convolutions in float64, as NVIDIA's exporter means it.

    A tensor is (values, mask): the mask is where voxels are. INT8 layers round to the grid of
    their ranges by the formula.
    """
    graph = model.graph
    weights = {
        i.name: torch.from_numpy(
            np.frombuffer(i.raw_data, np.float16).reshape(tuple(i.dims)).astype(np.float64)
        )
        for i in graph.initializer
    }
    grid = attributes(graph.node[0])['input_spatial_shape']
    values = torch.zeros(1, feats.shape[1], *grid, dtype=torch.float64)
    mask = torch.zeros(1, 1, *grid, dtype=torch.float64)
    at = tuple(coors[:, 1:].T)
    values[(0, slice(None), *at)] = feats.double().T
    mask[(0, 0, *at)] = 1
    tensors = {graph.input[0].name: (values, mask)}
    for node in graph.node:
        a = attributes(node)
        x = tensors[node.input[0]]
        if node.op_type == 'SparseConvolution':
            tensors[node.output[0]] = convolve_densely(
                a, x, weights[node.input[1]], weights[node.input[2]]
            )
        elif node.op_type == 'Add':
            other = tensors[node.input[1]]
            parts = [x[0], other[0]]
            if a['precision'] == b'int8':
                parts = [_round(p, a[f'input{i}_dynamic_range']) for i, p in enumerate(parts)]
            tensors[node.output[0]] = (parts[0] + parts[1], x[1])
        elif node.op_type == 'Relu':
            tensors[node.output[0]] = (x[0].clamp(min=0), x[1])
        elif node.op_type == 'ScatterDense':
            tensors[node.output[0]] = x[0]
        elif node.op_type == 'Transpose':
            tensors[node.output[0]] = x.permute(a['dims'])
        else:
            tensors[node.output[0]] = x.reshape(a['dims'])
    return tensors[graph.output[0].name]


def _round(x, limit):
    step = torch.as_tensor(limit, dtype=torch.float64) / 127
    return (x / step).round().clamp(-128, 127) * step


def convolve_densely(a, x, weight, bias):
    values, mask = x
    weight = weight.permute(0, 4, 1, 2, 3)
    if a['precision'] == b'int8':
        values = _round(values, a['input_dynamic_range'])
        limits = torch.tensor(a['weight_dynamic_ranges'], dtype=torch.float64)
        weight = _round(weight, limits.reshape(-1, 1, 1, 1, 1))
    place = dict(stride=a['stride'], padding=a['padding'], dilation=a['dilation'])
    if not a['subm']:
        ones = torch.ones(1, 1, *a['kernel_size'], dtype=torch.float64)
        mask = (F.conv3d(mask, ones, **place) > 0).double()
    y = F.conv3d(values, weight, bias, **place)
    assert list(y.shape[2:]) == list(a['output_spatial_shape'])
    return (y.clamp(min=0) if a['activation'] == b'ReLU' else y) * mask, mask
