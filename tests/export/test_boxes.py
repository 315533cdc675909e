"""Boxes coded otherwise than CUDA-BEVFusion's: one record, and every part of the way follows."""

import copy
import json

import numpy as np
import onnx
import pytest
import torch
from mmdet3d.structures import LiDARInstance3DBoxes
from shapely.geometry import Polygon
from torch import nn

from mmdet3d_quant import set_mode
from mmdet3d_quant.check.detector import engine_detector
from mmdet3d_quant.check.verify import align, run_torch, verify
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.engines import ONNXRuntime
from mmdet3d_quant.export import bevfusion_cuts, export_suite
from mmdet3d_quant.export.boxes import BOXES_KEY, CUDA_BEVFUSION, MMDET3D, BoxCoding
from mmdet3d_quant.export.targets import TARGETS, Target, coding_in, coding_of, target_of
from mmdet3d_quant.runs import from_config as fc
from tests.small import ROOT

TINY = 'bevfusion_tiny_lidar-cam_synthetic'
METAS = [dict(box_type_3d=LiDARInstance3DBoxes)]


def joined(found):
    """All of a box in one tensor, width before length."""
    parts = [found['center'], found['height'], found['dim'][:, [1, 0, 2]], found['rot']]
    return dict(boxes=torch.cat([*parts, found['vel']], 1), scores=found['score'])


def parted(outputs):
    b = outputs['boxes']
    dim, rot, vel = b[:, [4, 3, 5]], b[:, 6:8], b[:, 8:]
    parts = dict(center=b[:, :2], height=b[:, 2:3], dim=dim, rot=rot, vel=vel)
    return dict(parts, score=outputs['scores'])


OTHER = BoxCoding('other', 'all in one', ('boxes', 'scores'), (), joined, parted)


class OnlyHead(nn.Module):
    """What export looks at, of a detector: its trained head."""

    def __init__(self):
        super().__init__()
        model = fc.build_model(fc.read_config(ROOT / f'configs/bevfusion_tiny/{TINY}.py'))
        fc.load_weights(model, ROOT / f'checkpoints/{TINY}.pth', calibrated=False)
        self.bbox_head = model.eval().bbox_head


@pytest.fixture
def target(monkeypatch):
    monkeypatch.setitem(TARGETS, 'other', Target('other', boxes=OTHER))
    return 'other'


def test_another_coding_gives_the_same_boxes(target, tmp_path):
    torch.manual_seed(0)
    model, maps = OnlyHead().eval(), torch.randn(1, 96, 72, 72).relu()
    (cut,), manifest = export_suite(
        model, dict(middle=maps), tmp_path, {}, False, tell=lambda name: None, target=target
    )
    file = tmp_path / 'head.bbox.onnx'
    assert [o.name for o in onnx.load(file).graph.output] == ['boxes', 'scores']
    assert list(manifest['files'][file.name]['outputs']) == ['boxes', 'scores']
    with set_mode(model, 'float'), torch.no_grad():
        (there,) = model.bbox_head.predict([maps], METAS)
    (here,) = engine_detector(model, tmp_path, ONNXRuntime).bbox_head.predict([maps], METAS)
    assert len(there) == len(here) > 50 and torch.equal(there.labels_3d, here.labels_3d)
    assert torch.allclose(there.bboxes_3d.tensor, here.bboxes_3d.tensor, rtol=1e-3, atol=1e-3)
    assert all(found.onnxruntime > 60 for found in verify(cut, file, quantized=False))

    arrays = run_torch(cut, 'float')
    turned = {name: value[..., ::-1] for name, value in arrays.items()}
    assert all(np.array_equal(v, arrays[n]) for n, v in align(arrays, turned).items())
    (own,) = bevfusion_cuts(model, dict(middle=maps))  # the same boxes by CUDA-BEVFusion's names
    plain = run_torch(own, 'float')
    for name, at in (('reg', slice(2)), ('rot', slice(6, 8)), ('vel', slice(8, 10))):
        turned = -plain[name][:, [1, 0]] if name == 'rot' else plain[name]
        assert np.array_equal(arrays['boxes'][:, at], turned)
    assert np.array_equal(arrays['boxes'][:, 3:6], plain['dim'])


def nvidia_corners(outputs, head):
    """Corners on the ground, as CUDA-BEVFusion's decoder has them: its own formulas.

    Width comes before length, and the angle is that of atan2(rot[0], rot[1]).
    """
    coder = head.bbox_coder
    x, y = (
        outputs['reg'][0, i] * coder.out_size_factor * coder.voxel_size[i] + coder.pc_range[i]
        for i in (0, 1)
    )
    width, length = np.exp(outputs['dim'][0, :2])
    angle = np.arctan2(*outputs['rot'][0, :2])
    sine, cosine = np.sin(angle), np.cos(angle)
    corners = []
    for a, b in ((-1, -1), (-1, 1), (1, 1), (1, -1)):
        sx, sy = a * width / 2, b * length / 2
        corners.append((x + sx * cosine + sy * sine, y - sx * sine + sy * cosine))
    return np.transpose(corners, (2, 0, 1))


