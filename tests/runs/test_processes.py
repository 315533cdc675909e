"""Processes that torchrun, mpirun and srun start find each other, with and without GPUs."""

import json
import os
import subprocess
import sys

import pytest

from mmdet3d_quant.runs import processes
from tests.small import ROOT, free_port

#: What a process finds in its environment, by launcher; SLURM asks `scontrol` for the first host.
RANKS = {
    'pytorch': lambda rank: dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2),
    'mpi': lambda rank: {
        f'OMPI_COMM_WORLD_{name}': value
        for name, value in dict(RANK=rank, LOCAL_RANK=rank, SIZE=2).items()
    },
    'slurm': lambda rank: dict(
        SLURM_PROCID=rank, SLURM_LOCALID=rank, SLURM_NTASKS=2, SLURM_NODELIST='node[1-2]'
    ),
}
SUM = """
import json, sys
import torch
from mmengine.dist import all_reduce, get_dist_info
from mmdet3d_quant.runs.processes import join, own_device
join(sys.argv[1])
total = torch.tensor([10.0 ** get_dist_info()[0]])
all_reduce(total)
print(json.dumps([*get_dist_info(), total.item(), own_device(None), own_device('cpu')]))
"""


@pytest.mark.parametrize('launcher', RANKS)
def test_two_processes_find_each_other(launcher, tmp_path):
    scontrol = tmp_path / 'scontrol'
    scontrol.write_text('#!/bin/sh\necho 127.0.0.1; echo 127.0.0.2\n')
    scontrol.chmod(0o755)
    common = dict(
        PATH=f'{tmp_path}:{os.environ["PATH"]}',
        PYTHONPATH=ROOT,
        MASTER_PORT=free_port(),
        OMP_NUM_THREADS=1,
    )
    if launcher != 'slurm':
        common['MASTER_ADDR'] = '127.0.0.1'
    started = []
    for rank in range(2):
        env = {k: str(v) for k, v in {**common, **RANKS[launcher](rank)}.items()}
        command = [sys.executable, '-c', SUM, launcher]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    found = [json.loads(p.communicate(timeout=120)[0].splitlines()[-1]) for p in started]
    assert found == [[rank, 2, 11.0, None, 'cpu'] for rank in range(2)]


def test_each_process_takes_the_gpu_that_joining_chose(monkeypatch):
    monkeypatch.setattr(processes.torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(processes.torch.cuda, 'current_device', lambda: 3)
    assert processes.own_device(None) is None  # one process: whatever there is
    monkeypatch.setattr(processes.torch.distributed, 'is_initialized', lambda: True)
    assert processes.own_device(None) == 'cuda:3'
    assert processes.own_device('cuda:1') == 'cuda:1'
