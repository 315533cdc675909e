"""What several tests of improvements do with their nets: calibrate, run, compare."""

import torch

import mmdet3d_quant as mq
from mmdet3d_quant import set_mode
from tests.improve.nets import data

BITS = 4


@torch.no_grad()
def float_outputs(model):
    with set_mode(model, 'float'):
        return [model(x) for x in data(6)]


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items() if not k.endswith('_amax')}


def same(one, other):
    return all(torch.equal(one[k], other[k]) for k in one)


def images(count=4):
    generator = torch.Generator().manual_seed(2)
    return [torch.rand(2, 3, 6, 6, generator=generator) for _ in range(count)]


def calibrated(model, data, after=()):
    """Ranges at few bits, so that there is an error to see."""
    model.eval()
    for quantizer in mq.quantizers(model).values():
        quantizer.num_bits = BITS
    mq.calibrate(model, data, 'max', held_out=data, after=after)
    return model


def outputs(model, data, mode):
    with mq.set_mode(model, mode), torch.no_grad():
        return torch.cat([model(x) for x in data]).double()
