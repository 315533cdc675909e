"""Autoware's plugins: spconv's implicit GEMM, in FP16 and INT8, and BEV pooling.

``GetIndicePairsImplicitGemm`` finds the rules of a convolution, ``ImplicitGemm`` applies them. A
cloud without voxels gives empty tensors, and maps of zeros. The plugin has room for 256,000 output
voxels of a convolution that is not submanifold; more are refused here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mmdet3d_quant.engines.files import EngineError
from mmdet3d_quant.engines.plugins.attributes import Numbers
from mmdet3d_quant.engines.plugins.operators import Kind
from mmdet3d_quant.engines.plugins.rules import Geometry, check_size, convolve, meetings, pool

DOMAIN = 'autoware'
#: Output voxels for which the plugin reserves memory.
ROOM = 256_000
#: Places of a kernel for which a mask has bits.
_BITS = 32
_FLAG: dict[str, Any] = dict(low=0, high=1)
_ANY: dict[str, Any] = dict(low=-3e38, high=3e38, whole=False)


def _pairs(a: dict[str, Any], arrays: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    names = ('spatial_shape', 'ksize', 'stride', 'padding', 'dilation')
    values: list[Any] = [*(tuple(a[n]) for n in names), bool(a['subm'])]
    geometry = Geometry(*values)
    outputs, table = meetings(arrays[0], a['batch_size'], geometry)
    if not a['subm'] and len(outputs) > ROOM:
        raise EngineError(
            f'the convolution makes {len(outputs):,} voxels, and the plugin has room for {ROOM:,}: '
            'crop the points'
        )
    bits = np.uint32(1) << np.arange(len(table), dtype=np.uint32)
    mask = ((table >= 0).T * bits).sum(axis=1, dtype=np.uint32)
    order = np.argsort(mask, kind='stable') if a['do_sort'] else np.arange(len(mask))
    count = np.array(len(outputs))
    return outputs, table, mask.view(np.int32)[:, None], order, count


def _check_pairs(a: dict[str, Any], inputs: int) -> None:
    if np.prod(a['ksize']) > _BITS:
        raise EngineError(f'a kernel of {a["ksize"]} has more than {_BITS} places')


def _gemm(a: dict[str, Any], arrays: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    features, filters, table, mask, order, *more = arrays
    if filters.ndim != 5 or features.ndim != 2 or table.ndim != 2:
        raise EngineError(
            f'features of shape {features.shape}, filters {filters.shape}, pairs {table.shape}; '
            'wanted are 2, 5 and 2 axes'
        )
    channels, voxels = len(filters), table.shape[1]
    if mask.shape != (voxels, 1) or order.shape != (voxels,):
        raise EngineError(f'masks {mask.shape} and order {order.shape} of {voxels} voxels')
    if a['is_subm'] and len(features) != voxels:
        raise EngineError(f'{len(features)} voxels become {voxels} in a submanifold convolution')
    for values in more:
        if values.shape != (channels,):
            raise EngineError(f'scales or biases {values.shape} of {channels} channels')
    weights = filters.reshape(channels, -1, filters.shape[-1]).transpose(1, 2, 0)
    if a['precision']:
        scale, bias = more
        result = integer_sums(features, weights, table, a['input_scale'], scale) * scale + bias
    else:
        result = convolve(features, np.ascontiguousarray(weights), table)
        result = result + more[0] if more else result
    return (_ACTIVATIONS[a['act_type']](result, a['act_alpha']),)


def integer_sums(
    features: np.ndarray,
    weights: np.ndarray,
    table: np.ndarray,
    input_scale: float,
    channel_scale: np.ndarray,
) -> np.ndarray:
    """Rounds features and weights to INT8, symmetrically and to even, and sums in INT32.

    Args:
        features: (N, inputs), float32.
        weights: (K, inputs, outputs), float32.
        table: (K, M), row of the input or -1.
        input_scale: Step of the features.
        channel_scale: Step of the features times that of each output channel's weights (outputs,);
            0 for weights that are all zero.

    Returns:
        Sums (M, outputs), float32 of the integers.
    """
    steps = channel_scale / np.float32(input_scale)
    levels = np.divide(weights, steps, out=np.zeros_like(weights), where=steps > 0)
    levels, values = (
        np.clip(np.rint(x), -127, 127) for x in (levels, features / np.float32(input_scale))
    )
    return convolve(values, levels, table)


def _check_gemm(a: dict[str, Any], inputs: int) -> None:
    wanted = (7,) if a['precision'] else (5, 6)
    if inputs not in wanted:
        raise EngineError(f'{inputs} inputs at precision {a["precision"]}, wanted {wanted}')
    if a['precision'] and a['input_scale'] <= 0:
        raise EngineError('precision 1 needs input_scale, the range of the input / 127')


#: By act_type, with act_alpha.
_ACTIVATIONS: dict[int, Any] = {
    0: lambda x, alpha: x,
    1: lambda x, alpha: np.maximum(x, 0),
    2: lambda x, alpha: 1 / (1 + np.exp(-x)),
    3: lambda x, alpha: np.where(x > 0, x, x * np.float32(alpha)),
}


def _cumsum(a: dict[str, Any], arrays: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    points, places, lengths, starts = arrays
    sizes = (a['batch_size'], a['dimension'], a['height'], a['width'])
    if places.shape != (len(points), 4) or lengths.shape != starts.shape or lengths.ndim != 1:
        raise EngineError(
            f'points {points.shape}, places {places.shape}, intervals {lengths.shape} and '
            f'{starts.shape} do not fit'
        )
    check_size(*sizes, points.shape[1])
    sums = pool(points, starts, lengths)
    kept = lengths > 0
    h, w, d, b = places[starts[kept]].T
    if not all(((x >= 0) & (x < n)).all() for x, n in zip((b, d, h, w), sizes)):
        raise EngineError(f'a point lies outside of the grid of {sizes}')
    result = np.zeros((*sizes, points.shape[1]), np.float32)
    result[b, d, h, w] = sums[kept]
    return (result,)


KINDS = {
    'GetIndicePairsImplicitGemm': Kind(
        run=_pairs,
        check=_check_pairs,
        inputs='i',
        outputs='iiiii',
        fields=dict(
            batch_size=Numbers(1, 4096),
            spatial_shape=Numbers(1, 65536, count=3),
            ksize=Numbers(1, _BITS, count=3),
            stride=Numbers(1, 64, count=3),
            padding=Numbers(0, 64, count=3),
            dilation=Numbers(1, 64, count=3),
            subm=Numbers(**_FLAG),
            algo=Numbers(1, 1, 1),  # one mask for all places
            out_padding=Numbers(0, 0, [0, 0, 0], count=3),
            transpose=Numbers(0, 0, 0),
            is_train=Numbers(**_FLAG, default=0),
            do_sort=Numbers(**_FLAG, default=1),
        ),
    ),
    'ImplicitGemm': Kind(
        run=_gemm,
        check=_check_gemm,
        inputs='ffiiiff',
        least=5,
        outputs='f',
        fields=dict(
            act_alpha=Numbers(**_ANY, default=0.0),
            act_beta=Numbers(**_ANY, default=0.0),
            is_subm=Numbers(**_FLAG, default=0),
            is_train=Numbers(**_FLAG, default=0),
            fp32_accum=Numbers(**_FLAG, default=0),
            output_scale=Numbers(1, 1, 1.0, whole=False),
            output_add_scale=Numbers(0, 0, 0.0, whole=False),
            act_type=Numbers(0, 3, 0),
            precision=Numbers(**_FLAG, default=0),
            input_scale=Numbers(0, 3e38, 0.0, whole=False),
        ),
    ),
    'QuickCumsumCuda': Kind(
        run=_cumsum,
        inputs='fiii',
        outputs='f',
        fields=dict(
            batch_size=Numbers(1, 4096),
            dimension=Numbers(1, 65536),
            height=Numbers(1, 65536),
            width=Numbers(1, 65536),
        ),
    ),
}
