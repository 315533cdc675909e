"""Autoware's plugin nodes on a CPU, against their definition and integers by hand."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from mmdet3d_quant.engines import EngineError, ONNXRuntime
from mmdet3d_quant.files.typed import is_strong
from tests.engines.plugin_files import (
    CONVOLUTIONS,
    SHAPE,
    autoware_file,
    by_definition,
    cloud,
    pairs_node,
    save,
    weights_of,
)


@pytest.mark.parametrize('kernel, stride, padding, dilation, subm', CONVOLUTIONS)
def test_a_convolution_is_its_definition(kernel, stride, padding, dilation, subm, tmp_path):
    """Every cell of the output is visited, and the inputs that it sees are looked up."""
    features, indices = cloud(120, SHAPE, 4, batch=2)
    filters = weights_of(kernel)
    bias = np.linspace(-1, 1, 5, dtype=np.float32)
    file = autoware_file(
        tmp_path / 'a.onnx', filters, shape=SHAPE, stride=stride, padding=padding, batch=2,
        dilation=dilation, subm=int(subm), extra={'bias': bias}, gemm=dict(act_type=1),
    )  # fmt: skip
    found = ONNXRuntime(file)({'features': features, 'indices': indices})
    wanted = by_definition(features, indices, filters, SHAPE, stride, padding, dilation, subm)
    places = [tuple(place) for place in found['out_inds'].tolist()]
    assert places == (sorted(wanted) if not subm else [tuple(i) for i in indices.tolist()])
    values = np.stack([wanted[place] for place in places])
    np.testing.assert_allclose(found['made'], np.maximum(values + bias, 0), atol=1e-5)


def test_masks_and_order_are_of_the_pairs(tmp_path):
    features, indices = cloud(80, SHAPE, 4)
    for sort in (0, 1):
        file = autoware_file(tmp_path / 'a.onnx', weights_of(3), shape=SHAPE, subm=1, do_sort=sort)
        found = ONNXRuntime(file)({'features': features, 'indices': indices})
        pairs, mask = found['pair_fwd'], found['mask'][:, 0].view(np.uint32)
        for column, bits in zip(pairs.T, mask):
            assert bits == sum(1 << k for k, row in enumerate(column) if row >= 0)
        assert np.array_equal(pairs[13], np.arange(80))  # the middle sees the voxel itself
        ordered = mask[found['order']]
        assert np.array_equal(ordered, np.sort(mask) if sort else mask)


def test_fp16_is_rounded_once_behind_the_sum(tmp_path):
    features, indices = cloud(100, SHAPE, 4)
    filters, half = weights_of(3).astype(np.float16), features.astype(np.float16)
    exact = autoware_file(tmp_path / 'a.onnx', filters.astype(np.float32), shape=SHAPE, subm=1)
    file = autoware_file(tmp_path / 'b.onnx', filters, 'fp16', shape=SHAPE, subm=1)
    inputs = {'features': half, 'indices': indices}
    found = ONNXRuntime(file)(inputs)['made']
    wanted = ONNXRuntime(exact)({**inputs, 'features': half.astype(np.float32)})['made']
    assert found.dtype == np.float16
    assert np.array_equal(found, wanted.astype(np.float16))


def test_strongly_typed_files_round_what_plugins_make(tmp_path):
    """Such a file runs in float32, rounded where it says FP16: behind the node, too."""
    features, indices = cloud(100, SHAPE, 4)
    filters = weights_of(3).astype(np.float16)
    file = autoware_file(tmp_path / 'a.onnx', filters, 'fp16', shape=SHAPE, subm=1)
    inputs = {'features': features.astype(np.float16), 'indices': indices}
    wanted = ONNXRuntime(file)(inputs)['made']
    model = onnx.load(str(file))
    model.metadata_props.add(key='mmdet3d_quant.typing', value='strong')
    onnx.save(model, str(file))
    assert is_strong(file)
    inputs['features'] = inputs['features'].astype(np.float32)
    assert np.array_equal(ONNXRuntime(file)(inputs)['made'], wanted.astype(np.float32))


@pytest.mark.parametrize('subm', [0, 1])
def test_int8_is_integer_arithmetic(subm, tmp_path):
    """s8 x s8 summed as integers by hand, and scales as the contract defines them."""
    features, indices = cloud(90, SHAPE, 4)
    features = (features * 3).astype(np.float16)
    filters = weights_of(3).astype(np.float16)
    filters[2] = 0  # a dead channel has the scale 0
    bias = np.linspace(-2, 2, 5, dtype=np.float32)
    input_scale = np.float32(5 / 127)  # some values saturate
    weight_scale = np.abs(filters.astype(np.float32)).max(axis=(1, 2, 3, 4)) / np.float32(127)
    scale = input_scale * weight_scale
    file = autoware_file(
        tmp_path / 'a.onnx', filters, 'fp16', shape=SHAPE, padding=1, stride=2, subm=subm,
        extra={'channel_scale': scale, 'bias_scaled': bias},
        gemm=dict(precision=1, input_scale=float(input_scale), act_type=1),
    )  # fmt: skip
    found = ONNXRuntime(file)({'features': features, 'indices': indices})

    x = [[int(np.clip(round(float(v) / float(input_scale)), -127, 127)) for v in f]
         for f in features]  # fmt: skip
    steps = np.where(weight_scale > 0, weight_scale, 1)[:, None, None, None, None]
    w = np.rint(filters.astype(np.float64) / steps).astype(int).reshape(5, 27, 4)
    wanted = np.zeros((found['pair_fwd'].shape[1], 5))
    for o, column in enumerate(found['pair_fwd'].T):
        for channel in range(5):
            total = sum(
                x[row][i] * int(w[channel, k, i])
                for k, row in enumerate(column) if row >= 0 for i in range(4)
            )  # fmt: skip
            wanted[o, channel] = max(total * float(scale[channel]) + bias[channel], 0)
    assert np.abs(np.array(x)).max() == 127
    assert found['made'].dtype == np.float16
    np.testing.assert_allclose(found['made'], wanted, rtol=1e-3, atol=1e-3)


def test_int8_rounds_what_float_does_not(tmp_path):
    features, indices = cloud(60, SHAPE, 4)
    filters, made = weights_of(3), {}
    scale = np.full(5, 0.05 * 0.02, np.float32)
    for precision in (0, 1):
        extra = {'channel_scale': scale, 'bias_scaled': np.zeros(5, np.float32)}
        file = autoware_file(
            tmp_path / 'a.onnx', filters, shape=SHAPE, subm=1, extra=extra if precision else {},
            gemm=dict(precision=precision, input_scale=0.05),
        )  # fmt: skip
        made[precision] = ONNXRuntime(file)({'features': features, 'indices': indices})['made']
    noise = np.abs(made[0] - made[1]).max()
    assert 1e-3 < noise < 1


@pytest.mark.parametrize('subm', [0, 1])
@pytest.mark.parametrize('kind', ['fp32', 'fp16'])
def test_no_voxels_make_none(kind, subm, tmp_path):
    features, indices = cloud(0, SHAPE, 4)
    file = autoware_file(tmp_path / 'a.onnx', weights_of(3), kind, shape=SHAPE, subm=subm)
    found = ONNXRuntime(file)({'features': features, 'indices': indices})
    assert found['made'].shape == (0, 5) and found['pair_fwd'].shape == (27, 0)
    assert found['count'] == 0


def test_bev_pooling_is_the_models(tmp_path):
    random = np.random.default_rng(0)
    batch, depth, height, width = 2, 1, 6, 5
    places = np.column_stack(
        [random.integers(0, n, 200) for n in (height, width, depth, batch)]
    ).astype(np.int32)
    ranks = places @ [width, 1, 1000, 10000]
    order = np.argsort(ranks, kind='stable')
    places, ranks = places[order], ranks[order]
    points = random.standard_normal((200, 7)).astype(np.float32)
    starts = np.flatnonzero(np.r_[True, ranks[1:] != ranks[:-1]]).astype(np.int32)
    lengths = np.diff(np.r_[starts, 200]).astype(np.int32)
    sizes = dict(batch_size=batch, dimension=depth, height=height, width=width)
    names = ['x', 'places', 'lengths', 'starts']
    node = helper.make_node('QuickCumsumCuda', names, ['out'], domain='autoware', **sizes)
    file = save(
        tmp_path / 'a.onnx', [node],
        [('x', TensorProto.FLOAT, ['n', 7]), ('places', TensorProto.INT32, ['n', 4]),
         *((n, TensorProto.INT32, ['m']) for n in names[2:])],
        [('out', TensorProto.FLOAT, [batch, depth, height, width, 7])],
    )  # fmt: skip
    inputs = dict(x=points, places=places, lengths=lengths, starts=starts)
    found = ONNXRuntime(file)(inputs)['out']
    wanted = np.zeros_like(found)
    for point, (h, w, d, b) in zip(points, places):
        wanted[b, d, h, w] += point
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    inputs['places'] = places + 5
    with pytest.raises(EngineError, match='out.*QuickCumsumCuda.*outside'):
        ONNXRuntime(file)(inputs)


def test_the_file_itself_stays_and_sessions_are_apart(tmp_path):
    features, indices = cloud(30, SHAPE, 4)
    files = [
        autoware_file(tmp_path / f'{n}.onnx', weights_of(3, n), shape=SHAPE, subm=1)
        for n in range(2)
    ]
    before = [f.read_bytes() for f in files]
    first, second = map(ONNXRuntime, files)
    inputs = {'features': features, 'indices': indices}
    kept = first(inputs)['made']
    assert not np.allclose(kept, second(inputs)['made'])
    del second
    assert np.array_equal(first(inputs)['made'], kept)
    assert [f.read_bytes() for f in files] == before


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda i: np.vstack([i[:1], i]), 'same coordinates'),
        (lambda i: i + [0, 0, 0, 90], r"node 'pairs' \(autoware::GetIndice.*outside of the grid"),
        (lambda i: i + [3, 0, 0, 0], 'outside of the grid'),
        (lambda i: i - [0, 20, 0, 0], 'outside of the grid'),
    ],
)
@pytest.mark.parametrize('optimized', [False, True])
def test_wrong_voxels_are_an_error_that_names_the_node(change, message, optimized, tmp_path):
    features, indices = cloud(30, SHAPE, 4)
    engine = ONNXRuntime(
        autoware_file(tmp_path / 'a.onnx', weights_of(3), shape=SHAPE, subm=1),
        optimized=optimized,
    )
    wrong = change(indices).astype(np.int32)
    with pytest.raises(EngineError, match=message):
        engine({'features': np.resize(features, (len(wrong), 4)), 'indices': wrong})
    assert len(engine({'features': features, 'indices': indices})['made']) == 30


@pytest.mark.parametrize(
    'node, message',
    [
        (pairs_node(SHAPE, 3, unheard_of=1), "'pairs'.*attribute 'unheard_of'.*known are batch"),
        (pairs_node((2**40, 2, 2), 3), 'spatial_shape.*wanted is 1 to 65536'),
        (pairs_node((0, 2, 2), 3), 'spatial_shape'),
        (pairs_node((5, 5), 3), 'wanted is 3 numbers'),
        (pairs_node(SHAPE, 1000), 'ksize'),
        (pairs_node(SHAPE, 4), 'more than 32 places'),
        (pairs_node(SHAPE, 3, stride=0), 'stride'),
        (pairs_node(SHAPE, 3, transpose=1), 'transpose'),
        (pairs_node(SHAPE, 3, batch='one'), 'batch_size.*integers'),
        (helper.make_node('Argsort', ['indices'], ['out_inds'], domain='autoware'), 'Argsort.*no'),
    ],
)
def test_nodes_that_break_their_contract_are_refused_on_loading(node, message, tmp_path):
    file = save(
        tmp_path / 'a.onnx', [node], [('indices', TensorProto.INT32, ['n', 4])],
        [('out_inds', TensorProto.INT32, None)],
    )  # fmt: skip
    with pytest.raises(EngineError, match=message):
        ONNXRuntime(file)


@pytest.mark.parametrize(
    'gemm, extra, message',
    [
        (dict(precision=1, input_scale=0.1), {}, "'conv'.*5 inputs at precision 1"),
        (dict(precision=1), {'s': np.ones(5), 'b': np.ones(5)}, 'needs input_scale'),
        (dict(output_scale=0.5), {}, 'output_scale = 0.5'),
        (dict(act_type=7), {}, 'act_type'),
    ],
)
def test_gemms_that_break_their_contract_are_refused(gemm, extra, message, tmp_path):
    extra = {name: values.astype(np.float32) for name, values in extra.items()}
    file = autoware_file(
        tmp_path / 'a.onnx', weights_of(3), shape=SHAPE, subm=1, gemm=gemm, extra=extra
    )
    with pytest.raises(EngineError, match=message):
        ONNXRuntime(file)


def test_a_bias_of_another_length_is_an_error(tmp_path):
    features, indices = cloud(30, SHAPE, 4)
    file = autoware_file(
        tmp_path / 'a.onnx', weights_of(3), shape=SHAPE, subm=1,
        extra={'bias': np.ones(4, np.float32)},
    )  # fmt: skip
    with pytest.raises(EngineError, match="'conv'.*5 channels"):
        ONNXRuntime(file)({'features': features, 'indices': indices})


def test_an_operator_that_is_not_known_is_refused_by_name(tmp_path):
    node = helper.make_node('Other', ['x'], ['y'], 'odd', domain='autoware')
    x, y = (('x', TensorProto.FLOAT, [1]), ('y', TensorProto.FLOAT, [1]))
    with pytest.raises(EngineError, match="'odd' .autoware::Other. is no operator that runs here"):
        ONNXRuntime(save(tmp_path / 'a.onnx', [node], [x], [y]))
