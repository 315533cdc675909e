"""Costs and the search, against sums by hand and all subsets."""

from itertools import combinations

import pytest

from mmdet3d_quant.sensitivity.cost import Costs, Layer, Rates
from mmdet3d_quant.sensitivity.search import front, order, shortest
from mmdet3d_quant.sensitivity.units import Unit

RATES = Rates('test', int8=200.0, full=100.0, bandwidth=10.0, float_bytes=4)


def chain(*names, macs=1000):
    """Layers one behind the other, of 10 values each."""
    before, layers = (), {}
    for name in names:
        layers[name] = Layer(before, f'{name}._input_quantizer', macs, 5, 10, 10)
        before = (name,)
    return layers


def test_a_float_layer_costs_its_work_and_the_rounding_behind_it():
    costs = Costs(chain('a', 'b', 'c'), 'abc', RATES)
    assert costs.total().conversions == 1  # the input
    assert costs.total().seconds == pytest.approx(3 * 5 + 10 * 5 / 10)
    middle = costs.total('b')
    assert middle.conversions == 2
    assert middle.seconds == pytest.approx(5 + 10 + 5 + 2 * 10 * 5 / 10)
    assert middle.bytes == (2 * 25 + 25 * 4) + 2 * 10 * 5


def test_two_islands_cost_more_than_one():
    costs = Costs(chain(*'abcdef'), 'abcdef', RATES)
    assert costs.total('bc').conversions == 2
    assert costs.total('be').conversions == 3
    assert costs.total('ef').conversions == 1  # nothing is rounded behind
    assert costs.total('abcdef').conversions == 0


def test_a_tensor_read_in_both_is_written_twice_and_once_per_scale():
    layers = chain('a', 'b')
    layers['c'] = Layer(('a',), 'b._input_quantizer', 1000, 5, 10, 10)  # tied with b
    layers['d'] = Layer(('a',), 'd._input_quantizer', 1000, 5, 10, 10)  # another scale
    tied = Costs({n: layers[n] for n in 'abc'}, 'abc', RATES)
    assert tied.total().conversions == 1
    assert tied.total('c').conversions == 2
    assert tied.total('bc').conversions == 1
    assert Costs(layers, 'abcd', RATES).total().conversions == 2
    assert Costs(layers, 'abcd', RATES).total('a').conversions == 2  # of its result, by scale
    # A float layer of the model that reads the tensor, too.
    assert Costs(layers, 'abd', RATES).total('d').conversions == 2


def test_measured_seconds_replace_estimates_and_scale_the_others():
    layers = chain('a', 'b')
    # a is estimated with 5 s in INT8, 10 s in float; it takes twice that
    costs = Costs(layers, 'ab', RATES, dict(a=(12.0, 18.0), gone=(1.0, 1.0)))
    assert costs.total().seconds == pytest.approx(12 + 2 * 5 + 2 * 5)
    assert costs.total('a').seconds == pytest.approx(18 + 2 * 5 + 2 * 5)
    assert list(costs.measured) == ['a']


def test_bytes_decide_where_work_does_not():
    costs = Costs(chain('a', macs=0), 'a', RATES)
    assert costs.total().seconds == pytest.approx(25 / 10 + 50 / 10)


def units_of(names):
    return [Unit(name, (name,)) for name in names]


def test_the_order_takes_the_most_noise_per_second_first():
    layers = chain(*'abcd')
    layers['b'] = Layer(('a',), 'b._input_quantizer', 100000, 5, 10, 10)
    noise = dict(a=1.0, b=20.0, c=8.0, d=0.0)
    steps = order(units_of('abcd'), noise, Costs(layers, 'abcd', RATES))
    assert [s.unit.name for s in steps] == ['c', 'a', 'b']  # 8 / 10, 1 / 5, 20 / 505
    assert [s.noise for s in steps] == pytest.approx([21.0, 20.0, 0.0])
    assert [s.total for s in steps] == [
        Costs(layers, 'abcd', RATES).total(x) for x in ('c', 'ac', 'abc')
    ]


def test_the_order_is_near_the_best_of_all_subsets():
    names = 'abcdef'
    layers = {
        n: Layer(layer.sources, layer.tie, (i * 7 % 5 + 1) * 1000, 5, 10, 10)
        for i, (n, layer) in enumerate(chain(*names).items())
    }
    noise = {n: float(2 ** (i * 5 % 7)) for i, n in enumerate(names)}
    costs = Costs(layers, names, RATES)
    for step in order(units_of(names), noise, costs):
        best = min(
            sum(noise.values()) - sum(noise[n] for n in some)
            for size in range(len(names) + 1)
            for some in combinations(names, size)
            if costs.total(some).seconds <= step.total.seconds
        )
        assert best <= step.noise + 1e-9 <= max(2 * best, best + 4)


def test_front_has_what_nothing_beats():
    points = [(0, 5), (1, 5), (1, 3), (2, 4), (3, 1), (3, 0)]
    beaten = [any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points) for p in points]
    assert sorted(front(points)) == [i for i, b in enumerate(beaten) if not b] == [0, 2, 5]


@pytest.mark.parametrize('least', range(7))
def test_bisection_finds_the_least_and_asks_little(least):
    asked = []
    found = shortest(6, lambda k: asked.append(k) or k >= least)
    assert found == (least if least < 7 else None) and len(asked) <= 5
    assert shortest(6, lambda k: False) is None
