"""Sparse convolutions that train on a CPU: values and gradients against dense ones."""

import pytest
import torch
import torch.nn.functional as F
from spconv.pytorch import SparseConv3d, SparseConvTensor, SubMConv3d

from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.parents.sparse_conv import PortableSparseConv3d, PortableSubMConv3d, _Convolve
from tests.parents.small import BATCH, SHAPE, cloud, dense

CASES = {
    'submanifold': (PortableSubMConv3d, dict(kernel_size=3, padding=1, bias=True)),
    'strided': (PortableSparseConv3d, dict(kernel_size=3, stride=2, padding=1, bias=False)),
    'flat': (PortableSparseConv3d, dict(kernel_size=(1, 1, 3), stride=(1, 1, 2), bias=True)),
    'uneven': (PortableSparseConv3d, dict(kernel_size=3, stride=2, padding=(1, 1, 0), bias=False)),
}


def run(conv, feats, coords):
    return conv(SparseConvTensor(feats, coords, SHAPE, BATCH))


@pytest.mark.parametrize('name', CASES)
def test_values_and_gradients_are_those_of_a_dense_convolution(name):
    kind, kwargs = CASES[name]
    conv = kind(4, 6, **kwargs).double()
    feats, coords = cloud(torch.float64)
    results = []
    for sparse in (True, False):
        x = feats.clone().requires_grad_()
        if sparse:
            found = run(conv, x, coords)
            out, where = found.features, found.indices
            upstream = torch.randn_like(out)
        else:
            out = dense(conv, x, coords, where)
        params = [p for p in (x, conv.weight, conv.bias) if p is not None]
        results.append([out, *torch.autograd.grad(out, params, upstream)])
    assert len(where) > 20
    for ours, wanted in strict_zip(*results):
        torch.testing.assert_close(ours, wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize('name', CASES)
def test_all_voxels_that_a_dense_convolution_reaches_are_there(name):
    kind, kwargs = CASES[name]
    conv = kind(4, 6, **kwargs)
    feats, coords = cloud()
    active = torch.zeros(BATCH, 1, *SHAPE)
    b, i, j, k = coords.long().T
    active[b, 0, i, j, k] = 1
    if not conv.subm:
        ones = torch.ones(1, 1, *conv.kernel_size)
        active = F.conv3d(active, ones, None, conv.stride, conv.padding)
    wanted = active[:, 0].nonzero()
    found = run(conv, feats, coords).indices.long()
    assert torch.equal(found.unique(dim=0), wanted) and len(found) == len(wanted)


def test_threads_change_nothing():
    """spconv's own loses summands there."""
    conv = PortableSubMConv3d(4, 6, 3, padding=1)
    feats, coords = cloud()

    def gradients():
        conv.zero_grad()
        x = feats.clone().requires_grad_()
        out = run(conv, x, coords).features
        out.square().sum().backward()
        return out.detach(), x.grad, conv.weight.grad.clone()

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = gradients()
        torch.set_num_threads(4)
        for _ in range(5):
            for ours, one in strict_zip(gradients(), wanted):
                torch.testing.assert_close(ours, one, atol=1e-5, rtol=1e-5)
    finally:
        torch.set_num_threads(before)


def test_rules_are_found_once_per_stage(monkeypatch):
    from mmdet3d_quant.parents import sparse_conv

    found, real = [], sparse_conv.rulebook
    monkeypatch.setattr(
        sparse_conv, 'rulebook', lambda conv, x: found.append(conv) or real(conv, x)
    )
    feats, coords = cloud()
    first, second = (PortableSubMConv3d(4, 4, 3, padding=1) for _ in range(2))
    down, third = PortableSparseConv3d(4, 4, 3, stride=2), PortableSubMConv3d(4, 4, 3, padding=1)
    x = down(second(first(SparseConvTensor(feats, coords, SHAPE, BATCH))))
    third(third(x))
    assert found == [first, down, third]


def test_nothing_is_computed_for_what_needs_no_gradient(monkeypatch):
    conv = PortableSubMConv3d(4, 4, 3, padding=1).requires_grad_(False)
    feats, coords = cloud()
    kept = {}
    real = _Convolve.backward
    monkeypatch.setattr(
        _Convolve, 'backward', staticmethod(lambda ctx, g: kept.setdefault('out', real(ctx, g)))
    )
    x = feats.requires_grad_()
    run(conv, x, coords).features.sum().backward()
    assert kept['out'][0] is not None and kept['out'][1] is None


@pytest.mark.parametrize('ours, parent', [
    (PortableSubMConv3d, SubMConv3d), (PortableSparseConv3d, SparseConv3d),
])  # fmt: skip
def test_state_and_arguments_are_those_of_spconv(ours, parent):
    torch.manual_seed(0)
    mine = ours(4, 6, 3, padding=1, indice_key='a').state_dict()
    torch.manual_seed(0)
    theirs = parent(4, 6, 3, padding=1, indice_key='a').state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(v, theirs[k]) for k, v in mine.items())
