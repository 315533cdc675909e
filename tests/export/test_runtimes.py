"""Records of runtimes, against what is published about them."""

from __future__ import annotations

import pytest

from mmdet3d_quant.export.runtimes import DEFAULT_RUNTIME, RUNTIMES, runtime_of, target_for
from mmdet3d_quant.export.targets import DEFAULT, TARGETS


def test_the_default_goes_with_every_target_and_takes_the_default_one():
    assert target_for(DEFAULT_RUNTIME) == DEFAULT
    assert [target_for(DEFAULT_RUNTIME, name) for name in TARGETS] == list(TARGETS)


def test_a_runtime_refuses_engines_that_it_does_not_run():
    with pytest.raises(ValueError, match='autoware does not run engines of openvino: take'):
        target_for('autoware', 'openvino')
    with pytest.raises(ValueError, match='no runtime .autoware2.; there are cuda-bevfusion'):
        runtime_of('autoware2')


def test_every_runtime_says_what_becomes_of_odd_clouds():
    for runtime in RUNTIMES.values():
        assert set(runtime.clouds) == {'none', 'one', 'more'}, runtime.name
        assert target_for(runtime.name) == (*runtime.targets, DEFAULT)[0]
