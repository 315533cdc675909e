"""`calibrate` in two processes and in inference mode, against one process without."""

import json
import os
import subprocess
import sys

import pytest
import torch

import mmdet3d_quant as mq
from mmdet3d_quant.core.errors import QuantError
from mmdet3d_quant.qat import WeightRanges
from tests.calibration.nets import Branched, batches
from tests.small import ROOT, free_port

#: By case the batches of process 0 and 1, and those that count.
SHARES = {
    'equal shares': ([0, 2, 4, 6], [1, 3, 5, 7]),
    'unequal shares': ([0, 1, 2, 3, 4, 5, 6], [7]),
    'nothing for one': ([0, 1, 2], []),
    'the same first': ([0, 1, 2], [0, 3]),
    'the same': ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
}
METHODS = ('mse', 'entropy', 'percentile:99')
SCRIPT = """
import json, sys, warnings
import mmdet3d_quant as mq
from mmdet3d_quant.runs.processes import join
from mmengine.dist import get_rank
from tests.calibration.nets import Branched, batches
join('pytorch')
shares, methods = json.loads(sys.argv[1])
data, found = batches(8), {}
for case, share in shares.items():
    for method in methods + ['auto']:
        kwargs = dict(held_out=[data[i + 6] for i in [get_rank()]]) if method == 'auto' else {}
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            result = mq.calibrate(
                Branched(), (data[i] for i in share[get_rank()]), method, **kwargs
            )
        text = [str(w.message) for w in said if 'calibrate:' in str(w.message)]
        looks = [look.num_batches for look in result.looks]
        ranges = [[r.amax, r.method] for r in result.ranges]
        found[f'{case}, {method}'] = [result.num_batches, ranges, looks, text]
print(json.dumps(found))
"""


def test_two_processes_find_what_one_finds():
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', MASTER_ADDR='127.0.0.1')
    env.update(MASTER_PORT=free_port(), WORLD_SIZE='2')
    command = [sys.executable, '-c', SCRIPT, json.dumps([SHARES, ['mse']])]
    started = [
        subprocess.Popen(
            command, env=dict(env, RANK=rank, LOCAL_RANK=rank), stdout=subprocess.PIPE, text=True
        )
        for rank in ('0', '1')
    ]
    first, second = (json.loads(p.communicate(timeout=120)[0].splitlines()[-1]) for p in started)
    assert first == second
    data = batches(8)
    for case, (one, two) in SHARES.items():
        counted = one if case == 'the same' else one + two
        for method in ('mse', 'auto'):
            kwargs = dict(held_out=data[6:]) if method == 'auto' else {}
            wanted = mq.calibrate(Branched(), [data[i] for i in counted], method, **kwargs)
            number, ranges, looks, said = first[f'{case}, {method}']
            assert number == wanted.num_batches == len(counted) == looks[-1]
            assert ranges == [[r.amax, r.method] for r in wanted.ranges], (case, method)
            assert looks == sorted(set(looks))
            assert len(said) == (case == 'the same')
            assert all('batches[rank::world_size]' in text for text in said)


@pytest.mark.parametrize('method', [*METHODS, 'auto'])
def test_in_inference_mode_ranges_are_the_same_and_can_be_trained(method):
    plain, model = Branched(), Branched()
    wanted = mq.calibrate(plain, batches(), method)
    with torch.inference_mode():
        found = mq.calibrate(model, batches(), method)  # the batches are inference tensors, too
        assert torch.is_inference_mode_enabled()
    assert found.ranges == wanted.ranges and found.num_batches == wanted.num_batches
    for name, quantizer in mq.quantizers(model).items():
        assert not quantizer._amax.is_inference()
        assert torch.equal(quantizer.amax, mq.quantizers(plain)[name].amax)
    model.a._input_quantizer.learn()
    model(batches()[0]).square().sum().backward()
    assert model.a._input_quantizer._amax.grad.abs() > 0 and model.a.weight.grad.any()
    with torch.no_grad():
        model.a.weight.mul_(2)
    WeightRanges(model).follow()


def test_steps_after_the_ranges_may_train_in_inference_mode():
    def step(model, choices, held_out):
        model(held_out[0][1].clone()).sum().backward()

    model = Branched()
    with torch.inference_mode():
        mq.calibrate(model, batches(), after=[step])
    assert model.c.weight.grad.any()


def test_a_model_made_in_inference_mode_is_refused_before_any_work():
    with torch.inference_mode():
        model = Branched()

    def forward(model, batch):
        raise AssertionError('work')

    with pytest.raises(QuantError, match='a._input_quantizer._amax .* torch.inference_mode'):
        mq.calibrate(model, batches(), forward=forward)
