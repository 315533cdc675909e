"""TensorRT for RTX: its compiler on small graphs whose verdict is known, and the engine."""

import sys
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from mmdet3d_quant.engines import ENGINES, ONNXRuntime
from mmdet3d_quant.engines import tensorrt as plan_module
from mmdet3d_quant.engines.files import EngineError
from mmdet3d_quant.engines.tensorrt_rtx import Compiled, TensorRTRTX, compile_onnx, is_installed
from mmdet3d_quant.engines.tensorrt_rtx import compiler as compiler_module
from mmdet3d_quant.engines.tensorrt_rtx import engine as engine_module
from mmdet3d_quant.engines.tensorrt_rtx.record import Kernel, Product, read_layers, read_products
from tests.engines import tensorrt_api
from tests.engines.qdq import CHANNELS, QDQ, SIZE
from tests.matrix import requirements
from tests.small import ROOT

compiles = pytest.mark.skipif(not is_installed(), reason='TensorRT for RTX is not installed')
MAP = CHANNELS * SIZE * SIZE


def verdict(path, sm='SM86', **options):
    return compile_onnx(path, [sm], **options)[sm]


def one_conv(path, **options):
    graph = QDQ(**options)
    return graph.save(path, graph.conv('x', 'conv'))


@compiles
def test_every_product_is_told_with_the_type_it_runs_in(tmp_path):
    g = QDQ()
    y = g.node('Relu', g.conv('x', 'first'))
    y = g.conv(y, '')
    y = g.conv(y, 'twin', quantized=False)
    y = g.conv(y, 'twin')
    y = g.node('Transpose', y, perm=[0, 2, 3, 1])
    scales = [0.01] * CHANNELS
    rows = g.weight(CHANNELS, CHANNELS)
    y = g.node('MatMul', g.qdq(y), g.qdq(rows, scales, axis=1), name='matmul')
    y = g.node('MatMul', y, g.weight(CHANNELS, CHANNELS), name='float matmul')
    y = g.node('Reshape', y, g.constant(np.array([-1, CHANNELS])))
    y = g.node('Gemm', g.qdq(y), g.qdq(g.weight(CHANNELS, CHANNELS)), name='[gemm]')
    found = verdict(g.save(tmp_path / 'm.onnx', y))
    assert found.accepted and not found.error and found.version and found.seconds > 0
    assert [(p.name.partition('#')[0], p.op, p.runs_in) for p in found.products] == [
        ('first', 'Conv', 'Int8'),
        ('Conv', 'Conv', 'Int8'),
        ('twin', 'Conv', 'Float'),
        ('twin', 'Conv', 'Int8'),
        ('matmul', 'MatMul', 'Int8'),
        ('float matmul', 'MatMul', 'Float'),
        ('[gemm]', 'Gemm', 'Int8'),
    ]
    assert len({p.name for p in found.products}) == 7
    told = found.summary()
    assert (told['int8'], told['of'], told['fp8']) == (5, 7, 0)
    assert [p['runs_in'] for p in told['not_in_int8']] == ['Float', 'Float']


@compiles
def test_kernels_and_bytes_of_one_convolution(tmp_path):
    """A kernel rounds the input, one convolves to float32, one multiplies by the scales."""
    found = verdict(one_conv(tmp_path / 'm.onnx'))
    assert [layer.written for layer in found.layers] == [MAP, 4 * MAP, 4 * MAP]
    assert found.activation_bytes == 9 * MAP and found.kernels == 3
    assert found.engine_bytes > CHANNELS * CHANNELS * 9
    open_batch = verdict(one_conv(tmp_path / 'n.onnx', batch='n'))
    assert (open_batch.int8, open_batch.activation_bytes) == (1, 9 * MAP)


@compiles
def test_nothing_of_a_float_graph_is_in_int8(tmp_path):
    g = QDQ()
    path = g.save(tmp_path / 'm.onnx', g.conv('x', 'conv', quantized=False))
    found = verdict(path)
    assert found.accepted and found.products == (Product('conv', 'Conv', 'Float', 't0'),)


@compiles
@pytest.mark.parametrize(
    'planted, words',
    [
        (dict(zero=3), 'Non-zero zero point is not supported.*node Q0'),
        (dict(scale=np.nan), 'Scale coefficients must all be positive'),
    ],
)
def test_a_refusal_is_told_in_the_words_of_the_compiler(tmp_path, planted, words):
    g = QDQ()
    found = verdict(g.save(tmp_path / 'm.onnx', g.conv('x', 'conv', **planted)))
    assert not found.accepted and found.products == ()
    with pytest.raises(EngineError, match=words):
        raise EngineError(found.error)
    assert found.summary() == dict(accepted=False, warnings=[], error=found.error)


