"""The method auto against trying every range on the whole layer by hand."""

import pytest
import torch

from mmdet3d_quant import calibrate, quantizers, set_mode
from mmdet3d_quant.calibration.choose import CANDIDATES
from mmdet3d_quant.core.compat import removeprefix
from mmdet3d_quant.layers import QuantConv2d
from tests.calibration.nets import Branched, batches


def error_of(layer, data, x, method):
    """Relative squared error of a layer's output after calibrating for a method."""
    calibrate(layer, data, method)
    with torch.no_grad(), set_mode(layer, 'float'):
        exact = layer(x)
    with torch.no_grad():
        return float((layer(x) - exact).square().sum() / exact.square().sum())


@pytest.mark.parametrize('outlier', [1.0, 30.0, 1000.0])
def test_a_single_layer_gets_the_range_that_is_best_for_its_output(outlier):
    torch.manual_seed(0)
    data = [torch.randn(2, 3, 64, 64) for _ in range(4)]
    data[0][0, 0, 0, 0] = outlier
    layer = QuantConv2d(3, 4, 3, padding=1)
    errors = {str(m): error_of(layer, data[:-1], data[-1], m) for m in CANDIDATES}
    result = calibrate(layer, data, 'auto')
    chosen = removeprefix(result.ranges[0].method, 'auto: ')
    assert errors[chosen] == pytest.approx(min(errors.values()), rel=1e-6)
    assert result.num_batches == len(data) - 1
    if outlier == 1000.0:
        assert chosen != 'max' and errors['max'] > 3 * errors[chosen]


def test_groups_and_joins_get_one_range_each():
    model = Branched()
    result = calibrate(model, batches(), 'auto')
    assert {r.method.split(':')[0] for r in result.ranges} == {'auto'}
    a, b = result.ranges[:2]
    assert a.amax == b.amax
    assert {q.mode for q in quantizers(model).values()} == {'quant'}


def test_auto_for_a_part_only_leaves_the_rest():
    result = calibrate(Branched(), batches(), ['max', 'c=auto'])
    assert [r.method for r in result.ranges[:3]] == ['max'] * 3
    assert result.ranges[3].method.startswith('auto: ')


def test_without_held_out_batches_nothing_changes():
    model = Branched()
    before = {n: (q.mode, q.calibrated) for n, q in quantizers(model).items()}
    with pytest.raises(ValueError, match='needs a held-out batch'):
        calibrate(model, batches(), 'auto', held_out=[])
    assert before == {n: (q.mode, q.calibrated) for n, q in quantizers(model).items()}
    assert not any(m._forward_hooks for m in model.modules())
