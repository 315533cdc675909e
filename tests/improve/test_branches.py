"""Branches of BEVFusion's concats: found on its forward, sparse encoder and neck included."""

import copy

import torch

from mmdet3d_quant.calibration.observe import run
from mmdet3d_quant.core.modes import set_mode
from mmdet3d_quant.data.samples import make_frame
from mmdet3d_quant.improve.branches import branches, is_quantized
from mmdet3d_quant.improve.flow import Flow
from mmdet3d_quant.runs import from_config as fc
from tests.small import small_config

NECK = {f'{i}': f'img_neck.fpn_convs.{i}.bn' for i in range(2)}
#: By concat: of each input the layer that gives its size, and what reads it behind.
FOUND = {
    'img_neck.concats.1': [None, None],
    'img_neck.concats.0': [None, (NECK['1'], 'img_neck.lateral_convs.0.conv')],
    'view_transform': [
        ('view_transform.dtransform.7', 'view_transform.depthnet.0'),
        (NECK['0'], 'view_transform.depthnet.0'),
    ],
    'fusion_layer': [
        ('view_transform.downsample.7', 'fusion_layer.0'),
        ('pts_middle_encoder.conv_out.1', 'fusion_layer.0'),
    ],
    'pts_neck': [
        ('pts_neck.deblocks.0.1', 'bbox_head.shared_conv'),
        ('pts_neck.deblocks.1.1', 'bbox_head.shared_conv'),
    ],
}


@torch.no_grad()
def boxes(model, batch):
    """Class logits of the float model on all cells, and its boxes."""
    logits = []
    hook = model.bbox_head.heatmap_head.register_forward_hook(lambda m, i, out: logits.append(out))
    with set_mode(model, 'float'):
        found = model.test_step(copy.deepcopy(batch))[0].pred_instances_3d
    hook.remove()
    return [*logits, found.bboxes_3d.tensor, found.scores_3d]


@torch.no_grad()
def scale(model, part, factor, taken_back=True):
    """Multiplies what a branch's source makes; divides what its readers weigh it with."""
    layers = dict(model.named_modules())
    layers[part.source].weight *= factor
    layers[part.source].bias *= factor
    for reader in part.readers if taken_back else ():
        layers[reader.layer].weight[:, slice(*reader.channels or (None,))] /= factor


def test_every_branch_of_bevfusion_is_traced_to_its_layer(tmp_path):
    cfg = fc.read_config(small_config(make_frame(tmp_path / 'frame'), tmp_path / 'int8.py'))
    model = fc.build_model(cfg)
    _, loader = fc.build_calibration_loader(cfg)
    batch = next(iter(loader))
    seen, traced = [], []
    with set_mode(model, 'float'), torch.no_grad():
        with Flow(model, lambda step, tensors: seen.append(step)) as flow:
            flow.close(run(model, copy.deepcopy(batch)))
    found = {}
    for step in filter(is_quantized, seen):
        parts = branches(flow, step)
        assert all(bool(part.problem) != bool(part.source) for part in parts)
        found[step.label] = [
            None if part.problem else (part.source, *(r.layer for r in part.readers))
            for part in parts
        ]
        traced += [part for part in parts if part.source]
        for part in parts:
            assert 'add' in part.problem or all(r.channels == part.channels for r in part.readers)
    assert found == FOUND
    # Brute force: a power of two in a branch's source is taken back by its readers alone.
    wanted = boxes(model, batch)
    for number, part in enumerate(traced, 2):
        scale(model, part, 2.0**number)
        assert all(map(torch.equal, wanted, boxes(model, batch))), part
    scale(model, traced[-1], 2.0, taken_back=False)
    assert not torch.equal(wanted[0], boxes(model, batch)[0])
