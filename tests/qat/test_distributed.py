"""Two processes against one with the same global batch."""

import subprocess
import sys
from pathlib import Path

import torch

from mmdet3d_quant.files.checkpoint import read_checkpoint
from tests.qat import ddp
from tests.qat.toy import calibrated
from tests.small import free_port


def test_two_processes_train_like_one(tmp_path):
    start = str(calibrated(tmp_path / 'int8.pth'))
    alone, two = tmp_path / 'alone', tmp_path / 'two'
    threads = torch.get_num_threads()
    ddp.main(str(alone), start, 'none', '8')
    torch.set_num_threads(threads)
    out = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2']
        + ['--master-port', free_port(), ddp.__file__, str(two), start, 'pytorch', '4'],
        capture_output=True,
        text=True,
        cwd=Path(ddp.__file__).parents[2],
    )
    assert out.returncode == 0, out.stderr[-3000:]
    begun = read_checkpoint(start)['state_dict']
    for stages in ('plain', 'stages'):
        paths = [folder / stages / 'epoch_3.pth' for folder in (alone, two)]
        wanted, found = (read_checkpoint(path)['state_dict'] for path in paths)
        assert wanted.keys() == found.keys()
        for name, value in wanted.items():
            assert torch.allclose(value, found[name], rtol=1e-4, atol=1e-6), (stages, name)
        moved = [n for n in wanted if not torch.equal(wanted[n], begun[n])]
        assert 'a._input_quantizer._amax' in moved and 'a.weight' in moved
        ranges = [found[f'{layer}._input_quantizer._amax'] for layer in 'ab']
        assert torch.equal(*ranges)
