"""benchmarks/peers.py: what it says of numbers that are known."""

import sys

import onnx

from mmdet3d_quant.files.typed import is_strong
from tests.small import ROOT

sys.path.insert(0, str(ROOT / 'benchmarks'))
from peer_files.make import mark_strong  # noqa: E402
from peer_files.table import Row, int8_table, missed, typed_table  # noqa: E402


def compiled(int8, kernels, of=3):
    return dict(accepted=True, int8=int8, of=of, kernels=kernels, activation_bytes=2_500_000)


REFUSED = dict(accepted=False, error='no', warnings=[])


def rows(peer):
    return [
        Row('float', {'y': float('inf')}, compiled(0, 3)),
        Row('ours, mse', {'y': 20.0}, compiled(3, 6), (2.0, 1.9, 2.1), (3, 3), {'y': 19.0}),
        Row('ours, auto', {'y': 40.0}, compiled(3, 6), openvino_sqnr={'y': 40.0}),
        Row('ours for OpenVINO', {'y': 25.0}, openvino_sqnr={'y': 24.0}, unsigned=True),
        peer,
    ]


def test_the_first_of_ours_is_judged_by_a_decibel_layers_and_kernels():
    told = {'openvino_sqnr': {'y': 0.0}}
    assert not missed(rows(Row('NNCF, INT8', {'y': 19.0}, compiled(3, 6), **told)))
    assert missed(rows(Row('NNCF, INT8', {'y': 19.1}, compiled(4, 5, 4), **told))) == [
        'y: +0.9 dB to NNCF, INT8',
        '3 layers in INT8, NNCF, INT8 has 4',
        '6 kernels, NNCF, INT8 has 5',
    ]
    assert not missed(rows(Row('Model-Optimizer', {'y': 19.0}, REFUSED, **told)))
    peer = Row('Model-Optimizer', {'y': float('nan')}, REFUSED, **told)
    assert missed(rows(peer)) == ['y: +nan dB to Model-Optimizer']


def test_ours_refused_is_missed():
    found = rows(Row('NNCF', {'y': 1.0}, compiled(1, 9), openvino_sqnr={'y': 1.0}))
    found[1].compiled = REFUSED
    assert missed(found) == ['refused by the compiler, unlike NNCF']


def test_files_for_openvino_compare_with_each_other_in_one_engine():
    peer = Row('NNCF', {'y': 24.5}, compiled(3, 1), openvino_sqnr={'y': 1.0}, unsigned=True)
    assert missed(rows(peer)) == ['y: +0.5 dB to NNCF']  # 25.0 in ONNX Runtime
    peer = Row('NNCF for OpenVINO', {'y': 24.5}, unsigned=True)
    assert missed(rows(peer)) == ['y: -0.5 dB to NNCF for OpenVINO']  # 24.0 in OpenVINO


def test_tables_have_no_verdict_of_what_tensorrt_does_not_compute():
    peer = Row('NNCF', {'y': 24.5}, compiled(3, 1), openvino_sqnr={'y': 1.0}, unsigned=True)
    lines = int8_table(rows(peer)).splitlines()
    assert lines[2] == '| float |  | 0 of 3 | 3 | 2.5 |  |  |'
    assert lines[3] == '| ours, mse | 20.0 | 3 of 3 | 6 | 2.5 | 3 of 3 | 2.00 (1.90-2.10) |'
    assert lines[-1] == '| NNCF | 24.5 |  |  |  |  |  |'
    assert len({line.count('|') for line in lines}) == 1


def test_a_refused_file_says_so():
    first = Row('float32', {'a': 20.0, 'b': 30.0}, compiled(3, 6))
    other = Row(
        'AutoCast', {'a': 19.0, 'b': 29.0}, REFUSED, against={'a': 40.0, 'b': 41.0}, casts=2
    )
    lines = typed_table([first, other]).splitlines()
    assert lines[2] == '| float32 | 20.0 / 30.0 |  | 0 | 3 of 3 | 6 | 2.5 |'
    assert lines[3] == '| AutoCast | 19.0 / 29.0 | 40.0 / 41.0 | 2 | refused |  |  |'
    assert len({line.count('|') for line in lines}) == 1


def test_files_typed_by_others_are_rounded_as_ours(tmp_path):
    graph = onnx.helper.make_graph([], 'g', [], [])
    model = onnx.helper.make_model(graph)
    onnx.helper.set_model_props(model, {'mine': 'kept'})
    onnx.save(model, str(tmp_path / 'x.onnx'))
    assert not is_strong(tmp_path / 'x.onnx')
    mark_strong(tmp_path / 'x.onnx')
    props = {p.key: p.value for p in onnx.load(str(tmp_path / 'x.onnx')).metadata_props}
    assert is_strong(tmp_path / 'x.onnx') and props['mine'] == 'kept'
