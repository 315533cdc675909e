"""Methods as people write them: read as they say, or refused by name."""

import math

import pytest
from hypothesis import strategies as st

from mmdet3d_quant import Plan
from mmdet3d_quant.core.spec import METHODS, WEIGHT_METHODS, Method, QuantSpec, select
from tests.properties import deeper, holds

SPACES = st.sampled_from(['', '', ' ', '  ', '\t', '\n'])
NUMBERS = st.one_of(
    st.floats(0, 100).map(repr),
    st.floats(99, 100).map(repr),
    st.sampled_from(
        ['', '0', '-1', '100', '100.1', 'nan', 'inf', '99,9', '99.9%', '1e2', 'x', ':']
    ),
)
WORDS = st.one_of(st.sampled_from([*METHODS, 'MSE', 'min', 'percentiles', '']), st.text(max_size=5))
ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.binary(max_size=3), st.text(max_size=4)
)
NESTED = st.one_of(ANYTHING, st.lists(ANYTHING, max_size=2), st.dictionaries(ANYTHING, ANYTHING))
PATTERNS = st.text('ab.*?[]', max_size=4)
METHOD = st.one_of(
    st.sampled_from(sorted(set(METHODS) - {'percentile'})).map(Method),
    st.floats(1, 100).map(lambda p: Method('percentile', p)),
)
NAMES = ['a._input_quantizer', 'a.b._input_quantizer', 'b.0._input_quantizer', 'ab']


def meant(name, colon, number):
    """What a text means, read without the package; None if nothing."""
    name, number = name.strip(), number.strip()
    if not colon:
        return (name, None) if name in METHODS else None
    try:
        value = float(number)
    except ValueError:
        return None
    return (name, value) if name == 'percentile' and 1 <= value <= 100 else None


@holds(200, name=WORDS, colon=st.booleans(), number=NUMBERS, spaces=st.tuples(*[SPACES] * 4))
def test_a_method_is_what_its_text_says_or_is_refused(name, colon, number, spaces):
    if ':' in name:
        return
    text = spaces[0] + name + spaces[1]
    text += ':' + spaces[2] + number + spaces[3] if colon else ''
    expected = meant(name, colon, number)
    if expected is None:
        with pytest.raises(ValueError) as told:
            Method.parse(text)
        assert repr(text) in str(told.value) or repr(number.strip()) in str(told.value)
    else:
        found = Method.parse(text)
        assert found.name == expected[0]
        assert expected[1] is None or found.percentile == expected[1]


@holds(
    100,
    default=METHOD,
    pairs=st.lists(st.tuples(PATTERNS, METHOD)),
    w=st.sampled_from(['max', 'mse']),
)
def test_a_plan_is_read_as_it_prints(default, pairs, w):
    plan = Plan(default, tuple((p, m) for p, m in pairs if p), w)
    text = str(plan)
    read = Plan.parse(text)
    assert str(read) == text
    assert [p for p, _ in read.overrides] == [p for p, _ in plan.overrides]
    for found, wanted in zip(
        [read.default, *dict(read.overrides).values()],
        [plan.default, *dict(plan.overrides).values()],
    ):
        assert found.name == wanted.name
        assert found.name != 'percentile' or found.percentile == wanted.percentile
    assert read.weights == w and Plan.parse(default).default == default


@holds(100, default=METHOD, pairs=st.lists(st.tuples(PATTERNS.filter(bool), METHOD), max_size=3))
def test_the_last_pattern_that_fits_decides(default, pairs):
    plan = Plan(default, tuple(pairs))
    idle = [p for p, _ in pairs if not select(NAMES, p)]
    if idle:
        with pytest.raises(ValueError) as told:
            plan.methods(NAMES)
        assert f'{idle[0]}=' in str(told.value)
        return
    for name, found in plan.methods(NAMES).items():
        fitting = [m for p, m in pairs if name in select(NAMES, p)]
        assert found == (fitting or [default])[-1]


@holds(200, method=NESTED, weights=NESTED)
def test_a_plan_of_anything_is_a_plan_or_a_value_error(method, weights):
    try:
        plan = Plan.parse(method, weights)
    except ValueError as err:
        assert str(err)
        return
    assert plan.weights in WEIGHT_METHODS and plan.default.name in METHODS
    assert all(isinstance(p, str) and m.name in METHODS for p, m in plan.overrides)


@holds(100, bits=NESTED, axis=NESTED)
def test_bits_and_axis_are_numbers_in_range_or_a_value_error(bits, axis):
    good_axis = axis is None or (isinstance(axis, int) and axis >= 0)
    good_bits = isinstance(bits, (int, float)) and math.isfinite(bits) and bits in range(2, 9)
    if good_axis and good_bits:
        assert QuantSpec(bits, axis).format.qmax == 2 ** (int(bits) - 1) - 1
        return
    with pytest.raises(ValueError) as told:
        QuantSpec(bits, axis)
    assert repr(axis) in str(told.value) or repr(bits) in str(told.value)


@pytest.mark.slow
@pytest.mark.parametrize('check', deeper(__name__), ids=lambda c: c.__name__)
def test_with_more_examples(check):
    check()
