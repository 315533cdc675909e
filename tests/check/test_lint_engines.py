"""The linter on small graphs: by engine, silent on clean ones, and as the compiler has it."""

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from mmdet3d_quant.check.compiled import TARGET, beside, disagreements
from mmdet3d_quant.check.lint import RULES, Graph, layers, lint
from mmdet3d_quant.check.lint.effects import ERROR, NOTE, UNSEEN, WARNING, Effect
from mmdet3d_quant.check.lint.layers import coverage
from mmdet3d_quant.check.lint.page import EXPLAINED, page
from mmdet3d_quant.check.lint.profiles import PROFILES, profile_of
from mmdet3d_quant.engines.tensorrt_rtx import Compiled, is_installed
from mmdet3d_quant.engines.tensorrt_rtx.record import Kernel, Product, read_layers, read_products
from mmdet3d_quant.export.targets import TARGETS, target_names
from tests.check.agreement import KINDS, costs, grow, judge, kinds, plant
from tests.check.planted import PLANTED, conv, ints, pair, weight
from tests.engines.qdq import QDQ
from tests.small import ROOT
from tests.tools.tiny import tool

LINT, PAGE = tool('lint_onnx'), tool('lint_rules')
compiles = pytest.mark.skipif(not is_installed(), reason='TensorRT for RTX is not installed')
ALL = [(name, *kind) for name in PLANTED for kind in kinds(name)]


def ids(model, target):
    return {f.rule.id for f in lint(Graph(model, target))}


@pytest.mark.parametrize('name', PLANTED)
def test_a_defect_is_found_and_its_clean_twin_is_not(name):
    case = PLANTED[name]
    for kind in kinds(name):
        wrong, clean = (Graph(plant(name, w, *kind), TARGET) for w in (True, False))
        assert (case.rule, case.case) in {(f.rule.id, f.case) for f in lint(wrong)}
        assert {f.rule.id for f in lint(clean)} <= set(case.also)


@pytest.mark.parametrize('target', PROFILES)
def test_clean_graphs_are_clean_for_every_engine(target):
    for name, case in PLANTED.items():
        if case.opset or True in case.typed[:1]:
            continue  # TensorRT 8 has neither opset 21 nor FP16 scales
        found = ids(plant(name, False, 8, False), target)
        assert found <= set(case.also), name


def test_every_engine_has_a_profile_and_effects_are_of_engines():
    assert {profile_of(name).name for name in TARGETS} <= set(PROFILES)
    assert profile_of('tensorrt') is PROFILES['tensorrt8'] and 'tensorrt' in target_names()
    for rule in RULES:
        assert all(set(effects) <= set(PROFILES) and effects for effects in rule.effects.values())
    told = {case.case for case in PLANTED.values()}
    cases = {case for rule in RULES for case in rule.effects}
    assert cases - told == {'an output', 'INT4 weight only', 'FP16'}  # below


def test_severity_follows_from_the_effect():
    severity = {what: Effect(what, 'ONNX').severity for what in ('refused', 'float', 'nothing')}
    assert severity == dict(refused=ERROR, float=WARNING, nothing=NOTE)
    assert Effect('nothing', UNSEEN).severity == WARNING
    model = plant('UINT8', True, 8, False)
    for target, effect, severity in (
        ('tensorrt8', 'refused', ERROR),
        ('tensorrt10', 'wrong numbers', ERROR),
        ('tensorrt-rtx', 'wrong numbers', ERROR),
    ):
        found = lint(Graph(model, target))
        assert {(f.effect.what, f.severity) for f in found} == {(effect, severity)}
    assert ids(model, 'openvino') == set()
    model = plant('batch norm', True, 8, False)
    (found,) = lint(Graph(model, TARGET))
    assert found.as_dict()['effect'] == 'nothing' and not found.counts
    (found,) = lint(Graph(model, 'tensorrt11'))
    assert found.severity == WARNING and found.effect.seen == UNSEEN


def test_tensorrt_8_wants_float_scales_three_inputs_and_an_old_opset():
    half = plant('input float', False, 8, True)  # opset 19
    found = lint(Graph(half, 'tensorrt8'))
    assert {(f.rule.id, f.case) for f in found} == {('Q39', 'FP16'), ('Q40', '')}
    assert {f.severity for f in found if f.rule.id == 'Q39'} == {ERROR}
    assert ids(half, 'tensorrt10') == ids(half, TARGET) == set()

    g = QDQ()
    stored = g.constant(np.ones((8, 8, 3, 3), np.int8))
    w = g.node('DequantizeLinear', stored, g.constant(np.full(8, 0.01, np.float32)), axis=0)
    model = g.model(conv(g, g.qdq('x'), w))
    (found,) = lint(Graph(model, 'tensorrt8'))
    assert found.rule.id == 'Q35' and found.severity == ERROR
    assert ids(model, TARGET) == ids(model, 'openvino') == set()
    assert layers(Graph(model, TARGET))[0].int8

    for opset, expected in ((17, set()), (18, {'Q40'})):
        g = QDQ()
        model = g.model(g.conv('x', 'conv'), opset)
        assert ids(model, 'tensorrt8') == expected and ids(model, 'tensorrt11') == set()


