"""Passes over random graphs: the numbers of before in ONNX Runtime, and a valid graph."""

import copy
import io

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from torch import nn

from mmdet3d_quant.check.lint import Graph, LintError, lint
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.export import passes
from mmdet3d_quant.export.nonnegative import nonnegative_tensors
from mmdet3d_quant.export.tracing import TRACED
from mmdet3d_quant.export.unsigned import to_unsigned, unsigned_names
from tests.engines.graphs import random_graph
from tests.export.graphs import shape_graph
from tests.properties import deeper, holds
from tests.versions import MOST_OPSET

PAIR = ('QuantizeLinear', 'DequantizeLinear')
SEEDS = st.integers(0, 2**31 - 1)


def shaped(model, inputs):
    """Declares the shapes that outputs have."""
    for output, value in strict_zip(model.graph.output, run(model, inputs)):
        kind = output.type.tensor_type.elem_type
        output.CopyFrom(helper.make_tensor_value_info(output.name, kind, value.shape))
    return model, inputs


def run(model, inputs):
    """Runs a graph as it is written."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return session.run(None, inputs)


def shuffled(graph, seed):
    """Puts the nodes of a graph in any order."""
    nodes = [graph.node[i] for i in np.random.default_rng(seed).permutation(len(graph.node))]
    nodes = [copy.deepcopy(node) for node in nodes]
    del graph.node[:]
    graph.node.extend(nodes)
    passes.sort_nodes(graph)


class Net(nn.Module):
    """Random operators, some on sizes, some on constants of the module."""

    def __init__(self, seed):
        super().__init__()
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        self.steps = [int(s) for s in rng.integers(0, 8, rng.integers(2, 6))]
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.shared = nn.Parameter(self.conv.bias.detach().clone())
        self.register_buffer('table', torch.randn(4))

    def forward(self, x):
        for step in self.steps:
            n, c, h, w = x.shape
            if step == 0:
                x = self.conv(x)
            elif step == 1:
                x = x.relu()
            elif step == 2:
                x = x.reshape(n, c, -1).reshape(n, c, h, w)
            elif step == 3:
                x = x + self.table.view(1, -1, 1, 1)
            elif step == 4:
                x = x * (self.table.abs().sum() / h)
            elif step == 5:
                x = nn.functional.interpolate(x[..., : (h + 1) // 2, :], size=(h, w))
            elif step == 6:
                x = torch.cat([x[:, : c // 2], x[:, c // 2 :].abs()], 1)
            else:
                x = x.flatten(2).softmax(2).view(n, c, h, w) + self.shared.view(-1, 1, 1)
        return x, self.table * 1 if len(self.steps) > 3 else self.shared


def torch_graph(seed):
    data, x = io.BytesIO(), torch.randn(1, 4, 5, 6)
    torch.onnx.export(
        Net(seed).eval(),
        (x,),
        data,
        input_names=['x'],
        opset_version=17,
        do_constant_folding=False,
        **TRACED,
    )
    return onnx.load_from_string(data.getvalue()), {'x': x.numpy()}


def float_weights(model, seed):
    """Stores weights as an exporter has them: float, of any kind, before a QuantizeLinear."""
    rng = np.random.default_rng(seed)
    stored = {i.name: i for i in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        if node.op_type == 'DequantizeLinear' and node.input[0] in stored:
            name, scale, zero = node.input
            integers, step = (numpy_helper.to_array(stored[n]) for n in (name, scale))
            axis = next((a.i for a in node.attribute if a.name == 'axis'), 1)
            axis -= len(integers.shape) * int(rng.integers(2))  # counted from the end is as good
            if rng.random() < 0.3 and zero + '!' not in stored:
                value = rng.integers(-3, 4, step.shape).astype(np.int8)
                stored[zero].CopyFrom(numpy_helper.from_array(value, zero))
            wide = [-1 if i == axis % integers.ndim else 1 for i in range(integers.ndim)]
            value = (integers + rng.uniform(-0.7, 0.7, integers.shape)) * step.reshape(
                wide if step.ndim else ()
            )
            stored[name].CopyFrom(numpy_helper.from_array(np.float32(value), name))
            q = helper.make_node('QuantizeLinear', node.input, [name + '_q'], name + '_q')
            node.input[0] = q.output[0]
            for pair in (q, node):
                del pair.attribute[:]
                pair.attribute.append(helper.make_attribute('axis', axis))
            nodes.append(q)
        nodes.append(node)
    nodes = [copy.deepcopy(node) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


#: Passes, in place or not; each keeps results.
PASSES = {
    'identities': lambda m: passes.drop_identities(m.graph),
    'unused': lambda m: passes.drop_unused(m.graph),
    'shapes': passes.fold_shapes,
    'weights': lambda m: passes.store_int8_weights(m.graph),
    'sorted': lambda m: shuffled(m.graph, 0),
    'opset': lambda m: passes.to_opset(m, min(passes.opset(m) + 1, MOST_OPSET)),
}
MAKERS = [random_graph, lambda seed: shaped(*shape_graph(seed)), torch_graph]


@holds(
    60,
    seed=SEEDS,
    maker=st.sampled_from(MAKERS),
    names=st.lists(st.sampled_from(list(PASSES)), min_size=1, max_size=4),
)
def test_passes_keep_what_a_graph_computes(seed, maker, names):
    model, inputs = maker(seed)
    before = run(model, inputs)
    for name in names:
        model = PASSES[name](model) or model
        onnx.checker.check_model(model, full_check=True)
    for old, new in strict_zip(before, run(model, inputs)):
        assert old.dtype == new.dtype
        np.testing.assert_allclose(
            new, old, rtol=1e-6, atol=1e-6 * max(1, np.abs(old).max(initial=0))
        )


@holds(25, seed=SEEDS)
def test_weights_are_stored_as_onnx_runtime_rounds_them(seed):
    model, inputs = random_graph(seed)
    model = float_weights(model, seed)
    before = run(model, inputs)
    passes.store_int8_weights(model.graph)
    onnx.checker.check_model(model, full_check=True)
    for old, new in strict_zip(before, run(model, inputs)):
        np.testing.assert_array_equal(new, old)


def with_ends(model, names):
    """A copy of a graph that also returns tensors."""
    model = copy.deepcopy(model)
    known = {o.name for o in model.graph.output}
    model.graph.output.extend(
        helper.make_empty_tensor_value_info(n) for n in names if n not in known
    )
    return model


@holds(25, seed=SEEDS, maker=st.sampled_from(MAKERS))
def test_what_is_proven_never_negative_is_not(seed, maker):
    model, inputs = maker(seed)
    made = {o for node in model.graph.node for o in node.output}
    names = sorted(nonnegative_tensors(model.graph) & made)
    looked = with_ends(model, names)
    for factor in (1, -1, 100):
        values = run(looked, {n: factor * x for n, x in inputs.items()})
        found = dict(strict_zip([o.name for o in looked.graph.output], values))
        assert [n for n in names if (found[n] < 0).any()] == []


@holds(25, seed=SEEDS, by_scale=st.booleans())
def test_unsigned_quantizers_round_to_255_steps_of_the_same_range(seed, by_scale):
    model, inputs = random_graph(seed)
    stored = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    names = {
        n.name: f'q.{n.name}'
        for n in model.graph.node
        if n.op_type == 'QuantizeLinear' and stored[n.input[2]].dtype == np.int8
    }
    scales = {n.name: float(stored[n.input[1]]) for n in model.graph.node if n.name in names}
    ranges = {names[n]: 127 * s for n, s in scales.items()}
    safe = nonnegative_tensors(model.graph)
    sources = {names[n.name]: n.input[0] for n in model.graph.node if n.name in names}
    to_unsigned(model, names, ranges, ranges)
    onnx.checker.check_model(model, full_check=True)
    # all of one range, or none
    expected = {
        q for q in sources if all(sources[o] in safe for o in sources if ranges[o] == ranges[q])
    }
    assert set(unsigned_names(model)) == expected
    readers = {i: n for n in model.graph.node for i in n.input[:1]}
    ends = {
        q: readers[name].output[0]
        for name, q in ((n.output[0], names.get(n.name)) for n in model.graph.node)
        if q in expected
    }
    looked = with_ends(model, sorted({*ends.values(), *(sources[q] for q in ends)} - set(inputs)))
    found = dict(strict_zip([o.name for o in looked.graph.output], run(looked, inputs)), **inputs)
    for q, end in ends.items():
        step = np.float32(ranges[q]) / np.float32(255)
        wanted = np.clip(np.rint(found[sources[q]] / step), 0, 255) * step
        np.testing.assert_array_equal(found[end], wanted)


@pytest.mark.skipif(
    onnx.__version__.startswith('1.19.'), reason='onnx 1.19 crashes on shapes of a broken graph'
)
@holds(40, seed=SEEDS, maker=st.sampled_from([random_graph, *MAKERS]), broken=st.integers(0, 3))
def test_the_linter_says_something_of_every_graph(seed, maker, broken):
    model, _ = maker(seed)
    rng = np.random.default_rng(seed)
    if maker is random_graph and rng.random() < 0.5:
        model = float_weights(model, seed)
    for _ in range(broken):  # a tensor that nothing makes, or another one's
        node = model.graph.node[rng.integers(len(model.graph.node))]
        if node.input:
            other = model.graph.node[rng.integers(len(model.graph.node))]
            node.input[rng.integers(len(node.input))] = str(rng.choice(['', 'gone', *other.input]))
    try:
        findings = lint(Graph(model))
    except LintError as err:
        assert str(err)
        return
    assert all(str(f.detail) for f in findings)


@holds(15, seed=SEEDS)
def test_the_linter_takes_axes_counted_from_the_end(seed):
    model = float_weights(random_graph(seed)[0], seed)
    ranks = {i.name: len(i.dims) for i in model.graph.initializer}
    ranks.update((n.output[0], ranks[n.input[0]]) for n in model.graph.node if n.input[0] in ranks)
    found = []
    for from_end in ([], ['QuantizeLinear'], ['QuantizeLinear', 'DequantizeLinear']):
        for node in (n for n in model.graph.node if n.op_type in PAIR and n.input[0] in ranks):
            for given in (a for a in node.attribute if a.name == 'axis'):
                rank = ranks[node.input[0]]
                given.i = given.i % rank - (rank if node.op_type in from_end else 0)
        found.append([(f.rule.id, f.node) for f in lint(Graph(model))])
    assert found[0] == found[1] == found[2]


@pytest.mark.slow
@pytest.mark.parametrize('check', deeper(__name__), ids=lambda c: c.__name__)
def test_with_more_examples(check):
    check()
