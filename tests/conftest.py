"""What several tests want: a tiny data set, made once, and optimizers as they were."""

import sys

import pytest
import torch

from mmdet3d_quant.synthetic.generate import make_synthetic_nuscenes

SCENES = ('scene-0061', 'scene-0103')
SAMPLES = 2


@pytest.fixture(scope='session')
def tiny_nuscenes(tmp_path_factory):
    """Two scenes of two key frames, with info files."""
    folder = tmp_path_factory.mktemp('synthetic') / 'nuscenes'
    return make_synthetic_nuscenes(folder, SCENES, SAMPLES, workers=1)


@pytest.fixture(scope='session')
def devkit(tiny_nuscenes):
    """The same, as nuscenes-devkit reads it."""
    from nuscenes.nuscenes import NuScenes

    return NuScenes(version='v1.0-mini', dataroot=str(tiny_nuscenes), verbose=False)


@pytest.fixture
def same_optimizers():
    """Puts back the step hooks of all optimizers, which torch.compile takes off for good."""
    kinds = [k for k in vars(torch.optim).values() if isinstance(k, type) and hasattr(k, 'step')]
    before = [(kind, kind.step, hasattr(kind.step, 'hooked')) for kind in kinds]
    yield
    for kind, step, hooked in before:
        kind.step = step
        if not hooked and hasattr(step, 'hooked'):
            del step.hooked


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Passes over what runs an operator of mmcv where those are left out (tests/matrix.py)."""
    outcome = yield
    reason = getattr(sys.modules.get('mmcv._ext'), 'LEFT_OUT', None)
    if reason is not None and call.excinfo is not None:
        report = outcome.get_result()
        if reason in str(report.longrepr):
            report.outcome = 'skipped'
            report.longrepr = (str(item.path), item.location[1] or 0, reason)
