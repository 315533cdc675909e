"""docs/support.md is what targets, linter and measurement say, and these do not contradict."""

import json
import sys

import pytest

from mmdet3d_quant.check.lint.effects import FLOAT, MEASURED
from mmdet3d_quant.check.lint.rules.effects import EFFECTS
from mmdet3d_quant.engines.tensorrt_rtx.compiler import is_installed
from mmdet3d_quant.export.targets import TARGETS
from pages import support
from tests.small import ROOT

RESULT = json.loads(support.RESULT.read_text())
CASES = RESULT['cases']


@pytest.fixture(scope='module')
def benchmark():
    sys.path.insert(0, str(ROOT / 'benchmarks'))
    try:
        import support_matrix
    finally:
        sys.path.pop(0)
    return support_matrix


def test_the_page_is_up_to_date():
    assert support.PAGE.read_text() == support.page(RESULT), 'run `make pages`'


def test_every_target_has_its_row_and_its_column():
    text = support.page(RESULT)
    assert all(f'`{name}`' in text for name in TARGETS)
    columns = [support.alike(name) for name in next(iter(CASES.values()))]
    assert ', '.join(columns).split(', ') == [f'`{name}`' for name in TARGETS]


def test_every_case_was_measured(benchmark):
    assert list(CASES) == list(benchmark.CASES)
    products = [n for n, c in benchmark.CASES.items() if set(c.ops) <= set(benchmark.PRODUCTS)]
    assert RESULT['products'] == products
    assert all(list(found) == list(benchmark.TARGETS) for found in CASES.values())


def test_convolutions_and_linear_layers_run_in_int8():
    for name in ('Conv2d, 3x3', 'Conv2d, 1x1', 'Conv2d, stride 2', 'Linear'):
        assert [CASES[name][t]['INT8'] for t in CASES[name]] == [['INT8']] * 3
        assert CASES[name]['tensorrt10']['float'] == ['FP16']


def test_what_the_linter_saw_was_measured_here_too():
    """Q36: NVIDIA's compiler runs no transposed convolution in INT8."""
    assert EFFECTS['Q36']['']['tensorrt-rtx'].what == FLOAT
    assert EFFECTS['Q36']['']['tensorrt-rtx'].seen == MEASURED
    for target in ('tensorrt8', 'tensorrt10'):
        assert 'INT8' not in CASES['ConvTranspose2d, kernel > stride'][target]['INT8']
        assert CASES['ConvTranspose2d, kernel = stride'][target]['INT8'] == ['INT8']


def test_a_layer_that_the_engine_may_choose_is_told_so():
    assert support.cell('tensorrt8', ['FP32'], True) == 'FP16 or FP32'
    assert support.cell('tensorrt10', ['FP32'], True) == 'FP32'
    assert support.cell('tensorrt10', ['INT8'], False) == 'writes INT8'
    assert support.cell('openvino', [], True) == '–'


@pytest.mark.skipif(not is_installed(), reason="NVIDIA's compiler is not installed")
def test_the_compiler_says_it_again(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, 'TARGETS', ('tensorrt10',))
    name = 'ConvTranspose2d, kernel > stride'
    found = benchmark.study(name, tmp_path)
    assert found == {'tensorrt10': CASES[name]['tensorrt10']}
