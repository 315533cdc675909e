"""OpenVINO's sparse operators for Intel GPUs, domain ``org.openvinotoolkit``.

A convolution takes voxels and their coordinates and hands on both. A cloud without voxels gives
empty tensors and maps of zeros. More output voxels than ``output_bound``, for which the GPU has
memory, are refused here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mmdet3d_quant.engines.files import EngineError
from mmdet3d_quant.engines.plugins.attributes import Numbers, Words
from mmdet3d_quant.engines.plugins.operators import Kind
from mmdet3d_quant.engines.plugins.rules import (
    Geometry,
    check_size,
    check_voxels,
    convolve,
    meetings,
    pool,
)

DOMAIN = 'org.openvinotoolkit'
_SIZE: dict[str, Any] = dict(low=1, high=65536)
_FLAG: dict[str, Any] = dict(low=0, high=1)
#: More frames than any file has.
_FRAMES = 4096


def _convolution(a: dict[str, Any], arrays: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    features, indices, weights, *bias = arrays
    if weights.ndim == 5:  # (kernel, inputs, outputs)
        weights = weights.reshape(-1, *weights.shape[3:])
    if features.ndim != 2 or weights.ndim != 3 or len(features) != len(indices):
        raise EngineError(
            f'features {features.shape}, coordinates {indices.shape} and weights {weights.shape} '
            'do not fit'
        )
    for name, size in (('in_channels', weights.shape[1]), ('out_channels', weights.shape[2])):
        if a[name] not in (0, size):
            raise EngineError(f'{name} is {a[name]}, and the weights have {size}')
    geometry = _geometry(a)
    if any(a['output_spatial_shape']) and tuple(a['output_spatial_shape']) != geometry.out_shape:
        raise EngineError(
            f'output_spatial_shape is {a["output_spatial_shape"]}, the convolution makes '
            f'{list(geometry.out_shape)}'
        )
    outputs, table = meetings(indices, _FRAMES, geometry)
    if not a['submanifold'] and 0 < a['output_bound'] < len(outputs):
        raise EngineError(
            f'the convolution makes {len(outputs):,} voxels, and its output_bound is '
            f'{a["output_bound"]:,}: export with a larger one, or crop the points'
        )
    result = convolve(features, weights, table)
    if bias and bias[0].size:
        if bias[0].shape != result.shape[1:]:
            raise EngineError(f'{bias[0].shape} biases of {result.shape[1]} channels')
        result = result + bias[0]
    return (np.maximum(result, 0) if a['activation'] == 'ReLU' else result), outputs


def _geometry(a: dict[str, Any]) -> Geometry:
    shape = a['input_spatial_shape'] if any(a['input_spatial_shape']) else a['spatial_shape']
    if min(shape) < 1:
        raise EngineError('input_spatial_shape, the cells of the grid, is missing')
    names = ('kernel_size', 'stride', 'padding', 'dilation')
    values: list[Any] = [tuple(shape), *(tuple(a[n]) for n in names), bool(a['submanifold'])]
    return Geometry(*values)


def _check_convolution(a: dict[str, Any], inputs: int) -> None:
    _geometry(a)


def _to_dense(a: dict[str, Any], arrays: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    features, indices, *sizes = arrays
    shape = [int(n) for n in sizes[0].ravel()] if sizes else a['spatial_shape']
    batch = int(sizes[1].ravel()[0]) if sizes else a['batch_size']
    fused = a['fuse_permute_reshape']
    fused = not sizes if fused < 0 else bool(fused)
    channels = features.shape[1]
    if len(shape) != 3 or min(*shape, batch) < 1:
        raise EngineError(f'{batch} frames of a grid of {shape}: sizes are missing')
    check_size(batch, channels, *shape)
    check_voxels(indices, batch, tuple(shape))
    if len(features) != len(indices):
        raise EngineError(f'{len(features)} voxels with {len(indices)} coordinates')
    dense = np.zeros((batch, *shape, channels), np.float32)
    dense[tuple(indices.T)] = features
    if fused:  # the last axis of the grid joins the channels, as the faster one
        dense = dense.swapaxes(3, 4).reshape(batch, *shape[:2], channels * shape[2])
    if a['channels_first']:
        dense = np.moveaxis(dense, -1, 1)
    return (np.ascontiguousarray(dense),)


def _check_to_dense(a: dict[str, Any], inputs: int) -> None:
    if inputs == 3:
        raise EngineError('3 inputs, wanted are 2 or 4')
    if inputs == 2 and min(a['spatial_shape']) < 1:
        raise EngineError('spatial_shape, the cells of the grid, is missing')


def _bev_pool(a: dict[str, Any], arrays: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    features, depth, indices, intervals = arrays
    if features.ndim != 4 or depth.ndim != 4 or intervals.size % 3:
        raise EngineError(
            f'features {features.shape}, depth {depth.shape}, intervals {intervals.shape}; '
            'wanted are 4 axes, 4 axes, and triples'
        )
    first = a['feat_layout'] == 'NCHW' or (
        a['feat_layout'] == 'AUTO' and features.shape[2:] == depth.shape[2:]
    )
    features = features.transpose(0, 2, 3, 1) if first else features
    wanted = (a['image_height'], a['image_width'], a['input_channels'])
    if features.shape[1:] != wanted or a['output_channels'] > a['input_channels']:
        raise EngineError(f'features {features.shape[1:]} by pixel, the attributes say {wanted}')
    low, high, step = (a[f'd_bound_{n}'] for n in ('min', 'max', 'step'))
    bins = int((high - low) / step) if high > low else depth.shape[1]
    pixels = a['image_height'] * a['image_width']
    if depth.shape != (len(features), bins, *wanted[:2]):
        raise EngineError(f'depth {depth.shape}, wanted {(len(features), bins, *wanted[:2])}')
    if indices.size and not 0 <= indices.min() <= indices.max() < depth.size:
        raise EngineError(f'an index is none of the {depth.size} depths')
    sizes = (len(features), a['output_channels'], a['feature_height'], a['feature_width'])
    check_size(*sizes)
    plane = sizes[2] * sizes[3]
    starts, ends, cells = intervals.reshape(-1, 3).T
    if len(cells) and not 0 <= cells.min() <= cells.max() < plane:
        raise EngineError(f'an interval lies outside of the {plane} cells')
    indices = indices.ravel()
    camera, pixel = indices // (bins * pixels), indices % pixels
    rows = features.reshape(-1, wanted[2])[camera * pixels + pixel, : sizes[1]]
    sums = pool(rows * depth.ravel()[indices, None], starts, ends - starts)
    result = np.zeros(sizes, np.float32)
    result.reshape(-1)[: sizes[1] * plane].reshape(sizes[1], plane)[:, cells] = sums.T
    return (result,)


_BOUNDS = {
    f'{axis}_bound_{end}': Numbers(
        1e-9 if end == 'step' else -1e6, 1e6, 1.0 if end == 'step' else 0.0, whole=False
    )
    for axis in 'xyzd'
    for end in ('min', 'max', 'step')
}
KINDS = {
    'SparseConvolution': Kind(
        run=_convolution,
        check=_check_convolution,
        inputs='fiff',
        least=3,
        outputs='fi',
        fields=dict(
            kernel_size=Numbers(1, 64, [3, 3, 3], count=3),
            stride=Numbers(1, 64, [1, 1, 1], count=3),
            padding=Numbers(0, 64, [1, 1, 1], count=3),
            dilation=Numbers(1, 64, [1, 1, 1], count=3),
            submanifold=Numbers(**_FLAG, default=0),
            in_channels=Numbers(0, 65536, 0),
            out_channels=Numbers(0, 65536, 0),
            input_spatial_shape=Numbers(0, 65536, [0, 0, 0], count=3),
            spatial_shape=Numbers(0, 65536, [0, 0, 0], count=3),
            output_spatial_shape=Numbers(0, 65536, [0, 0, 0], count=3),
            activation=Words(('None', 'ReLU'), 'None'),
            output_bound=Numbers(0, 2**31, 0),
            rulebook=Words(),
        ),
    ),
    'SparseToDense': Kind(
        run=_to_dense,
        check=_check_to_dense,
        inputs='fiii',
        least=2,
        outputs='f',
        fields=dict(
            channels_first=Numbers(**_FLAG, default=1),
            fuse_permute_reshape=Numbers(-1, 1, -1),  # on for two inputs, off for four
            spatial_shape=Numbers(0, 65536, [0, 0, 0], count=3),
            batch_size=Numbers(1, _FRAMES, 1),
            C=Numbers(0, 65536, 0),
        ),
    ),
    'BevPoolV2': Kind(
        run=_bev_pool,
        inputs='ffii',
        outputs='f',
        fields=dict(
            **{
                name: Numbers(**_SIZE)
                for name in (
                    'input_channels',
                    'output_channels',
                    'image_width',
                    'image_height',
                    'feature_width',
                    'feature_height',
                )
            },
            feat_layout=Words(('AUTO', 'NCHW', 'NHWC'), 'AUTO'),
            **_BOUNDS,
        ),
    ),
}