def test_int8_by_attribute_and_scales_that_are_copies():
    g = QDQ()
    scale = g.node('Identity', g.constant(np.float32(0.1)))
    y = pair(g, 'x', scale, None, dict(output_dtype=TensorProto.INT8))
    g.nodes.append(helper.make_node('Constant', [], ['number'], value_float=0.1))
    model = g.model(conv(g, pair(g, conv(g, y, weight(g)), 'number'), weight(g)), 21)
    assert ids(model, TARGET) == set() and all(x.int8 for x in layers(Graph(model, TARGET)))


def test_integers_that_leave_and_weights_of_four_bits():
    g = QDQ()
    model = g.model(g.conv('x', 'conv'))
    name = next(n.output[0] for n in model.graph.node if n.op_type == 'QuantizeLinear')
    model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.INT8, None))
    (found,) = lint(Graph(model, TARGET))
    assert (found.rule.id, found.case, found.severity) == ('Q32', 'an output', NOTE)
    g = QDQ()
    g.stored.append(helper.make_tensor('four', TensorProto.INT4, (8, 8), [1] * 64))
    w = g.node('DequantizeLinear', 'four', g.constant(np.full(8, 0.1, np.float32)), axis=1)
    y = g.node('MatMul', g.node('Transpose', 'x', perm=[0, 2, 3, 1]), w)
    graph = Graph(g.model(y, 21), TARGET)
    assert ('Q41', 'INT4 weight only') in {(f.rule.id, f.case) for f in lint(graph)}
    assert not layers(graph)[0].int8


def test_fp8_is_for_engines_that_have_it():
    model = plant('FP8 zero point', False, 8, False)
    for target, told in (('tensorrt8', 'refused'), ('openvino', 'float')):
        found = [f for f in lint(Graph(model, target)) if f.rule.id == 'Q41']
        assert {(f.case, f.effect.what) for f in found} == {('FP8', told)}
        assert not any(x.fp8 or x.int8 for x in layers(Graph(model, target)))
    for target in ('tensorrt10', 'tensorrt11', 'tensorrt-rtx'):
        graph = Graph(model, target)
        assert lint(graph) == [] and [(x.int8, x.fp8) for x in layers(graph)] == [(False, True)]
    assert coverage(layers(Graph(model, TARGET))) == 1


def test_functions_of_a_file_are_looked_into():
    pytest.importorskip('onnx.inliner')
    model = plant('zero point', True, 8, False)
    inner, stored = list(model.graph.node), [i.name for i in model.graph.initializer]
    output = model.graph.output[0].name
    opsets = [helper.make_opsetid('', 17)]
    block = helper.make_function('mine', 'Block', ['x', *stored], [output], inner, opsets)
    del model.graph.node[:]
    model.graph.node.append(helper.make_node('Block', ['x', *stored], [output], domain='mine'))
    model.functions.append(block)
    model.opset_import.append(helper.make_opsetid('mine', 1))
    graph = Graph(model, TARGET)
    assert {f.rule.id for f in lint(graph)} == {'Q20'} and [x.int8 for x in layers(graph)] == [
        True
    ] * 2


def test_a_product_with_the_matrix_first_is_a_layer():
    g = QDQ()
    y = g.node('Reshape', 'x', g.constant(ints(8, -1)))
    y = g.node('MatMul', weight(g, 16, 8), g.qdq(y))
    (layer,) = layers(Graph(g.model(y), TARGET))
    assert layer.int8 and layer.macs == 16 * 8 * 16 * 16


# The compiler


@compiles
@pytest.mark.parametrize('part', range(2))
def test_the_compiler_agrees_on_a_part_of_the_graphs(part, tmp_path):
    """Thirty graphs: some planted defects with their twins, some random; the rest is slow."""
    for name, *kind in ALL[part * 25 :: 50]:
        wrong, clean = (judge(plant(name, w, *kind), tmp_path / 'm.onnx') for w in (True, False))
        assert wrong.told == clean.told == (), name
    for seed in range(part, 8, 2):
        assert judge(grow(seed), tmp_path / 'm.onnx').told == (), seed


@compiles
@pytest.mark.slow
@pytest.mark.parametrize('name', PLANTED)
def test_the_compiler_agrees_on_every_planted_defect(name, tmp_path):
    case = PLANTED[name]
    for kind in kinds(name):
        wrong, clean = (judge(plant(name, w, *kind), tmp_path / 'm.onnx') for w in (True, False))
        assert wrong.told == clean.told == ()
        effects = next(r for r in RULES if r.id == case.rule).effects[case.case]
        if case.twin and TARGET in effects:
            assert costs(wrong, clean, effects[TARGET].what) is not False


@compiles
@pytest.mark.slow
@pytest.mark.parametrize('seed', range(1000, 1040))
def test_the_compiler_agrees_on_random_graphs(seed, tmp_path):
    assert judge(grow(seed), tmp_path / 'm.onnx').told == ()