@compiles
def test_a_crash_of_the_compiler_is_a_result(tmp_path):
    g = QDQ()
    scale = g.node('ReduceMax', g.node('Abs', 'x'), keepdims=0)
    found = verdict(g.save(tmp_path / 'm.onnx', g.conv('x', 'conv', scale=scale)))
    assert found == Compiled('SM86', False, 'the compiler crashed (signal 11)')


@compiles
def test_generations_differ(tmp_path):
    fp8 = QDQ(dtype=TensorProto.FLOAT8E4M3FN)
    path = fp8.save(tmp_path / 'm.onnx', fp8.conv('x', 'conv'), opset=19)
    found = compile_onnx(path, ['SM86', 'SM89'])
    assert not found['SM86'].accepted and found['SM86'].error
    assert found['SM89'].accepted and (found['SM89'].int8, found['SM89'].fp8) == (0, 1)


@compiles
def test_files_that_are_none_and_limits_are_results(tmp_path):
    path = one_conv(tmp_path / 'm.onnx')
    for name, content in (('cut', path.read_bytes()[:-500]), ('text', b'hello'), ('empty', b'')):
        (tmp_path / name).write_bytes(content)
        assert verdict(tmp_path / name).error == 'it is cut off, or no ONNX file'
    assert verdict(path, timeout=0.01).error == 'the compiler did not finish within 0.01 seconds'


@compiles
def test_weights_in_another_file(tmp_path):
    model = onnx.load(one_conv(tmp_path / 'm.onnx'))
    options = dict(save_as_external_data=True, location='weights.bin', size_threshold=0)
    onnx.save(model, tmp_path / 'outside.onnx', **options)
    assert verdict(tmp_path / 'outside.onnx').int8 == 1
    (tmp_path / 'weights.bin').unlink()
    assert 'Failed to import initializer: c0' in verdict(tmp_path / 'outside.onnx').error


@compiles
def test_a_convolution_in_a_function_of_the_file_is_counted(tmp_path):
    pytest.importorskip('onnx.inliner')
    g = QDQ()
    x, w = g.qdq('x'), g.qdq(g.weight(CHANNELS, CHANNELS, 3, 3), [0.01] * CHANNELS, axis=0)
    model = onnx.load(g.save(tmp_path / 'm.onnx', g.node('Conv', x, w, name='conv', pads=[1] * 4)))
    (conv,) = (node for node in model.graph.node if node.op_type == 'Conv')
    opsets = [onnx.helper.make_opsetid('', 17)]
    inner = onnx.helper.make_node('Conv', ['a', 'b'], ['c'], pads=[1] * 4)
    block = onnx.helper.make_function('mine', 'Block', ['a', 'b'], ['c'], [inner], opsets)
    model.functions.append(block)
    model.opset_import.append(onnx.helper.make_opsetid('mine', 1))
    conv.domain, conv.op_type = 'mine', 'Block'
    del conv.attribute[:]
    onnx.save(model, tmp_path / 'm.onnx')
    found = verdict(tmp_path / 'm.onnx')
    assert [(p.op, p.runs_in) for p in found.products] == [('Conv', 'Int8')]


def test_one_version_wherever_it_is_named():
    wanted = sorted(word for word in compiler_module.INSTALL.split() if '==' in word)
    lines = (ROOT / 'requirements/compiler.txt').read_text().splitlines()
    assert sorted(line for line in lines if not line.startswith('#')) == wanted
    assert sorted(requirements()['compiler']) == wanted
    assert compiler_module.INSTALL in (ROOT / 'docs/compiler.md').read_text()


def test_what_cannot_be_asked(tmp_path, monkeypatch):
    path = one_conv(tmp_path / 'm.onnx')
    monkeypatch.setitem(sys.modules, 'tensorrt_rtx_bindings', None)
    for ask in (compile_onnx, ENGINES['tensorrt-rtx']):
        with pytest.raises(EngineError, match='not installed here: pip install --no-deps tensorrt'):
            ask(path)
    monkeypatch.setattr('mmdet3d_quant.engines.tensorrt_rtx.compiler.is_installed', lambda: True)
    with pytest.raises(EngineError, match='no GPU generation SM90; there are SM75, SM80'):
        compile_onnx(path, ['SM90'])
    with pytest.raises(EngineError, match='none.onnx does not exist'):
        compile_onnx(tmp_path / 'none.onnx')


TENSOR = '{{ Name: {}, Dimensions: {}, Strides: [1], StrideOrder: [0], Datatype: {}, Format: (L) }}'
LINE = 'Name: {}, LayerType: {}, Inputs: [ {} ], Constants: [{}], Outputs: [ {} ], TacticName: a, '


def line(name, kind, reads, writes, origins, constants=''):
    """A line of the compiler's log."""
    tensors = (', '.join(TENSOR.format(*t) for t in side) for side in (reads, writes))
    made_of = '\x1f'.join(f'[ONNX Layer: {origin}]' for origin in origins)
    a, b = tensors
    return LINE.format(name, kind, a, constants, b) + f'StreamId: 0, Metadata: {made_of}'


