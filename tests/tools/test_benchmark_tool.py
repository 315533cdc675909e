"""tools/benchmark_onnx.py: what it says about files whose differences are known."""

import json
import os
import shutil
import sys

import numpy as np
import openvino
import pytest
import torch
from torch import nn

from mmdet3d_quant import calibrate
from mmdet3d_quant.check.benchmark import benchmark, sum_up
from mmdet3d_quant.check.compare import Variant, generate_samples
from mmdet3d_quant.check.nncf import Nncf
from mmdet3d_quant.check.variants import find_graphs
from mmdet3d_quant.engines.files import EngineError
from mmdet3d_quant.engines.memory import added_memory
from mmdet3d_quant.export import export_onnx
from tests.small import ROOT

sys.path.insert(0, str(ROOT / 'tools'))
import benchmark_onnx  # noqa: E402

from mmdet3d_quant.layers import QuantConv2d  # noqa: E402


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    """Folders ``float``, ``int8`` with two graphs each, and ``coarse`` with one of bad scales."""
    folder = tmp_path_factory.mktemp('benchmark')
    torch.manual_seed(0)
    net = nn.Sequential(QuantConv2d(3, 16, 3), nn.ReLU(), QuantConv2d(16, 8, 3))
    x = torch.randn(1, 3, 24, 24)
    calibrate(net.eval(), [x], 'max')
    for name in ('a', 'b'):
        for kind in ('float', 'int8'):
            path = folder / kind / f'{name}.onnx'
            export_onnx(net, [x], path, ['x'], ['y'], quantized=kind == 'int8')
    net[0]._input_quantizer.amax = 10 * net[0]._input_quantizer.amax
    export_onnx(net, [x], folder / 'coarse/a.onnx', ['x'], ['y'])
    np.savez(folder / 'inputs.npz', x=torch.randn(3, 1, 3, 24, 24).numpy())
    return folder


def run(*args):
    return benchmark_onnx.main([str(a) for a in (*args, '--runs', 3)])


def test_files_are_compared_with_the_float_one(work, tmp_path):
    found = run(
        *(work / k / 'a.onnx' for k in ('float', 'int8', 'coarse')),
        *('--inputs', work / 'inputs.npz', '--json', tmp_path / 'r.json'),
        *('--picture', tmp_path / 'r.png', '--no-memory'),
    )
    flat, int8, coarse = found['a.onnx']
    assert [v.name for v in (flat, int8, coarse)] == ['float/a', 'int8/a', 'coarse/a']
    assert flat.sqnr['y'] == np.inf and int8.sqnr['y'] > coarse.sqnr['y'] + 6 > 6
    assert flat.int8 == (0, 2) and int8.int8[0] >= 1
    assert len(int8.seconds) == 3 and all(s > 0 for s in int8.seconds)
    assert flat.megabytes == pytest.approx((work / 'float/a.onnx').stat().st_size / 1e6)
    report = json.loads((tmp_path / 'r.json').read_text())
    assert [v['name'] for v in report['graphs']['a.onnx']] == ['float/a', 'int8/a', 'coarse/a']
    assert report['machine']['openvino'] and (tmp_path / 'r.png').read_bytes()[1:4] == b'PNG'


def test_memory_is_that_of_the_file_and_not_of_this_process(work, tmp_path):
    np.savez(tmp_path / 'x.npz', x=np.zeros((1, 3, 24, 24), np.float32))
    held = np.ones(1 << 28, np.float32)  # 1 GiB, which a child's getrusage would count
    assert 1 < added_memory('openvino', work / 'int8/a.onnx', tmp_path / 'x.npz', 1) < 900
    assert held[-1] == 1


def test_folders_share_files_by_name(work):
    found = run(work / 'float', work / 'int8', '--no-memory')
    assert list(found) == ['a.onnx', 'b.onnx']
    assert [v.name for v in found['b.onnx']] == ['float', 'int8']
    assert list(run(work / 'float', work / 'coarse', '--no-memory')) == ['a.onnx']


def test_the_lidar_encoder_of_a_set_is_not_for_engines(work, tmp_path):
    for kind in ('float', 'int8'):
        shutil.copytree(work / kind, tmp_path / kind)
        (tmp_path / kind / 'lidar.onnx').write_bytes(b'of another format')
        files = {'a.onnx': {}, 'lidar.onnx': {'grid': [1, 1, 1]}}
        (tmp_path / kind / 'manifest.json').write_text(json.dumps({'files': files}))
    assert list(find_graphs([tmp_path / 'float', tmp_path / 'int8'])) == ['a.onnx']


