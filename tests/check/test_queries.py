"""A head's file on equal queries: ties that fall the other way pass, what is wrong is named."""

import numpy as np
import onnx
import pytest
import torch
from mmdet3d.registry import MODELS
from mmengine.config import Config
from torch import nn

import mmdet3d_quant.bevfusion  # noqa: F401 - registers the head
from mmdet3d_quant import calibrate
from mmdet3d_quant.check import verify as judge
from mmdet3d_quant.check.ladder import climb
from mmdet3d_quant.check.queries import HEATMAP, choice_fault
from mmdet3d_quant.check.verify import QUERY_DB, verify
from mmdet3d_quant.engines import ONNXRuntime, OpenVINO
from mmdet3d_quant.export import Cut, export_onnx
from mmdet3d_quant.export.cuts import Head
from tests.small import ROOT

TINY = ROOT / 'configs/bevfusion_tiny/bevfusion_tiny_lidar-cam_synthetic.py'


def cut_of(kind, middle):
    cfg = Config.fromfile(TINY).model.bbox_head.to_dict()
    cfg['test_cfg'].update(grid_size=[64, 64, 33])
    cfg.update(type=kind, in_channels=12, num_proposals=10, train_cfg=None)
    torch.manual_seed(0)
    detector = nn.Module()
    detector.bbox_head = MODELS.build(cfg)
    head = Head(detector).eval()
    if kind.startswith('Quant'):
        calibrate(head, [(middle,)], 'max')
    return Cut('head.bbox', head, dict(middle=middle), head.output_names)


def exported(cut, path, **options):
    export_onnx(
        cut.module, list(cut.inputs.values()), path, ['middle'], cut.output_names, **options
    )
    return onnx.load(path)


@pytest.fixture(scope='module')
def right(tmp_path_factory):
    """A float head and its file, on a map."""
    cut = cut_of('TransFusionHead', torch.randn(1, 12, 16, 16))
    path = tmp_path_factory.mktemp('head') / 'head.bbox.onnx'
    return cut, exported(cut, path), path


def faults(cut, model, path, quantized=False):
    onnx.save(model, path)
    return {r.output: r.fault for r in verify(cut, path, quantized, real=False)}