def as_mit_trains(model, maps):
    """The same head in mit-han-lab's layout: rows of the last layers of dim and rot differ."""
    model = copy.deepcopy(model)
    for name, value in model.bbox_head.named_parameters():
        if '.dim.1.' in name:
            value.data = value.data[[1, 0, 2]]
        if '.rot.1.' in name:
            value.data = -value.data[[1, 0]]
    (cut,) = bevfusion_cuts(model, dict(middle=maps), 'openvino')
    return cut


def relative(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize('target', ['tensorrt', 'openvino'])
def test_cuda_bevfusion_reads_the_boxes_right(target, tmp_path):
    torch.manual_seed(0)
    model, maps = OnlyHead().eval(), torch.randn(1, 96, 72, 72).relu()
    export_suite(
        model, dict(middle=maps), tmp_path, {}, False, tell=lambda name: None, target=target
    )
    outputs = ONNXRuntime(tmp_path / 'head.bbox.onnx')(dict(middle=maps.numpy()))
    with set_mode(model, 'float'), torch.no_grad():
        scored = model.bbox_head.scored(model.bbox_head.forward_single(maps)[0])
    dim, rot, center = (scored[n][0].numpy() for n in ('dim', 'rot', 'center'))
    coder = model.bbox_head.bbox_coder
    place = [
        center[i] * coder.out_size_factor * coder.voxel_size[i] + coder.pc_range[i] for i in (0, 1)
    ]
    sizes, yaw = np.exp(dim), np.arctan2(rot[0], rot[1])
    zeros = np.zeros_like(yaw)
    boxes = torch.tensor(np.stack([*place, zeros, *sizes, yaw], 1))
    wanted = LiDARInstance3DBoxes(boxes).corners[:, [0, 3, 7, 4], :2].numpy()
    shapes = [
        [Polygon(c) for c in found] for found in (nvidia_corners(outputs, model.bbox_head), wanted)
    ]
    overlap = [a.intersection(b).area / a.union(b).area for a, b in strict_zip(*shapes)]
    if target == 'tensorrt':
        assert min(overlap) > 0.999
        theirs = run_torch(as_mit_trains(model, maps), 'float')  # needs no change of coding
        assert all(relative(outputs[n], theirs[n]) < 1e-4 for n in outputs)
    else:  # mmdet3d's own coding, which that decoder would misread
        assert np.mean(overlap) < 0.9
    manifest = json.loads((tmp_path / 'manifest.json').read_text())
    wanted = target_of(target).boxes
    assert manifest['files']['head.bbox.onnx']['boxes'] == dict(
        coding=wanted.name, text=wanted.text
    )
    assert f'`{wanted.name}`' in (tmp_path / 'README.md').read_text()


def test_a_file_of_before_is_read_as_it_was_written():
    model = onnx.ModelProto()
    assert coding_in(model) is MMDET3D
    onnx.helper.set_model_props(model, {BOXES_KEY: 'nobody'})
    with pytest.raises(ValueError, match="no coding of boxes 'nobody'; there are mmdet3d, cuda-"):
        coding_in(model)


@pytest.mark.parametrize('velocity', [True, False])
def test_names_come_in_the_order_of_the_record_and_decoding_undoes_encoding(velocity):
    names = ['height', 'score', 'dim', 'center', 'rot'] + ['vel'] * velocity
    values = {name: np.random.rand(1, 3, 4)[:, : 2 if name == 'rot' else 3] for name in names}
    coded = CUDA_BEVFUSION.encode(values)
    wanted = ('score', 'rot', 'dim', 'reg', 'height', 'vel')[: 6 if velocity else 5]
    assert CUDA_BEVFUSION.names(velocity) == wanted and set(coded) == set(wanted)
    assert coded['reg'] is values['center']
    back = CUDA_BEVFUSION.decode(coded)
    assert back.keys() == values.keys() and all(np.array_equal(back[n], values[n]) for n in names)
    assert coding_of(wanted) is CUDA_BEVFUSION and coding_of(['middle']) is None
    for place, name in strict_zip(CUDA_BEVFUSION.places(runs(3)), 'abc'):
        assert place.tolist() == [ord(name), 0, *(1e3 * (i == ord(name) % 3) for i in range(3))]


def runs(count):
    """Queries a, b, ... at x = their letter, of the class that is its rest."""
    letters = np.arange(ord('a'), ord('a') + count)
    score = np.where(np.arange(count)[:, None] == letters % count, 0.3, 0)
    return dict(score=score[None], reg=np.stack([letters, 0 * letters])[None])
