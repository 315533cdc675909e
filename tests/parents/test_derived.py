"""What follows from the config of a view transform is not taken from a checkpoint."""

import pytest
import torch
from mmengine.runner.checkpoint import load_checkpoint
from torch import nn

from mmdet3d_quant.data.samples import make_frame
from mmdet3d_quant.parents import LSSTransform, derived
from mmdet3d_quant.runs import from_config as fc
from mmdet3d_quant.runs.conversion import fit
from tests.parents.small import build
from tests.small import save_float, small_config

DOUBLED = dict(image_size=(32, 48), feature_size=(4, 6))


@pytest.fixture
def told(monkeypatch):
    lines = []
    monkeypatch.setattr(derived, 'print_log', lambda text, **how: lines.append(text))
    return lines


def test_another_image_size_loads_and_says_so(told):
    small, large = build(), build(**DOUBLED)
    wanted = large.frustum.clone()
    with torch.no_grad():
        small.depthnet[0].weight.mul_(2)
    large.load_state_dict(small.state_dict())
    assert torch.equal(large.frustum, wanted) and wanted.shape != small.frustum.shape
    assert torch.equal(large.depthnet[0].weight, small.depthnet[0].weight)
    (line,) = told
    assert line.startswith('frustum: computed from the config')


def test_another_grid_of_the_same_size_is_noticed(told):
    one, other = build(LSSTransform), build(LSSTransform, xbound=[-16.0, 16.0, 4.0])
    other.load_state_dict(one.state_dict())
    assert other.dx[0] == 4 and other.bx[0] == -14 and torch.equal(other.frustum, one.frustum)
    assert told[0].startswith('dx, bx: ')


def test_a_checkpoint_in_half_precision_stays_as_it_is(told):
    """As the public project loads it, bit for bit."""
    model = build()
    state = {k: v.half().to(v.dtype) for k, v in model.state_dict().items()}
    again = build()
    again.load_state_dict(state)
    assert torch.equal(again.frustum, state['frustum']) and told == []


def test_what_is_missing_is_there_anyway(told):
    model = build()
    state = {k: v for k, v in model.state_dict().items() if k != 'frustum'}
    build().load_state_dict(state)  # strict
    assert told[0].startswith('frustum: ')


def test_a_trained_tensor_of_that_name_is_loaded():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            for name in derived.DERIVED:
                setattr(self, name, nn.Parameter(torch.ones(2)))

    model = Other()
    derived.take_derived_from_config(model)
    model.load_state_dict({name: torch.zeros(2) for name in derived.DERIVED})
    assert all(p.eq(0).all() for p in model.parameters())


def test_the_whole_detector_in_every_loader(tmp_path, told):
    path = small_config(make_frame(tmp_path / 'frame'), tmp_path / 'small.py')
    weights = save_float(path, tmp_path / 'float.pth')
    sizes = {'image_size': [128, 192], 'feature_size': [16, 24]}
    cfg = fc.read_config(path, {f'model.view_transform.{k}': v for k, v in sizes.items()})
    model = fc.build_model(cfg)
    fc.load_weights(model, weights, calibrated=False)
    assert told == [f'view_transform.frustum: {told[0].partition(": ")[2]}']
    load_checkpoint(fc.build_model(cfg), str(weights))
    assert len(told) == 2
    other = fc.build_model(fc.read_config(path)).state_dict()
    assert fit({k: v for k, v in other.items() if 'quantizer' not in k}, model) == []