def test_the_log_is_read_or_refused():
    log = '\n'.join(
        [
            'Layers:',
            line('wait', 'wait', [], [], []),
            line('a', 'correlation', [('x', '[2,3]', 'Int8')], [('y', '[5]', 'Half')], ['a', 'b']),
            line('b', 'kgen', [('y', '[5]', 'Half')], [('z', '[]', 'Int4')], ['c']),
        ]
    )
    layers = read_layers(log)
    assert layers == (
        Kernel('a', 'correlation', ('Int8',), ('Half',), ('a', 'b'), 10),
        Kernel('b', 'kgen', ('Half',), ('Int4',), ('c',), 1),
    )
    assert Compiled('SM86', True, layers=layers).activation_bytes == 11
    with pytest.raises(ValueError, match='a line of another form: Name: a, Kind: b'):
        read_layers('Layers:\nName: a, Kind: b')
    for tensor in ('[5]', 'Posit'), ('[-1,5]', 'Half'):
        odd = read_layers(line('a', 'kgen', [], [('y', *tensor)], ['a']))
        assert Compiled('SM86', True, layers=odd).activation_bytes is None


def test_types_of_products_are_those_of_the_kernels_that_multiply():
    names = ('mixed', 'shared 1', 'shared 2', 'pointwise', 'gone')
    nodes = [onnx.helper.make_node('Conv', ['x'], ['y'], name) for name in names]
    model = onnx.ModelProto(graph=onnx.GraphProto(node=nodes))
    layers = (
        Kernel('a', 'correlation', ('Int8', 'Float'), (), ('mixed',), 0),
        Kernel('b', 'gemm', ('Int8',), (), ('shared 1', 'shared 2'), 0),
        Kernel('c', 'kgen', ('Int8',), (), ('pointwise', 'shared 1'), 0),
    )
    found = [product.runs_in for product in read_products(model, layers)]
    assert found == ['Float+Int8', 'Int8', 'Int8', '', '']


@pytest.fixture
def on_cpu(monkeypatch):
    """An RTX GPU whose buffers lie on the CPU, and a compiler whose engine is the graph."""

    def compile_fake(path, sms, plan):
        plan.write_bytes(tensorrt_api.PREFIX + b':' + path.read_bytes())
        products = (Product('a', 'Conv', 'Int8', 'x'), Product('b', 'MatMul', 'Int8', 'y'))
        return {sm: Compiled(sm, True, products=products) for sm in sms}

    monkeypatch.setitem(sys.modules, 'tensorrt_rtx_bindings', tensorrt_api)
    monkeypatch.setattr(engine_module, 'check_installed', lambda: None)
    monkeypatch.setattr(engine_module, 'compile_onnx', compile_fake)
    monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    monkeypatch.setattr('torch.cuda.get_device_capability', lambda: (8, 9))
    monkeypatch.setattr('torch.cuda.current_stream', lambda: SimpleNamespace(cuda_stream=7))
    fake = SimpleNamespace(**{n: getattr(torch, n) for n in ('cuda', 'from_numpy')})
    fake.empty = lambda shape, dtype, device: torch.empty(shape, dtype=dtype)
    monkeypatch.setattr(plan_module, 'torch', fake)


@pytest.mark.usefixtures('on_cpu')
def test_the_engine_compiles_for_the_gpu_that_is_here_and_runs(tmp_path):
    path = one_conv(tmp_path / 'm.onnx')
    engine = TensorRTRTX(path)
    x = np.random.default_rng(1).normal(size=(1, CHANNELS, SIZE, SIZE)).astype(np.float32)
    (expected,) = ONNXRuntime(path)({'x': x}).values()
    (found,) = engine({'x': x}).values()
    assert np.abs(expected).max() > 0.1 and np.allclose(found, expected, atol=1e-5)
    assert engine.compiled.sm == 'SM89' and engine.int8_convolutions() == (1, 1)


@pytest.mark.usefixtures('on_cpu')
def test_a_gpu_that_does_not_run_it_and_a_refusal(tmp_path, monkeypatch):
    path = one_conv(tmp_path / 'm.onnx')
    refused = lambda path, sms, plan: {sms[0]: Compiled(sms[0], False, 'no such thing')}  # noqa: E731
    monkeypatch.setattr(engine_module, 'compile_onnx', refused)
    with pytest.raises(EngineError, match='TensorRT for RTX cannot run .*m.onnx: no such thing'):
        TensorRTRTX(path)
    monkeypatch.setattr('torch.cuda.get_device_capability', lambda: (9, 0))
    with pytest.raises(EngineError, match='needs an RTX GPU.*here is SM90.*does not run'):
        TensorRTRTX(path)
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    with pytest.raises(EngineError, match='needs an RTX GPU.*here is none.*does not run'):
        TensorRTRTX(path)
