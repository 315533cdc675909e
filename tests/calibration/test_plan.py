"""Methods by pattern."""

import pytest

from mmdet3d_quant import Plan, calibrate
from mmdet3d_quant.calibration.calibrator import Calibrator
from mmdet3d_quant.core.spec import Method
from tests.calibration.nets import Branched, batches

NAMES = ['a._input_quantizer', 'b.0._input_quantizer', 'b.1._input_quantizer']


def test_the_last_pattern_that_fits_counts():
    plan = Plan.parse(['mse', 'b=entropy', 'b.1=percentile:99.5'])
    assert list(map(str, plan.methods(NAMES).values())) == ['mse', 'entropy', 'percentile:99.5']
    swapped = Plan.parse(['b.1=percentile:99.5', 'b=entropy', 'max'])
    assert list(map(str, swapped.methods(NAMES).values())) == ['max', 'entropy', 'entropy']
    assert str(plan) == 'mse, b=entropy, b.1=percentile:99.5'


def test_all_ways_to_write_a_plan_mean_the_same():
    expected = Plan(Method('max'), (('a', Method('mse')),))
    assert Plan.parse(['max', 'a=mse']) == Plan.parse({'': 'max', 'a': 'mse'}) == expected
    assert Plan.parse(expected) is expected
    assert Plan.parse('entropy') == Plan.parse(Method('entropy')) == Plan(Method('entropy'))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match='unknown calibration method'):
        Plan.parse(['mse', 'a=no_such_method'])
    with pytest.raises(ValueError, match='unknown method .min. for weights'):
        Plan.parse('mse', weights='min')
    with pytest.raises(ValueError, match='nothing=max: the pattern fits no activation quantizer'):
        calibrate(Branched(), batches(), ['mse', 'nothing=max'])


@pytest.mark.parametrize('number', ['0.0', '-1', '100.50', 'nan', '0.1234567', '99,9', ''])
def test_a_percentile_is_refused_as_it_was_written(number):
    with pytest.raises(ValueError, match='percent') as told:
        Method.parse(f'percentile: {number}')
    assert repr(number) in str(told.value)


def test_each_part_of_a_model_gets_its_method_and_a_group_that_of_its_first():
    model = Branched()
    result = calibrate(model, batches(), ['mse', 'b=max', 'c=max', 'a=percentile:90'])
    assert [r.method for r in result.ranges] == ['percentile:90', 'percentile:90', 'mse', 'max']
    assert result.ranges[0].amax == result.ranges[1].amax < result.ranges[0].largest
    assert result.ranges[3].amax == result.ranges[3].largest
    whole = calibrate(Branched(), batches(), 'percentile:90')
    assert result.ranges[0].amax == whole.ranges[0].amax


def test_a_plan_is_checked_before_any_batch():
    with pytest.raises(ValueError, match='fits no activation'):
        Calibrator(Branched(), Plan.parse({'x': 'max'}))


def test_weights_beside_a_plan_replace_its_own_and_none_leaves_them():
    plan = Plan(weights='mse')
    assert Plan.parse(plan).weights == 'mse' and Plan.parse('max').weights == 'max'
    assert Plan.parse(plan, weights='max').weights == 'max'
    assert Plan.parse(Plan(), weights='mse').weights == 'mse'
