"""A detector whose exported files run in an engine finds what the torch model finds."""

import numpy as np
import onnx
import pytest
import torch
from mmdet3d.structures import LiDARInstance3DBoxes
from mmengine.dataset import pseudo_collate

from mmdet3d_quant import calibrate, set_mode
from mmdet3d_quant.check.detector import EnginePart, _Head, as_exported, engine_detector
from mmdet3d_quant.check.verify import align, run_torch, sqnr
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.data.evaluation import predict
from mmdet3d_quant.data.samples import make_frame
from mmdet3d_quant.engines import ONNXRuntime, OpenVINO
from mmdet3d_quant.export import Cut, ExportError, capture_inputs, export_onnx, export_suite
from mmdet3d_quant.export.cuts import Head
from mmdet3d_quant.export.unsigned import UnsignedQuantizer
from mmdet3d_quant.runs import from_config as fc
from tests.small import ROOT, small_config

TINY = 'bevfusion_tiny_lidar-cam_synthetic'
OUTPUTS = ('score', 'rot', 'dim', 'reg', 'height', 'vel')


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    """Calibrated detector, its float and INT8 files, and a batch of two different frames."""
    folder = tmp_path_factory.mktemp('small')
    samples = []
    for seed in (0, 1):
        frame = make_frame(folder / f'frame{seed}', seed)
        cfg = fc.read_config(small_config(frame, folder / f'small{seed}.py'))
        if seed == 0:
            torch.manual_seed(0)
            model = fc.build_model(cfg)
        samples.append(fc.build_calibration_loader(cfg)[1].dataset[0])
    one, two = pseudo_collate(samples[:1]), pseudo_collate(samples)
    calibrate(model, [one, pseudo_collate(samples[1:])])
    inputs = capture_inputs(model, one)
    for name, target in (('float', 'tensorrt'), ('int8', 'tensorrt'), ('openvino', 'openvino')):
        out = folder / name
        export_suite(model, inputs, out, {}, name != 'float', tell=lambda name: None, target=target)
    return model, folder, two


def found(model, batch):
    """Per sample rows of label, score and box, by label and score."""
    rows = []
    for sample in predict(model, [batch]):
        p = sample['pred_instances_3d']
        table = torch.cat([p.labels_3d[:, None], p.scores_3d[:, None], p.bboxes_3d.tensor], 1)
        rows.append(np.array(sorted(table.tolist())))
    return rows


def neck_output(model, batch):
    """What enters the head, (B, C, X, Y)."""
    seen = []
    hook = model.bbox_head.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    predict(model, [batch])
    hook.remove()
    return seen[0] if isinstance(seen[0], torch.Tensor) else seen[0][0]


def engines(model, folder, *engine):
    """The detector with files up to the head. Its weights are random and its peaks nearly equal:
    the last bit of the map decides which of them the head looks at."""
    made = engine_detector(model, folder, *engine)
    made.bbox_head = model.bbox_head
    return made


@pytest.mark.parametrize('engine', [None, ONNXRuntime])
def test_float_files_give_the_boxes_of_the_float_model(work, engine):
    model, folder, batch = work
    made = engines(model, folder / 'float', *([engine] if engine else []))
    with set_mode(model, 'float'):  # the head of both, which no file replaces
        expected = found(model, batch)
        result = found(made, batch)
    assert len(expected) == 2 and not np.array_equal(*expected)
    for there, here in strict_zip(expected, result):
        assert len(there) > 0
        np.testing.assert_allclose(here, there, rtol=1e-3, atol=1e-3)


def test_int8_files_are_closer_to_fake_quant_than_that_is_to_float(work):
    """Through two files in a row; float ones would be 0 dB closer, a wrong scale less."""
    model, folder, batch = work
    quantized = neck_output(model, batch)
    with set_mode(model, 'float'):
        cost = sqnr(neck_output(model, batch), quantized)
    made = neck_output(engines(model, folder / 'int8'), batch)
    assert cost < 60
    assert sqnr(quantized, made) > cost + 1


def test_unsigned_files_stand_for_the_unsigned_model(work):
    model, folder, batch = work
    unsigned = as_exported(model, folder / 'openvino')
    assert any(isinstance(q, UnsignedQuantizer) for q in unsigned.modules())
    assert not any(isinstance(q, UnsignedQuantizer) for q in model.modules())
    made = neck_output(engines(model, folder / 'openvino', ONNXRuntime), batch)
    closeness = sqnr(neck_output(unsigned, batch), made)
    assert closeness > sqnr(neck_output(model, batch), made) + 3
    assert as_exported(model, folder / 'int8') is model


def test_the_layers_in_the_files_are_gone_and_the_detector_is_unchanged(work):
    model, folder, batch = work
    before = found(model, batch)
    made = engine_detector(model, folder / 'int8')
    names = {n.split('.')[0] for n, _ in made.named_parameters()}
    gone = {'img_backbone', 'img_neck', 'fusion_layer', 'pts_backbone', 'pts_neck'}
    assert not names & gone and isinstance(made.bbox_head.part, EnginePart)
    assert type(made) is type(model) and model.img_neck is not None
    assert all(np.array_equal(a, b) for a, b in strict_zip(before, found(model, batch)))


@pytest.mark.parametrize('engine', [OpenVINO, ONNXRuntime])
def test_a_trained_head_in_an_engine_finds_the_same_boxes(engine, tmp_path):
    model = fc.build_model(fc.read_config(ROOT / f'configs/bevfusion_tiny/{TINY}.py'))
    fc.load_weights(model, ROOT / f'checkpoints/{TINY}.pth', calibrated=False)
    model.eval()
    torch.manual_seed(0)
    maps = torch.randn(2, 96, 72, 72).relu()
    cut = Cut('head.bbox', Head(model), dict(middle=maps[:1]), OUTPUTS)
    export_onnx(cut.module, [maps[:1]], tmp_path / 'head.onnx', ['middle'], OUTPUTS)
    nodes = [n.op_type for n in onnx.load(tmp_path / 'head.onnx').graph.node]
    assert nodes.count('TopK') == 1 and nodes.count('LayerNormalization') == 3
    head = _Head(model.bbox_head, EnginePart(engine(tmp_path / 'head.onnx')), cut.module.coding)
    metas = [dict(box_type_3d=LiDARInstance3DBoxes)] * 2
    with torch.no_grad():
        expected = model.bbox_head.predict([maps], metas)
    for there, here in strict_zip(expected, head.predict([maps], metas)):
        assert len(there) == len(here) > 50
        assert torch.allclose(there.scores_3d, here.scores_3d, rtol=1e-3, atol=1e-5)
        assert torch.equal(there.labels_3d, here.labels_3d)
        boxes = there.bboxes_3d.tensor, here.bboxes_3d.tensor
        assert torch.allclose(*boxes, rtol=1e-3, atol=1e-3)
    # Queries in another order are the same queries.
    arrays = run_torch(cut, 'float')
    turned = {name: value[..., ::-1] for name, value in arrays.items()}
    assert all(np.array_equal(v, arrays[n]) for n, v in align(arrays, turned).items())


def test_a_missing_file_is_an_error(work, tmp_path):
    with pytest.raises(ExportError, match='camera.backbone.onnx does not exist.*export_onnx'):
        engine_detector(work[0], tmp_path)


def test_samples_of_a_batch_keep_their_order():
    part = EnginePart(lambda inputs: {'y': np.repeat(inputs['x'], 2, 0)})
    x = torch.arange(3.0)[:, None]
    assert part(x=x)['y'][:, 0].tolist() == [0, 0, 1, 1, 2, 2]
