"""Two processes against one with the same global batch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmdet3d_quant.files.checkpoint import read_checkpoint
from tests.qat import ddp
from tests.qat.toy import calibrated
from tests.small import free_port


@pytest.mark.parametrize('stages', ['', 'stages'])
def test_two_processes_train_like_one(stages, tmp_path):
    start = str(calibrated(tmp_path / 'int8.pth'))
    alone, two = tmp_path / 'alone', tmp_path / 'two'
    threads = torch.get_num_threads()
    ddp.main(str(alone), start, 'none', '8', stages)
    torch.set_num_threads(threads)
    out = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2']
        + ['--master-port', free_port(), ddp.__file__, str(two), start, 'pytorch', '4', stages],
        capture_output=True,
        text=True,
        cwd=Path(ddp.__file__).parents[2],
    )
    assert out.returncode == 0, out.stderr[-3000:]
    wanted, found = (read_checkpoint(d / 'epoch_3.pth')['state_dict'] for d in (alone, two))
    assert wanted.keys() == found.keys()
    begun = read_checkpoint(start)['state_dict']
    for name, value in wanted.items():
        assert torch.allclose(value, found[name], rtol=1e-4, atol=1e-6), name
    moved = [n for n in wanted if not torch.equal(wanted[n], begun[n])]
    assert 'a._input_quantizer._amax' in moved and 'a.weight' in moved
    assert torch.equal(found['a._input_quantizer._amax'], found['b._input_quantizer._amax'])