def accepted(runs_in, output):
    return Compiled('SM86', True, products=(Product('conv', 'Conv', runs_in, output),))


def test_refusals_are_compared_whatever_the_target_is():
    model = plant('zero point', True, 8, False)
    graph = Graph(model, 'openvino')
    products = [Product(x.name, 'Conv', 'Int8', x.output[0]) for x in graph.layers()]
    told = disagreements(graph, Compiled('SM86', True, products=tuple(products)))
    assert told == ['Q20 says that the compiler refuses it']
    assert disagreements(graph, Compiled('SM86', False, 'no')) == []
    clean = Graph(plant('zero point', False, 8, False))
    told = disagreements(clean, Compiled('SM86', False, 'no'))
    assert told == ['no rule of the linter says that the compiler refuses it']


def test_the_verdict_stands_beside_a_finding():
    graph = Graph(plant('activation scale of one dimension', True, 8, False), TARGET)
    (finding,) = lint(graph)
    node = next(n for n in graph.layers() if n.name == 'conv')
    assert beside(graph, finding, accepted('Float', node.output[0])) == 'Float'
    assert beside(graph, finding, Compiled('SM86', False, 'no')) == 'refused'
    (finding,) = lint(Graph(plant('conv axis', True, 8, False), TARGET))
    assert beside(graph, finding, accepted('Half', node.output[0])) == 'Half'


def test_the_type_of_a_product_is_that_of_what_it_multiplies():
    tensor = '{{ Name: a, Dimensions: {}, Datatype: {} }}'
    line = 'Name: {}, LayerType: {}, Inputs: [ {} ], Constants: [], Outputs: [ {} ], '
    line += 'TacticName: , Metadata: [ONNX Layer: p]'
    half, byte = tensor.format('[8,8]', 'Half'), tensor.format('[8,8]', 'Int8')
    bias = tensor.format('[1,8,1,1]', 'Float')
    (conv_,) = read_layers(line.format('p', 'correlation', f'{byte}, {bias}', half))
    assert conv_.inputs == ('Int8',)
    node = helper.make_node('Gemm', ['a', 'b'], ['c'], 'p')
    model = onnx.ModelProto(graph=onnx.GraphProto(node=[node]))
    for name, kind, types, expected in (
        ('__myl_CastMulFc', 'runtime_fusion', ('Half',), 'Half'),
        ('__myl_CastMulFcMulCast', 'runtime_fusion', ('Int8',), 'Float'),
        ('p', 'gemm', ('Half',), 'Int8'),
    ):
        kernel = Kernel(name, kind, ('Int8',), types, ('p',), 0)
        assert [p.runs_in for p in read_products(model, (kernel,))] == [expected]


# Tool and page


def test_the_tool_tells_the_effect_and_notes_do_not_fail(tmp_path, capsys):
    path, out = tmp_path / 'm.onnx', tmp_path / 'out.json'
    onnx.save(plant('batch norm', True, 8, False), path)
    assert LINT.main([str(path), '--target', 'tensorrt-rtx', '--json', str(out)]) == 0
    told = ' '.join(capsys.readouterr().out.split())
    assert 'for TensorRT for RTX 1.7' in told and '0 findings, 1 notes' in told
    assert "note: nothing (NVIDIA's compiler 1.7.1)" in told.replace('│ ', '')
    (finding,) = json.loads(out.read_text())[str(path)]['findings']
    assert (finding['severity'], finding['effect']) == (NOTE, 'nothing')
    assert LINT.main([str(path), '--target', 'tensorrt11']) == 1
    model = plant('UINT8', True, 8, False)
    onnx.helper.set_model_props(model, {'mmdet3d_quant.target': 'openvino'})
    onnx.save(model, path)
    assert LINT.main([str(path)]) == 0
    assert 'for OpenVINO; the file says openvino' in capsys.readouterr().out
    assert LINT.main([str(path), '--target', 'tensorrt8']) == 1


def test_the_page_of_the_rules_is_up_to_date(tmp_path, capsys):
    text = (ROOT / 'docs/lint.md').read_text()
    assert PAGE.main(['--out', str(tmp_path / 'lint.md')]) is None
    assert (tmp_path / 'lint.md').read_text() == text, (
        'python tools/lint_rules.py --out docs/lint.md'
    )
    PAGE.main(['--agreement', str(tmp_path / 'none.json')])
    assert 'Agreement' not in capsys.readouterr().out
    study = json.loads((ROOT / 'docs/lint_agreement.json').read_text())
    assert study['totals']['graphs'] >= 300 and set(study['rules']) == {r.id for r in RULES}
    study['disagreements'].append(dict(graph='new one', rule='Q01', what='INT8'))
    with pytest.raises(ValueError, match='EXPLAINED has no sentence on new one: INT8'):
        page(study)
    assert all(text.count(sentence) for sentence in EXPLAINED.values())


def test_widths_and_types_take_turns():
    assert len({(*kind,) for kind in KINDS}) == 4
    types = {Graph(grow(seed), TARGET).types['x'] for seed in range(4)}
    assert types == {'FLOAT', 'FLOAT16'}