def test_a_set_is_the_sum_of_its_files():
    one, two = (Variant('int8', [s, 2 * s], {'y': 9.0}, 5.0, (s, 4), 3.0) for s in (1, 2))
    (whole,) = sum_up({'a': [one], 'b': [two]})
    assert whole.seconds == [3, 6] and whole.megabytes == 10 and whole.int8 == (3, 8)


def test_ratios_are_taken_round_by_round():
    """A machine that is slow for one round does not change them."""
    slow = Variant('a', [2.0, 20.0, 2.0], {}, 0, None, None)
    fast = Variant('b', [1.0, 10.0, 1.0], {}, 0, None, None)
    assert fast.faster_than(slow) == (2, 2, 2)


def test_generated_inputs_look_like_what_they_are_called():
    made = generate_samples(
        dict(img=(1, 3, 64, 64), depth=(1, 1, 256, 256), camera=(1, 8, 8, 8)), 2
    )
    assert made['img'].shape == (2, 1, 3, 64, 64) and made['img'].min() < -1
    assert made['depth'].min() == 0 and 0.005 < (made['depth'] > 0).mean() < 0.05
    assert 28 < made['depth'][made['depth'] > 0].mean() < 32 and made['depth'].max() < 60
    assert made['camera'].min() == 0
    with pytest.raises(ValueError, match="'x' has the shape .* give inputs in a file"):
        generate_samples(dict(x=('batch', 3)), 1)


def test_what_cannot_be_compared_is_said_before_anything_runs(work, tmp_path):
    with pytest.raises(EngineError, match='nowhere does not exist'):
        run(work / 'float', work / 'nowhere')
    with pytest.raises(EngineError, match='files only, or folders only'):
        run(work / 'float', work / 'int8/a.onnx')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(EngineError, match='share no ONNX file'):
        run(work / 'float', tmp_path / 'empty')
    with pytest.raises(EngineError, match='nncf-python .*pip install nncf'):
        run(work / 'float', work / 'int8', '--nncf-python', sys.executable)
    np.savez(tmp_path / 'other.npz', z=np.zeros(3))
    with pytest.raises(EngineError, match="has no 'x', it has z"):
        run(work / 'float', work / 'int8', '--inputs', tmp_path / 'other.npz')


class Copier:
    """In the place of NNCF: gives the float graph back, and notes what it was given."""

    def quantize(self, graph, samples, out):
        self.given = samples
        openvino.save_model(openvino.Core().read_model(graph), out)


def test_the_peer_calibrates_on_its_own_inputs_and_comes_last(work, tmp_path):
    np.savez(tmp_path / 'own.npz', x=np.ones((2, 1, 3, 24, 24), np.float32))
    peer, graphs = Copier(), find_graphs([work / 'float/a.onnx', work / 'int8/a.onnx'])
    settings = dict(runs=2, inputs=work / 'inputs.npz', memory=False)
    (found,) = benchmark(graphs, **settings, nncf=peer, nncf_inputs=tmp_path / 'own.npz')
    name, variants = found
    assert name == 'a.onnx' and [v.name for v in variants] == ['float/a', 'int8/a', 'NNCF']
    assert (peer.given['x'] == 1).all() and variants[-1].sqnr['y'] > 30
    assert list(graphs['a.onnx']) == ['float/a', 'int8/a']
    list(benchmark(graphs, **settings, nncf=peer))
    assert peer.given['x'].shape == (3, 1, 3, 24, 24) and not (peer.given['x'] == 1).any()


@pytest.mark.skipif('NNCF_PYTHON' not in os.environ, reason='NNCF_PYTHON names no Python with nncf')
def test_nncf_is_a_row_of_the_table(work):
    found = run(
        *(work / k / 'a.onnx' for k in ('float', 'int8')),
        *('--inputs', work / 'inputs.npz', '--nncf-python', os.environ['NNCF_PYTHON']),
    )
    peer = found['a.onnx'][-1]
    assert peer.name == 'NNCF' and peer.sqnr['y'] > 10 and peer.int8[0] >= 1


def test_another_python_that_ends_without_a_word_is_told(tmp_path):
    with pytest.raises(EngineError, match='/bin/false: it ended with exit code 1 and no message'):
        Nncf('/bin/false', tmp_path / 'peer.py')
