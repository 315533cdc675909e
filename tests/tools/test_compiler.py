"""NVIDIA's compiler in the tools: what they compile, tell and refuse; the compiler is a fake."""

import json
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from mmdet3d_quant.check.compiled import disagreements
from mmdet3d_quant.check.lint import read_graph
from mmdet3d_quant.core.modes import quantizers
from mmdet3d_quant.engines import EngineError
from mmdet3d_quant.engines.tensorrt_rtx import Compiled, is_installed
from mmdet3d_quant.engines.tensorrt_rtx.record import Kernel, Product
from mmdet3d_quant.layers import QuantConv2d
from tests.engines.qdq import CHANNELS, QDQ
from tests.small import ROOT
from tests.tools.tiny import tool

sys.path.insert(0, str(ROOT / 'tools'))
import compiler  # noqa: E402
import export_onnx  # noqa: E402

LINT = tool('lint_onnx')
PRODUCTS = (
    Product('a', 'Conv', 'Int8', 'x'),
    Product('b', 'MatMul', 'Int8', 'y'),
    Product('c', 'Conv', '', 'z'),
)
FILES = {
    'fuser.onnx': dict(nodes={}),
    'head.bbox.onnx': dict(nodes=dict(CustomLayerNormalization=1)),
    'lidar.backbone.xyz.onnx': dict(nodes={}, grid=[1, 2, 3]),
    'camera.backbone.onnx': dict(nodes={}),
}


def accepted(sm, written=2_500_000, products=PRODUCTS):
    layers = (Kernel('k', 'kgen', (), (), (), written),) * 3
    return Compiled(sm, True, '', (), products, layers, 9, 0.5, '1.7')


@pytest.fixture
def folder(tmp_path):
    manifest = dict(target='tensorrt', files=FILES, scales=[])
    (tmp_path / 'manifest.json').write_text(json.dumps(manifest))
    return tmp_path


@pytest.fixture
def tell(folder, monkeypatch):
    """Compiles the folder with a fake, made of SM -> verdict; returns what is told."""

    def run(fake, wanted=None, **changes):
        monkeypatch.setattr(compiler, 'is_installed', lambda: True)
        monkeypatch.setattr(compiler, 'compile_onnx', lambda path, sms: {s: fake(s) for s in sms})
        manifest = dict(json.loads((folder / 'manifest.json').read_text()), **changes)
        console = Console(width=110, record=True)
        compiler.compile_exported(console, folder, manifest, wanted)
        return console.export_text()

    return run


def rows(told):
    return [[c.strip() for c in line.split('│')[1:-1]] for line in told.splitlines() if '│' in line]


def test_generations_with_equal_results_share_a_row(tell, folder):
    told = tell(accepted)
    row = ['SM86, SM89, SM120', 'accepted', '2 of 3', '3', '7.5']
    assert rows(told) == [['fuser.onnx', *row], ['camera.backbone.onnx', *row]]
    assert 'TensorRT for RTX 1.7' in told
    manifest = json.loads((folder / 'manifest.json').read_text())
    assert manifest['scales'] == [] and list(manifest['files']) == list(FILES)
    compiled = manifest['compiled']
    assert compiled['version'] == '1.7' and set(compiled['files']) == {r[0] for r in rows(told)}
    one = compiled['files']['fuser.onnx']['SM89']
    assert (one['int8'], one['of'], one['activation_bytes']) == (2, 3, 7_500_000)
    assert one['not_in_int8'] == [dict(name='c', op='Conv', runs_in='', output='z')]


def test_generations_that_differ_have_rows_of_their_own(tell):
    other = (Product('a', 'Conv', 'Float', 'x'), *PRODUCTS[1:])
    told = tell(lambda sm: accepted(sm, products=other if sm == 'SM75' else PRODUCTS),
                ['SM75', 'SM80', 'SM121'])  # fmt: skip
    assert [row[1:4] for row in rows(told)[:2]] == [
        ['SM75', 'accepted', '1 of 3'],
        ['SM80, SM121', 'accepted', '2 of 3'],
    ]


def test_a_refusal_is_an_error_and_the_files_stay(tell, folder):
    refused = Compiled('SM89', False, 'no scale', version='1.7')
    with pytest.raises(EngineError, match=r'refuses files, which stay in .*\n.*SM89\): no scale'):
        tell(lambda sm: refused if sm == 'SM89' else accepted(sm))
    told = json.loads((folder / 'manifest.json').read_text())['compiled']['files']['fuser.onnx']
    assert told['SM89'] == dict(accepted=False, warnings=[], error='no scale')
    assert told['SM86']['accepted']


def test_when_nothing_is_compiled(tell, folder, monkeypatch):
    before = (folder / 'manifest.json').read_text()
    assert tell(accepted, wanted=[]) == '' == tell(accepted, target='openvino')
    assert tell(accepted, files={'lidar.onnx': FILES['lidar.backbone.xyz.onnx']}) == ''
    plugin = tell(accepted, files={'head.bbox.onnx': FILES['head.bbox.onnx']})
    assert plugin == "head.bbox.onnx: not compiled, since its layer norm is TensorRT's plugin\n"
    explicit = tell(accepted, wanted=['SM86'], target='openvino')
    assert explicit == 'Not compiled: the files are for openvino\n'
    monkeypatch.setattr(compiler, 'is_installed', lambda: False)
    console = Console(width=200, record=True)
    compiler.compile_exported(console, folder, json.loads(before), None)
    assert 'Not compiled' in (told := console.export_text()) and 'pip install --no-deps' in told
    assert (folder / 'manifest.json').read_text() == before


