"""Files with plugin nodes, written by hand from the contracts, and clouds for them."""

from itertools import product

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

TYPES = {'fp32': TensorProto.FLOAT, 'fp16': TensorProto.FLOAT16}
ARRAYS = {'fp32': np.float32, 'fp16': np.float16}

SHAPE = (9, 8, 11)
#: Kernel, stride, padding, dilation, submanifold.
CONVOLUTIONS = [
    (3, 1, 0, 1, True),
    (3, 1, 1, 1, True),
    ((1, 3, 3), 1, 0, 1, True),
    (3, 1, 0, 2, True),
    (3, 2, 1, 1, False),
    ((3, 3, 3), (2, 2, 2), (0, 1, 1), 1, False),
    ((1, 1, 3), (1, 1, 2), 0, 1, False),
    (2, 2, 0, 1, False),
    (3, 1, 1, 1, False),
    (3, 2, 2, 2, False),
]


def three(n):
    return (n,) * 3 if isinstance(n, int) else tuple(n)


def weights_of(kernel, seed=1):
    shape = (5, *three(kernel), 4)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def by_definition(features, indices, filters, shape, stride, padding, dilation, subm, batch=2):
    """Outputs of a sparse convolution by place, float64, cell by cell."""
    kernel, stride, padding, dilation = (
        filters.shape[1:4], three(stride), three(padding), three(dilation)
    )  # fmt: skip
    if subm:
        stride, padding = (1, 1, 1), tuple(k // 2 * d for k, d in zip(kernel, dilation))
    rows = {tuple(place): row for row, place in enumerate(indices.tolist())}
    sizes = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(shape, kernel, stride, padding, dilation)
    ]
    found = {}
    for frame, *place in product(range(batch), *map(range, sizes)):
        seen = []
        for tap in product(*map(range, kernel)):
            at = [o * s - p + t * d for o, s, p, t, d in
                  zip(place, stride, padding, tap, dilation)]  # fmt: skip
            if (frame, *at) in rows:
                weight = filters[(slice(None), *tap)].astype(np.float64)
                seen.append(weight @ features[rows[(frame, *at)]].astype(np.float64))
        if (frame, *place) in rows if subm else seen:
            found[(frame, *place)] = sum(seen)
    return found


def cloud(voxels, shape, channels, batch=1, seed=0):
    """Features (N, channels) and coordinates (N, 4) of different cells."""
    random = np.random.default_rng(seed)
    cells = random.choice(batch * int(np.prod(shape)), voxels, replace=False)
    indices = np.column_stack(np.unravel_index(cells, (batch, *shape))).astype(np.int32)
    return random.standard_normal((voxels, channels)).astype(np.float32), indices.reshape(-1, 4)


def save(path, nodes, inputs, outputs, constants=(), opset=17):
    """Writes a graph; inputs and outputs as (name, type, shape), constants as name: array."""
    graph = helper.make_graph(
        nodes,
        'g',
        [helper.make_tensor_value_info(*i) for i in inputs],
        [helper.make_tensor_value_info(*o) for o in outputs],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in dict(constants).items()],
    )
    domains = {node.domain for node in nodes} - {''}
    opsets = [helper.make_opsetid('', opset), *(helper.make_opsetid(d, 1) for d in domains)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), str(path))
    return path


PAIRS = ('out_inds', 'pair_fwd', 'mask', 'order', 'count')


def pairs_node(shape, kernel, stride=1, padding=0, dilation=1, subm=0, batch=1, **more):
    """``GetIndicePairsImplicitGemm`` as Autoware's exporter writes it."""
    attributes = dict(
        batch_size=batch, spatial_shape=list(shape), algo=1, ksize=[*three(kernel)],
        stride=[*three(stride)], padding=[*three(padding)], dilation=[*three(dilation)],
        out_padding=[0, 0, 0], subm=subm, transpose=0, is_train=0,
    )  # fmt: skip
    attributes.update(more)
    return helper.make_node(
        'GetIndicePairsImplicitGemm', ['indices'], PAIRS, 'pairs', domain='autoware', **attributes
    )


def gemm_node(extra=(), **more):
    attributes = dict(
        is_train=0, is_subm=0, fp32_accum=0, act_alpha=0.0, act_beta=0.0, output_scale=1.0,
        output_add_scale=0.0,
    )  # fmt: skip
    attributes.update(more)
    inputs = ['features', 'filters', *PAIRS[1:4], *extra]
    return helper.make_node(
        'ImplicitGemm', inputs, ['made'], 'conv', domain='autoware', **attributes
    )


def autoware_file(path, filters, kind='fp32', extra=None, gemm=None, **geometry):
    """A convolution of one layer by Autoware's two nodes, with all that they return."""
    dtype, extra = TYPES[kind], extra or {}
    return save(
        path,
        [pairs_node(kernel=filters.shape[1:4], **geometry), gemm_node(extra, **gemm or {})],
        [
            ('features', dtype, ['n', filters.shape[-1]]),
            ('indices', TensorProto.INT32, ['n', 4]),
        ],
        [
            ('made', dtype, ['m', len(filters)]),
            *((name, TensorProto.INT32, None) for name in PAIRS),
        ],
        {'filters': filters.astype(ARRAYS[kind]), **extra},
    )
