"""When ranges count as settled."""

import pytest

from mmdet3d_quant import calibrate
from mmdet3d_quant.calibration import Stability
from tests.calibration.nets import Branched, batches


def looked(*rows, tolerance=0.02):
    stability = Stability(tolerance)
    for i, row in enumerate(rows):
        stability.look(2**i, row)
    return stability


def test_two_quiet_looks_in_a_row_are_settled():
    assert looked([1.0, 2.0], [1.01, 2.0]).settled_at is None
    assert looked([1.0, 2.0], [1.01, 2.0], [1.01, 2.0]).settled_at == 1
    assert looked([1.0, 2.0], [1.1, 2.0], [1.11, 2.0], [1.11, 2.0]).settled_at == 2
    assert looked([1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [1.0, 3.0]).settled_at is None
    assert looked([1.0], [1.1], [1.2], tolerance=0.2).settled_at == 1


def test_one_range_in_twenty_may_move():
    quiet = [1.0] * 19
    assert looked([*quiet, 1.0], [*quiet, 2.0], [*quiet, 4.0]).settled_at == 1
    assert looked([*quiet, 1.0, 1.0], [*quiet, 2.0, 2.0], [*quiet, 4.0, 4.0]).settled_at is None


def test_looks_come_with_the_powers_of_two_and_tell_what_moved():
    assert [n for n in range(20) if Stability.due(n)] == [1, 2, 4, 8, 16]
    look = looked([1.0, 1.0, 4.0], [1.0, 1.1, 5.0]).looks[-1]
    assert look.moved == 2 and look.high == pytest.approx(0.2)
    assert look.median == pytest.approx(0.1 / 1.1)
    with pytest.raises(ValueError, match='tolerance'):
        Stability(0)


def test_calibration_looks_and_a_state_brings_the_looks_back():
    result = calibrate(Branched(), batches(8))
    assert [look.num_batches for look in result.looks] == [1, 2, 4, 8]
    first, _, *rest = (r.amax for r in result.ranges)  # the first two are tied
    assert result.looks[-1].ranges == (first, *rest)
    stability = Stability()
    stability.looks = list(result.looks)
    other = Stability()
    other.load_state_dict(stability.state_dict())
    assert other.looks == stability.looks
    constant = calibrate(Branched(), [batches(1)[0]] * 8)
    assert constant.settled_at == 1
