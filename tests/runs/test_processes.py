"""Processes that torchrun, mpirun and srun start find each other, with and without GPUs."""

import json
import os
import subprocess
import sys

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
#: A process that joins by one launcher after the other, each in an environment of its own.
SUM = """
import json, os, sys
import torch
from mmengine.dist import all_reduce, get_dist_info
from mmdet3d_quant.runs.processes import join, own_device
before = dict(os.environ)
for launcher, env in json.loads(sys.argv[1]).items():
    os.environ.clear()
    os.environ.update(before, **env)
    join(launcher)
    total = torch.tensor([10.0 ** get_dist_info()[0]])
    all_reduce(total)
    print(json.dumps([*get_dist_info(), total.item(), own_device(None), own_device('cpu')]))
    torch.distributed.destroy_process_group()
"""


def test_two_processes_find_each_other(tmp_path):
    scontrol = tmp_path / 'scontrol'
    scontrol.write_text('#!/bin/sh\necho 127.0.0.1; echo 127.0.0.2\n')
    scontrol.chmod(0o755)
    env = dict(PATH=f'{tmp_path}:{os.environ["PATH"]}', PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    places = {launcher: dict(MASTER_PORT=free_port()) for launcher in RANKS}
    for launcher in ('pytorch', 'mpi'):
        places[launcher]['MASTER_ADDR'] = '127.0.0.1'
    started = []
    for rank in range(2):
        envs = {name: {**places[name], **of(rank)} for name, of in RANKS.items()}
        envs = {name: {key: str(v) for key, v in found.items()} for name, found in envs.items()}
        command = [sys.executable, '-c', SUM, json.dumps(envs)]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    for rank, process in enumerate(started):
        lines = process.communicate(timeout=240)[0].splitlines()
        found = [json.loads(line) for line in lines if line.startswith('[')]
        assert found == [[rank, 2, 11.0, None, 'cpu']] * len(RANKS)


def test_each_process_takes_the_gpu_that_joining_chose(monkeypatch):
    monkeypatch.setattr(processes.torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(processes.torch.cuda, 'current_device', lambda: 3)
    assert processes.own_device(None) is None  # one process: whatever there is
    monkeypatch.setattr(processes.torch.distributed, 'is_initialized', lambda: True)
    assert processes.own_device(None) == 'cuda:3'
    assert processes.own_device('cuda:1') == 'cuda:1'
