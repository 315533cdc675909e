"""The same on a GPU as on a CPU, and without waiting for it."""

import copy

import pytest
import torch
from torch import nn

from mmdet3d_quant import calibrate, quantizers, set_mode
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.fake_quant import fake_quantize
from mmdet3d_quant.core.spec import QuantSpec
from mmdet3d_quant.models import QuantResNet
from mmdet3d_quant.qat.moving import LearnedRanges, WeightRanges
from tests.core.kernel_cases import *  # noqa: F403 - the same cases on a GPU

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')
GPU = 'cuda'


def rounded(x, amax, spec, rectify, device):
    """Value, gradient of the input and of the range."""
    x, amax = (t.detach().to(device, copy=True).requires_grad_(t.requires_grad) for t in (x, amax))
    y = fake_quantize(x, amax, spec, rectify)
    y.backward(torch.linspace(-1, 2, x.numel()).view_as(x).to(y))
    return y.detach().cpu(), x.grad.cpu(), None if amax.grad is None else amax.grad.cpu()


@pytest.mark.parametrize('learned', [False, True])
@pytest.mark.parametrize('rectify', [False, True])
@pytest.mark.parametrize('axis', [None, 0, 1])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_values_and_gradients_are_the_cpu_s(dtype, axis, rectify, learned):
    torch.manual_seed(0)
    x = torch.randn(4, 8, 33, 5).to(dtype).requires_grad_()
    shape = [x.shape[i] if i == axis else 1 for i in range(4)]
    amax = (torch.rand(shape) + 0.5).requires_grad_(learned)
    here, there = (rounded(x, amax, QuantSpec(axis=axis), rectify, d) for d in ('cpu', GPU))
    assert here[0].equal(there[0]) and here[1].equal(there[1])
    if learned and dtype == torch.float32:  # a CPU adds up halves in their own type
        torch.testing.assert_close(there[2], here[2], rtol=1e-3, atol=1e-5)


def backbone(learn_amax=False):
    torch.manual_seed(0)
    model = QuantResNet(depth=50, base_channels=8, learn_amax=learn_amax)
    model.eval()  # which mmdet's ResNet returns None from
    return model


def test_calibration_finds_the_cpu_s_ranges():
    here = backbone()
    there = copy.deepcopy(here).to(GPU)
    images = [torch.randn(2, 3, 64, 64) for _ in range(2)]
    calibrate(here, images)
    calibrate(there, [image.to(GPU) for image in images])
    for (name, a), b in strict_zip(quantizers(here).items(), quantizers(there).values()):
        torch.testing.assert_close(b.amax.cpu(), a.amax, rtol=0.02, atol=1e-6, msg=name)


@pytest.mark.parametrize('learned', [False, True])
@pytest.mark.parametrize('amp', [False, True])
def test_a_training_step_waits_for_nothing(amp, learned):
    model = backbone(learned).to(GPU)
    images = [torch.randn(2, 3, 64, 64, device=GPU) for _ in range(3)]
    calibrate(model, images[:1])
    set_mode(model, 'quant')
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    if learned:
        LearnedRanges(model).attach(optimizer)
    weights = WeightRanges(model)

    def step(x):
        optimizer.zero_grad()
        with torch.autocast(GPU, torch.bfloat16, enabled=amp):
            outputs = model(x)
        sum(y.float().square().mean() for y in outputs).backward()
        optimizer.step()
        weights.follow()

    step(images[0])  # the first one reads the ranges, which waits
    before = model.layer4[0].conv1.weight.detach().clone()
    torch.cuda.set_sync_debug_mode('error')
    try:
        step(images[1])
        step(images[2])
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert not model.layer4[0].conv1.weight.equal(before)


def test_checkpoints_move_between_devices():
    here = backbone()
    calibrate(here, [torch.randn(1, 3, 64, 64)])
    there = backbone().to(GPU)
    there.load_state_dict(here.state_dict())
    assert all(q.calibrated and q.amax.is_cuda for q in quantizers(there).values())
    x = torch.randn(1, 3, 64, 64)
    set_mode(nn.ModuleList([here, there]), 'quant')
    with torch.no_grad():
        a, b = here(x)[0], there(x.to(GPU))[0].cpu()
    assert (a - b).norm() < 0.05 * a.norm()  # sums in another order: some values round elsewhere


@pytest.mark.parametrize('learned', [False, True])
def test_a_compiled_step_has_the_gradients_of_an_eager_one(learned):
    found = []
    for compiled in (False, True):
        model = backbone(learned).to(GPU)
        x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(GPU)
        calibrate(model, [x])
        run = torch.compile(model, fullgraph=True) if compiled else model
        sum(y.square().mean() for y in run(x)).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, grad in found[0].items():
        error = (found[1][name] - grad).norm() / (grad.norm() + 1e-6)
        assert error < (0.5 if '_amax' in name else 0.2), name
