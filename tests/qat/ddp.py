"""One process of a distributed run; started by torchrun in test_distributed.py."""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from mmdet3d_quant.runs.processes import join  # noqa: E402
from tests.qat.toy import QAT, runner  # noqa: E402

CPU = dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False)


#: The first epoch in float, in which no range has a gradient.
STAGES = {0: {'*': 'float'}, 1: {'*': 'quant'}}


def main(work, start, launcher, batch):
    """Trains in each of two ways, into a folder of its own."""
    torch.set_num_threads(1)
    join(launcher)
    for stages in ('plain', 'stages'):
        train(Path(work) / stages, start, launcher, int(batch), stages == 'stages')


def train(work, start, launcher, batch, stages):
    hook = dict(QAT, schedule=STAGES) if stages else QAT
    hooks = [hook, dict(type='DistillHook', checkpoint=start, modules={'norm': 1.0})]
    wrapper = {} if launcher == 'none' else dict(launcher=launcher)
    run = runner(
        work,
        start,
        hooks,
        epochs=3,
        model=dict(type='Quantized', of='Toy', learn_amax=True),
        batch=batch,
        optim_wrapper=dict(
            optimizer=dict(type='SGD', lr=0.05),
            paramwise_cfg=dict(custom_keys={'_amax': dict(lr_mult=1000.0)}),
        ),
        wrapper=None if launcher == 'none' else dict(CPU, find_unused_parameters=stages),
        **wrapper,
    )
    run.train()


if __name__ == '__main__':
    main(*sys.argv[1:])