def test_fp8_is_compiled_for_generations_that_run_it_and_others_are_refused(tell):
    fp8 = Product('a', 'Conv', 'FP8', 'x')
    told = tell(lambda sm: accepted(sm, products=(fp8, *PRODUCTS)), precision='fp8+int8')
    found = rows(told)
    assert any(row[1:4] == ['SM89, SM120', 'accepted', '2 + 1 FP8 of 4'] for row in found)
    assert 'SM86' not in told and 'SM86' in tell(accepted, precision='int8')
    model = QuantConv2d(3, 4, 1)
    for quantizer in quantizers(model).values():
        quantizer.spec = replace(quantizer.spec, num_bits=(4, 3))
        quantizer.amax = 1.0 if quantizer.spec.axis is None else [1.0] * 4
    for fine in (None, [], ['SM89', 'SM120']):
        compiler.check_generations(model, fine)
    with pytest.raises(ValueError, match='_input_quantizer is fp8, which SM86 does not run: leave'):
        compiler.check_generations(model, ['SM89', 'SM86'])


def test_options_of_the_export_tool():
    def wanted(*args):
        return export_onnx.parse_args(['c.py', 'c.pth', '--out-dir', 'o', *args]).compile

    assert wanted() is None and wanted('--no-compile') == []
    assert wanted('--compile', 'SM80', 'SM120') == ['SM80', 'SM120']
    with pytest.raises(SystemExit):
        wanted('--compile', 'SM90')


def test_where_linter_and_compiler_differ(tmp_path):
    g = QDQ()
    y, z = g.conv('x', 'a'), g.conv('x', 'b', quantized=False)
    product = g.node('MatMul', y, z, name='of two maps')  # for the linter no layer
    graph = read_graph(g.save(tmp_path / 'm.onnx', product))

    def told(a, b):
        products = Product('a', 'Conv', a, y), Product('b', 'Conv', b, z)
        other = Product('of two maps', 'MatMul', 'Int8', product)
        return disagreements(graph, accepted('SM86', products=(other, *products)))

    assert told('Int8', 'Float') == []
    assert told('Float', 'Half') == ['a: INT8 for the linter, Float for the compiler']
    assert told('', 'Float') == ['a: INT8 for the linter, left out for the compiler']
    assert told('Int8', 'Int8') == ['b: float for the linter, Int8 for the compiler']
    refused = disagreements(graph, Compiled('SM86', False, 'no'))
    assert refused == ['no rule of the linter says that the compiler refuses it']
    with pytest.raises(ValueError, match='a is no layer of the file that was compiled'):
        disagreements(graph, accepted('SM86'))


@pytest.fixture
def transposed(tmp_path):
    """A convolution and a transposed one, both with Q/DQ."""
    g = QDQ()
    x, w = g.qdq(g.conv('x', 'conv')), g.weight(CHANNELS, CHANNELS, 2, 2)
    w = g.qdq(w, [0.01] * CHANNELS, axis=1)
    return g.save(tmp_path / 'm.onnx', g.node('ConvTranspose', x, w, name='up', strides=[2, 2]))


@pytest.mark.skipif(not is_installed(), reason='TensorRT for RTX is not installed')
def test_the_linter_asks_the_compiler(transposed, tmp_path, capsys):
    out = tmp_path / 'lint.json'
    assert LINT.main([str(transposed), '--compile', '--json', str(out)]) == 0
    told = ' '.join(capsys.readouterr().out.split())
    assert '2 of 2 convolutions in INT8' in told and '; 0 findings' in told
    assert "NVIDIA's compiler, SM86, SM89, SM120: accepted, 1 of 2 convolutions and" in told
    assert 'up: INT8 for the linter, Float for the compiler' in told and 'conv: INT8' not in told
    compiled = json.loads(out.read_text())[str(transposed)]['compiled']
    assert set(compiled) == {'SM86', 'SM89', 'SM120'} and compiled['SM86']['int8'] == 1


def test_a_refusal_fails_the_linter_without_a_finding(transposed, monkeypatch, capsys):
    refused = {'SM86': Compiled('SM86', False, 'no [such] thing')}
    monkeypatch.setattr(LINT, 'compile_onnx', lambda path: refused)
    monkeypatch.setattr(LINT, 'check_installed', lambda: None)
    assert LINT.main([str(transposed)]) == 0
    assert LINT.main([str(transposed), '--compile']) == 1
    assert "NVIDIA's compiler, SM86: refused: no [such] thing" in capsys.readouterr().out


def test_the_linter_without_a_compiler(transposed, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tensorrt_rtx_bindings', None)
    with pytest.raises(EngineError, match='not installed here: pip install'):
        LINT.main([str(transposed), '--compile'])
