"""Task-guided ranges against planted ranges, and against all combinations of factors."""

import itertools

import pytest
import torch
from torch import nn

import mmdet3d_quant as mq
from mmdet3d_quant.core.known import KnownRange
from mmdet3d_quant.core.unsigned import set_unsigned_amax, unsigned_amax
from mmdet3d_quant.improve import TaskRanges
from mmdet3d_quant.improve.task_ranges import FACTORS
from mmdet3d_quant.layers import QuantConv2d


class Head(nn.Module):
    """Returns a heatmap under a name, as heads do."""

    def __init__(self):
        super().__init__()
        self.conv = QuantConv2d(6, 2, 1)

    def forward(self, x):
        return [{'heatmap': self.conv(x)}]


class Net(nn.Module):
    """Two layers that read one tensor, and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = QuantConv2d(3, 6, 3, padding=1)
        self.a, self.b = QuantConv2d(6, 6, 1), QuantConv2d(6, 6, 1)
        self.bbox_head = Head()

    def quant_ties(self):
        return [['a._input_quantizer', 'b._input_quantizer']]

    def forward(self, x):
        x = self.first(x).relu()
        return self.bbox_head((self.a(x) + self.b(x)).relu())


TIED = ('a._input_quantizer', 'b._input_quantizer')


def images(count=3):
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(2, 3, 10, 10, generator=generator) for _ in range(count)]


def calibrated(bits=6):
    model = Net().eval()
    for quantizer in mq.quantizers(model).values():
        quantizer.num_bits = bits
    mq.calibrate(model, images(), 'mse')
    return model


def ranges(model, names):
    return [float(mq.quantizers(model)[name].amax) for name in names]


def run(step, model, data=None):
    step(model, [], list(enumerate(images() if data is None else data)))
    return step


@pytest.mark.parametrize('factor', [16.0, 8.0, 0.25, 0.125])
def test_a_planted_range_is_repaired(factor):
    model = calibrated()
    good = ranges(model, TIED)[0]
    for name in TIED:
        mq.quantizers(model)[name].amax = good * factor
    noted = mq.quantizers(model)[TIED[0]]
    set_unsigned_amax(noted, good * factor * 0.9)
    step = run(TaskRanges(['a']), model)
    a, b = ranges(model, TIED)
    assert a == b and 0.6 < a / good < 1.6
    assert set(step.moved) == set(TIED)
    assert step.positive and step.noise[1] < 0.3 * step.noise[0]
    assert unsigned_amax(noted) == pytest.approx(0.9 * a)  # the note moved along


def test_no_combination_of_factors_is_much_better():
    model = calibrated(bits=4)
    names = [('first._input_quantizer',), TIED, ('bbox_head.conv._input_quantizer',)]
    start = [ranges(model, group)[0] for group in names]
    data = images(1)  # one batch judges itself

    def noise():
        return positive_noise(model, data[0])

    tried = []
    for factors in itertools.product((1.0, *sum(FACTORS, ())), repeat=3):
        for group, amax, factor in zip(names, start, factors):
            for name in group:
                mq.quantizers(model)[name].amax = amax * factor
        tried.append(noise())
    for group, amax in zip(names, start):
        for name in group:
            mq.quantizers(model)[name].amax = amax
    before = noise()
    step = run(TaskRanges(rounds=2), model, data)
    assert step.noise[1] == pytest.approx(noise(), rel=1e-4)
    assert noise() <= min(tried) + 0.25 * (before - min(tried))


def positive_noise(model, x):
    """Mean of relative errors of the head's input and heatmap in the 2 highest cells of 100."""
    maps = {}
    for mode in ('float', 'quant'):
        with mq.set_mode(model, mode), torch.no_grad():
            inputs = []
            hook = model.bbox_head.register_forward_pre_hook(
                lambda m, a, to=inputs: to.append(a[0])
            )
            maps[mode] = [model(x)[0]['heatmap'], *inputs]
            hook.remove()
    cells = maps['float'][0].amax(1).flatten(1).topk(2).indices
    errors = []
    for exact, found in zip(maps['float'], maps['quant']):
        at = cells[:, None].expand(-1, exact.shape[1], -1)
        want, got = (m.flatten(2).gather(2, at) for m in (exact, found))
        errors.append(float((got - want).square().sum() / want.square().sum()))
    return sum(errors) / 2


def test_what_does_not_help_elsewhere_is_undone():
    model = calibrated()
    before = ranges(model, TIED)
    data = [torch.rand(2, 3, 10, 10) * 0.05, images(1)[0]]  # the range of the first is too small
    step = run(TaskRanges(['a', 'first']), model, data)
    assert ranges(model, TIED) == before
    assert step.undone and not step.moved and 'undone' in str(step)


def test_known_ranges_stay_and_the_report_is_told():
    model = calibrated()
    step = TaskRanges()
    model.first._input_quantizer.known = KnownRange(1.0, 'images')
    assert all('first._input_quantizer' not in group for group in step.groups(model))
    model.first._input_quantizer.known = None
    for quantizer in mq.quantizers(model).values():
        quantizer.num_bits = 3
    result = mq.calibrate(model, images(), 'max', after=[step])
    assert step.moved
    for entry in result.ranges:
        assert entry.amax == pytest.approx(float(mq.quantizers(model)[entry.name].amax))
        assert ('task x' in entry.method) == (entry.name in step.moved)


def test_wrong_arguments():
    with pytest.raises(ValueError, match='task-guided ranges'):
        TaskRanges(rounds=0)
    with pytest.raises(ValueError, match="'nothing' names no quantizer"):
        TaskRanges(['nothing']).groups(Net())
