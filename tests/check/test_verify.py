"""Verification of a head's file: queries one to one, outputs by content, nothing that is NaN."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from mmdet3d_quant.check.align import align
from mmdet3d_quant.check.compare import compare
from mmdet3d_quant.check.detector import EnginePart
from mmdet3d_quant.check.verify import require_agreement, verify
from mmdet3d_quant.export import Cut, ExportError, export_onnx

OUTPUTS = ('score', 'rot', 'dim', 'reg', 'height', 'vel')
SIZES = (10, 2, 3, 2, 1, 2)


def queries(seed=0, count=40):
    rng = np.random.default_rng(seed)
    found = {n: rng.normal(size=(1, s, count)).astype('f4') for n, s in zip(OUTPUTS, SIZES)}
    found['reg'] *= 50
    return found


def test_queries_at_one_place_are_matched_one_to_one_by_what_they_are():
    expected = queries()
    for name in ('score', 'reg'):
        expected[name][..., 1] = expected[name][..., 0]
    order = np.random.default_rng(1).permutation(40)
    found = {n: v[..., order] for n, v in expected.items()}
    assert all(np.array_equal(v, expected[n]) for n, v in align(expected, found).items())


def test_outputs_that_are_nan_do_not_stop_the_matching():
    expected, found = queries(), queries()
    found['reg'][..., 3] = np.nan
    assert np.isnan(align(expected, found)['reg']).sum() == 2


@pytest.mark.parametrize('moved', [0, 2, 3])
def test_few_queries_may_lie_elsewhere_where_told_and_the_others_are_compared(moved):
    expected, found = queries(), queries()
    found['reg'][..., :moved] += 7
    found['dim'][..., 9] += 0.5
    aligned = align(expected, found, spare=0.05)  # 2 of 40
    assert np.array_equal(aligned['reg'], expected['reg']) == (moved < 3)
    assert np.array_equal(aligned['dim'], found['dim'])
    assert np.array_equal(align(expected, found)['reg'], found['reg'])


class Head(nn.Module):
    """A head's outputs, each a convolution of a map."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Conv1d(8, s, 1) for s in SIZES)

    def forward(self, x):
        return tuple(part(x) for part in self.parts)


@pytest.fixture(scope='module')
def head(tmp_path_factory):
    torch.manual_seed(0)
    net, x = Head().eval(), torch.randn(1, 8, 30) * 20
    path = tmp_path_factory.mktemp('head') / 'head.onnx'
    export_onnx(net, [x], path, ['middle'], OUTPUTS)
    return Cut('head.bbox', net, dict(middle=x), OUTPUTS), path


@pytest.mark.parametrize(('a', 'b'), [('rot', 'vel'), ('rot', 'reg'), ('reg', 'vel')])
def test_outputs_of_one_shape_that_changed_places_are_named(head, tmp_path, a, b):
    cut, path = head
    assert not any(r.fault for r in verify(cut, path, quantized=False))
    model = onnx.load(path)
    for node in model.graph.node:
        node.output[:] = [{a: b, b: a}.get(o, o) for o in node.output]
    onnx.save(model, tmp_path / 'swapped.onnx')
    results = verify(cut, tmp_path / 'swapped.onnx', quantized=False)
    faults = [r.fault for r in results if r.output in (a, b)]
    assert all('are swapped' in f and a in f and b in f for f in faults), faults
    with pytest.raises(ExportError, match=f'head.bbox.onnx: ONNX Runtime: {a} agrees with torch'):
        require_agreement([r for r in results if r.output in (a, b)])


def test_another_set_of_outputs_is_an_error(head):
    cut, path = head
    other = Cut('head.bbox', cut.module, cut.inputs, (*OUTPUTS[:-1], 'speed'))
    with pytest.raises(ExportError, match='head.onnx has the outputs score.*export again'):
        verify(other, path, quantized=False)


def test_what_is_not_finite_is_named_by_every_judge(head, tmp_path):
    cut, path = head
    model = onnx.load(path)
    maker = next(n for n in model.graph.node if n.output[0] == 'dim')
    maker.output[0] = 'finite'
    divisor = np.array([0, 1, 1], 'f4')[:, None]  # all numbers of the file are finite
    model.graph.initializer.append(onnx.numpy_helper.from_array(divisor, 'divisor'))
    model.graph.node.append(onnx.helper.make_node('Div', ['finite', 'divisor'], ['dim']))
    broken = tmp_path / 'nan.onnx'
    onnx.save(model, broken)
    faults = {r.output: r.fault for r in verify(cut, broken, quantized=False)}
    assert faults['dim'] == 'ONNX Runtime: 30 of 90 values of dim are NaN or infinite'
    samples = {n: t[None].numpy() for n, t in cut.inputs.items()}
    with pytest.raises(ValueError, match='nan.onnx: 30 values of its output dim are NaN'):
        compare(dict(a=path, b=broken), 'onnxruntime', 1, samples, 1)
    part = EnginePart(lambda inputs: dict(y=np.full((1, 2), np.inf)), 'x.onnx')
    with pytest.raises(ExportError, match='x.onnx: 2 of 2 values of y are NaN or infinite'):
        part(x=torch.zeros(1, 2))
    head = Head()
    head.parts[2].weight.data[0, 0, 0] = np.inf
    with pytest.raises(ExportError, match='parts.2.weight of Head holds NaN or infinity'):
        export_onnx(head, list(cut.inputs.values()), tmp_path / 'm.onnx', ['middle'], OUTPUTS)