def changed(model, name, change):
    """The file with other numbers in one stored tensor."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    (stored,) = (t for t in copy.graph.initializer if t.name.endswith(name))
    stored.CopyFrom(
        onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(stored)), stored.name)
    )
    return copy


@pytest.mark.parametrize('kind', ['TransFusionHead', 'QuantTransFusionHead'])
def test_ties_that_fall_the_other_way_are_no_fault(kind, tmp_path, monkeypatch):
    """On an even map most cells are equal: whoever chooses takes any of them."""
    cut = cut_of(kind, torch.ones(1, 12, 16, 16))
    quantized = kind != 'TransFusionHead'
    model = exported(cut, tmp_path / 'm.onnx')
    sigmoid = next(n for n in model.graph.node if n.op_type == 'Sigmoid')
    noise = 1e-6 * np.random.default_rng(0).normal(size=(1, 10, 16, 16))
    model.graph.initializer.append(onnx.numpy_helper.from_array(noise.astype('f4'), 'noise'))
    place = list(model.graph.node).index(sigmoid)
    last = onnx.helper.make_node('Add', [sigmoid.input[0], 'noise'], ['last bits'])
    sigmoid.input[0] = 'last bits'
    model.graph.node.insert(place, last)
    onnx.save(model, tmp_path / 'm.onnx')
    found = verify(cut, tmp_path / 'm.onnx', quantized, real=False)
    assert [r.output for r in found] == [HEATMAP, *cut.output_names]
    assert not any(r.fault for r in found)
    assert all(min(r.onnxruntime, r.openvino) > 60 for r in found)
    engines = dict(onnxruntime=ONNXRuntime, openvino=OpenVINO)
    rungs = climb(cut, cut.module, tmp_path / 'm.onnx', engines, quantized, real=False)
    assert not any(r.fault for r in rungs) and rungs[-1].stage == 'FP16'
    assert all(set(r.to_previous) == {HEATMAP, *cut.output_names} for r in rungs[1:])
    assert all(min(r.to_previous.values()) > 60 for r in rungs if r.stage in engines)
    layers = {f'output {n}' for n in (HEATMAP, *cut.output_names)} if quantized else set()
    assert layers <= set(rungs[-2].layers)
    # Without asking the file, queries of other cells are compared.
    monkeypatch.setattr(judge, 'choice_in', lambda *args: None)
    blind = verify(cut, tmp_path / 'm.onnx', quantized, real=False)
    assert min(r.openvino for r in blind) < QUERY_DB


def test_a_right_file_has_no_fault_and_torch_is_as_before(right):
    cut, model, path = right
    before = [x.clone() for x in cut.module(*cut.inputs.values())]
    assert not any(faults(cut, model, path).values())
    assert all(map(torch.equal, before, cut.module(*cut.inputs.values())))
    assert 'propose' not in vars(cut.module.bbox_head)


def test_a_wrong_decoder_is_told_by_its_outputs(right, tmp_path):
    cut, model, _ = right
    wrong = changed(
        model, 'ffn.layers.1.bias', lambda b: b + np.linspace(-0.2, 0.2, len(b), dtype='f4')
    )
    found = faults(cut, wrong, tmp_path / 'm.onnx')
    assert not found[HEATMAP]
    assert found['dim'].startswith('ONNX Runtime: dim agrees with torch to ')


def test_a_wrong_heatmap_is_told(right, tmp_path):
    cut, model, _ = right
    wrong = changed(model, 'heatmap_head.1.bias', lambda b: b * 1.1)
    found = faults(cut, wrong, tmp_path / 'm.onnx')
    assert found[HEATMAP].startswith(f'ONNX Runtime: {HEATMAP} agrees with torch to ')
    engines = dict(onnxruntime=ONNXRuntime)
    rungs = climb(cut, cut.module, tmp_path / 'm.onnx', engines, quantized=False)
    assert [r.stage for r in rungs if r.fault][0] == rungs[-2].stage == 'onnxruntime'
    assert f'dB in output {HEATMAP}' in rungs[-2].fault


@pytest.mark.parametrize('what', ['lowest', 'no suppression', 'unread'])
def test_a_wrong_choice_is_told(right, tmp_path, what):
    cut, model, _ = right
    wrong = onnx.ModelProto()
    wrong.CopyFrom(model)
    nodes = {n.op_type: n for n in wrong.graph.node}
    best = nodes['TopK']
    if what == 'lowest':
        best.attribute.append(onnx.helper.make_attribute('largest', 0))
        for attribute in [a for a in best.attribute if a.name == 'largest'][:-1]:
            best.attribute.remove(attribute)
    elif what == 'no suppression':  # the 3 x 3 window is one cell
        pool = nodes['MaxPool']
        del pool.attribute[:]
        pool.attribute.extend([onnx.helper.make_attribute('kernel_shape', [1, 1])])
        pad = next(n for n in wrong.graph.node if n.op_type == 'Pad')
        place = list(wrong.graph.node).index(pad)
        wrong.graph.node.remove(pad)
        same = onnx.helper.make_node('Identity', [pad.input[0]], [pad.output[0]])
        wrong.graph.node.insert(place, same)
    else:  # what reads the choice gets the first cell only
        first, best.output[1] = best.output[1], 'chosen'
        zeros = onnx.numpy_helper.from_array(np.zeros((1, 10), 'i8'), 'zeros')
        wrong.graph.initializer.append(zeros)
        place = list(wrong.graph.node).index(best) + 1
        wrong.graph.node.insert(place, onnx.helper.make_node('Mul', ['chosen', 'zeros'], [first]))
    found = faults(cut, wrong, tmp_path / 'm.onnx')
    if what == 'unread':
        assert not found.pop(HEATMAP)
        assert all('agrees with torch to' in fault for fault in found.values())
    else:
        text = 'are not the highest peaks of the heatmap'
        assert found and all(text in fault for fault in found.values()), found
        engines = dict(onnxruntime=ONNXRuntime)
        rungs = climb(cut, cut.module, tmp_path / 'm.onnx', engines, quantized=False)
        assert text in rungs[-2].fault


def test_choices_that_cannot_be_are_told(right):
    head = right[0].module.bbox_head
    scores = torch.rand(1, 10, 16, 16)
    best = head.propose(scores)[1]
    assert choice_fault(head, scores, best) == choice_fault(head, scores, best.flip(1)) == ''
    twice, outside = best.clone(), best.clone()
    twice[0, 1], outside[0, 0] = best[0, 0], 10 * 16 * 16
    assert 'one cell is chosen for several queries' in choice_fault(head, scores, twice)
    assert 'outside of the map' in choice_fault(head, scores, outside)
    assert '9 queries are chosen, not 10' in choice_fault(head, scores, best[:, :9])


def test_outputs_that_changed_places_are_named(right, tmp_path):
    cut, model, _ = right
    wrong = onnx.ModelProto()
    wrong.CopyFrom(model)
    for node in wrong.graph.node:
        node.output[:] = [{'rot': 'vel', 'vel': 'rot'}.get(o, o) for o in node.output]
    found = faults(cut, wrong, tmp_path / 'm.onnx')
    assert all('rot and vel are swapped' in found[name] for name in ('rot', 'vel'))
