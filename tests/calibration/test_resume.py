"""A calibration that was interrupted ends like one that was not."""

import pytest
import torch

from mmdet3d_quant import Calibrator, Plan, calibrate
from mmdet3d_quant.calibration import Progress, ResumeError, Stability, Statistics
from tests.calibration.nets import Branched, batches

KEY = dict(checkpoint='abc', config='x = 1')


def observed(numbers, calibrator=None):
    calibrator = calibrator or Calibrator(Branched(), Plan())
    data = batches()
    list(calibrator.observe([(n, data[n]) for n in numbers]))
    return calibrator


def same(ours, theirs):
    return [(r.name, r.amax) for r in ours.ranges] == [(r.name, r.amax) for r in theirs.ranges]


@pytest.mark.parametrize('at', [1, 3, 7])
def test_what_was_saved_and_the_rest_make_the_whole(at, tmp_path):
    first = observed(range(at))
    saved = Progress(tmp_path / 'out.pth', KEY)
    saved.save(first.statistics, first.stability, now=True)
    second = Calibrator(Branched(), Plan())
    again = Progress(tmp_path / 'out.pth', KEY)
    assert again.load(second.statistics, second.stability, resume=True) == at
    observed(range(at, 8), second)
    assert same(second.finish(), calibrate(Branched(), batches()))
    again.clear()
    assert list(tmp_path.iterdir()) == []


def test_files_of_several_processes_go_on_in_one(tmp_path):
    for rank, numbers in enumerate(([0, 2, 4], [1, 3])):
        part = observed(numbers)
        Progress(tmp_path / 'o', KEY, rank).save(part.statistics, part.stability, now=True)
    left = (tmp_path / 'o.partial/rank1.pth').read_bytes()
    whole = Calibrator(Branched(), Plan())
    assert Progress(tmp_path / 'o', KEY).load(whole.statistics, whole.stability, True) == 5
    assert [p.name for p in (tmp_path / 'o.partial').iterdir()] == ['rank0.pth']
    # A crash before the second file went: its batches are not counted twice.
    (tmp_path / 'o.partial/rank1.pth').write_bytes(left)
    again = Calibrator(Branched(), Plan())
    assert Progress(tmp_path / 'o', KEY).load(again.statistics, again.stability, True) == 5
    observed([5, 6, 7], again)
    assert same(again.finish(), calibrate(Branched(), batches()))


def test_an_unfinished_run_is_neither_thrown_away_nor_mixed_up(tmp_path):
    part = observed([0])
    Progress(tmp_path / 'o', KEY).save(part.statistics, part.stability, now=True)
    empty = Statistics(part.statistics.histograms), Stability()
    with pytest.raises(ResumeError, match='--resume'):
        Progress(tmp_path / 'o', KEY).load(*empty, resume=False)
    with pytest.raises(ResumeError, match='its config differ'):
        Progress(tmp_path / 'o', dict(KEY, config='x = 2')).load(*empty, resume=True)
    (tmp_path / 'o.partial/rank0.pth').write_bytes(b'PK')
    with pytest.raises(ResumeError, match='damaged'):
        Progress(tmp_path / 'o', KEY).load(*empty, resume=True)
    assert not empty[0].batches


def test_an_interrupt_within_a_batch_leaves_whole_batches():
    calibrator = observed([0, 1])
    before = calibrator.statistics.state_dict()

    class Interrupt(BaseException):
        """As Ctrl-C, but only for this test."""

    def forward(model, x):
        model.a(x)
        raise Interrupt

    calibrator.forward = forward
    with pytest.raises(Interrupt):
        list(calibrator.observe([(2, batches()[2])]))
    after = calibrator.statistics.state_dict()
    assert after['batches'] == [0, 1] and torch.equal(after['bins'], before['bins'])
    calibrator.forward = None
    with pytest.raises(ValueError, match='batch 1 would be counted twice'):
        observed([1], calibrator)
