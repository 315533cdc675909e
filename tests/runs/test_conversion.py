"""mit-han-lab's checkpoints to mmdet3d's and back, against renaming written by hand."""

import copy
import re

import numpy as np
import pytest
import torch
from mmdet3d.registry import MODELS
from mmengine.runner import load_checkpoint
from spconv.pytorch import SparseConvTensor, SubMConv3d

import mmdet3d_quant as mq
from mmdet3d_quant.core.modes import float_state_dict
from mmdet3d_quant.data.samples import make_frame
from mmdet3d_quant.parents import BEVFusionSparseEncoder
from mmdet3d_quant.parents.sparse_layout import LayoutError, accept_any_layout, layout_of
from mmdet3d_quant.runs import from_config as fc
from mmdet3d_quant.runs.conversion import ConversionError, convert, fit, rename
from tests.frame import FLOAT_CONFIG
from tests.runs.mit import same, to_mit_by_hand
from tests.small import small_config

#: mit-han-lab's name -> mmdet3d's, written from the two sources, some of each part.
PAIRS = """
encoders.camera.backbone.conv1.weight img_backbone.conv1.weight
encoders.camera.backbone.layer3.0.downsample.1.running_var img_backbone.layer3.0.downsample.1.running_var
encoders.camera.backbone.stages.0.blocks.0.attn.w_msa.qkv.weight img_backbone.stages.0.blocks.0.attn.w_msa.qkv.weight
encoders.camera.backbone.patch_embed.projection.bias img_backbone.patch_embed.projection.bias
encoders.camera.neck.lateral_convs.0.conv.weight img_neck.lateral_convs.0.conv.weight
encoders.camera.neck.fpn_convs.1.bn.bias img_neck.fpn_convs.1.bn.bias
encoders.camera.vtransform.frustum view_transform.frustum
encoders.camera.vtransform.dtransform.4.weight view_transform.dtransform.4.weight
encoders.camera.vtransform.depthnet.6.bias view_transform.depthnet.6.bias
encoders.camera.vtransform.downsample.7.running_mean view_transform.downsample.7.running_mean
encoders.lidar.backbone.conv_input.0.weight pts_middle_encoder.conv_input.0.weight
encoders.lidar.backbone.encoder_layers.encoder_layer1.0.bn1.weight pts_middle_encoder.encoder_layers.encoder_layer1.0.bn1.weight
encoders.lidar.backbone.conv_out.1.bias pts_middle_encoder.conv_out.1.bias
fuser.0.weight fusion_layer.0.weight
fuser.1.running_mean fusion_layer.1.running_mean
decoder.backbone.blocks.1.15.weight pts_backbone.blocks.1.15.weight
decoder.neck.deblocks.1.0.weight pts_neck.deblocks.1.0.weight
heads.object.shared_conv.bias bbox_head.shared_conv.bias
heads.object.heatmap_head.0.bn.weight bbox_head.heatmap_head.0.bn.weight
heads.object.class_encoding.weight bbox_head.class_encoding.weight
heads.object.decoder.0.self_attn.in_proj_weight bbox_head.decoder.0.self_attn.attn.in_proj_weight
heads.object.decoder.0.multihead_attn.out_proj.bias bbox_head.decoder.0.cross_attn.attn.out_proj.bias
heads.object.decoder.0.linear1.weight bbox_head.decoder.0.ffn.layers.0.0.weight
heads.object.decoder.0.linear2.bias bbox_head.decoder.0.ffn.layers.1.bias
heads.object.decoder.2.norm1.weight bbox_head.decoder.2.norms.0.weight
heads.object.decoder.0.norm2.bias bbox_head.decoder.0.norms.1.bias
heads.object.decoder.0.norm3.weight bbox_head.decoder.0.norms.2.weight
heads.object.decoder.0.cross_posembed.position_embedding_head.3.weight bbox_head.decoder.0.cross_posembed.position_embedding_head.3.weight
heads.object.prediction_heads.0.vel.0.conv.weight bbox_head.prediction_heads.0.vel.0.conv.weight
encoders.camera.backbone.layer1.0.conv1._input_quantizer._amax img_backbone.layer1.0.conv1._input_quantizer._amax
encoders.camera.backbone.layer1.1.residual_quantizer._amax img_backbone.layer1.1.residual_quantizer._amax
encoders.camera.neck.quant_concat0._input_quantizer._amax img_neck.concats.1._input_quantizer._amax
encoders.camera.neck.quant_concat1._input_quantizer._amax img_neck.concats.0._input_quantizer._amax
""".split('\n')  # noqa: E501
PAIRS = [tuple(line.split()) for line in PAIRS if line]


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """The small model with random weights, its mit-layout state dict, a batch, its config."""
    folder = tmp_path_factory.mktemp('small')
    path = small_config(make_frame(folder / 'frame'), folder / 'small.py')
    cfg = fc.read_config(path)
    torch.manual_seed(0)
    model = fc.build_model(cfg)
    for name, value in model.state_dict().items():
        if re.search(r'running_mean|(bn|norm)\w*\.\d*\.?bias|prediction_heads.*bias', name):
            value.normal_(std=0.1)
    batch = next(iter(fc.build_calibration_loader(cfg)[1]))
    return model, to_mit_by_hand(float_state_dict(model)), batch, cfg


def predict(model, batch):
    with torch.no_grad(), mq.set_mode(model, 'float'):
        return model.test_step(copy.deepcopy(batch))[0].pred_instances_3d


def loaded(cfg, state):
    model = fc.build_model(cfg)
    keys = model.load_state_dict(state, strict=False)
    assert not keys.unexpected_keys and all(k.endswith('_amax') for k in keys.missing_keys)
    return model


@pytest.mark.parametrize('theirs,ours', PAIRS)
def test_names(theirs, ours):
    assert rename(theirs, 'mmdet3d') == ours and rename(ours, 'mit') == theirs


def test_every_name_of_the_resnet50_model_has_one_place():
    names = list(fc.build_model(fc.read_config(FLOAT_CONFIG)).state_dict())
    theirs = [rename(name, 'mit') for name in names]
    assert None not in theirs and len(set(theirs)) == len(names) > 500
    assert [rename(name, 'mmdet3d') for name in theirs] == names


def test_a_mit_checkpoint_gives_the_same_boxes(small):
    model, mit, batch, cfg = small
    state, parts = convert(mit, 'mmdet3d')
    assert fit(state, model) == []
    here, there = predict(model, batch), predict(loaded(cfg, state), batch)
    assert len(here) == 20 and torch.equal(here.bboxes_3d.tensor, there.bboxes_3d.tensor)
    assert torch.equal(here.scores_3d, there.scores_3d)
    assert torch.equal(here.labels_3d, there.labels_3d)
    assert sum(part.entries for part in parts.values()) == len(mit)
    convolutions = sum(value.dim() == 5 for value in mit.values())
    assert parts['pts_middle_encoder'].changed == convolutions
    assert parts['bbox_head'].changed == 4 and parts['img_backbone'].changed == 0


def test_both_codings_of_boxes_mean_one_box_in_nuscenes(small):
    """Renamed only, the head tells mit's boxes; each library's last step makes nuScenes' ones."""
    model, mit, batch, cfg = small
    state = dict(convert(mit, 'mmdet3d')[0])
    renamed = {rename(name, 'mmdet3d'): v for name, v in mit.items() if 'prediction_heads' in name}
    theirs = predict(loaded(cfg, {**state, **renamed}), batch).bboxes_3d.tensor.double()
    ours = predict(model, batch).bboxes_3d.tensor.double()
    # mit-han-lab's output_to_nusc_box: sizes as they are, -yaw - pi/2. mmdet3d 1.x: l, w swapped.
    wlh_theirs, yaw_theirs = theirs[:, 3:6], -theirs[:, 6] - np.pi / 2
    wlh_ours, yaw_ours = ours[:, [4, 3, 5]], ours[:, 6]
    assert torch.equal(wlh_theirs, wlh_ours)
    turn = torch.stack([torch.sin(yaw_theirs - yaw_ours), torch.cos(yaw_theirs - yaw_ours)])
    torch.testing.assert_close(turn[0], torch.zeros_like(turn[0]), atol=1e-6, rtol=0)
    assert (turn[1] > 0.99).all() and not torch.allclose(theirs, ours)
    assert torch.equal(theirs[:, [0, 1, 7, 8]], ours[:, [0, 1, 7, 8]])


@torch.no_grad()
def test_spconv1_stores_weights_by_kernel_position_row_by_row():
    """One convolution as mit-han-lab's geometry.h pairs voxels, against spconv 2."""
    torch.manual_seed(0)
    coords = torch.stack([torch.randint(0, n, (60,)) for n in (6, 5, 7)], 1).unique(dim=0)
    feats, weight = torch.randn(len(coords), 4), torch.randn(3, 3, 3, 4, 8)
    wanted = torch.zeros(len(coords), 8)
    for i, place in enumerate(coords):
        for j, source in enumerate(coords):
            x, y, z = (source - place + 1).tolist()
            if 0 <= min(x, y, z) and max(x, y, z) <= 2:
                wanted[i] += feats[j] @ weight.view(27, 4, 8)[x * 9 + y * 3 + z]
    conv = SubMConv3d(4, 8, 3, bias=False)
    accept_any_layout(conv)
    conv.load_state_dict({'weight': weight})
    batched = torch.nn.functional.pad(coords, (1, 0)).int()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # spconv is wrong on a CPU with more
    out = conv(SparseConvTensor(feats, batched, [6, 5, 7], 1)).features
    torch.set_num_threads(threads)
    torch.testing.assert_close(out, wanted)


def test_round_trips_are_exact(small):
    model, mit, _, _ = small
    ours = float_state_dict(model)
    assert same(convert(ours, 'mit')[0], mit)
    assert same(convert(convert(ours, 'mit')[0], 'mmdet3d')[0], ours)
    assert same(convert(convert(mit, 'mmdet3d')[0], 'mit')[0], mit)


def test_a_wrapper_and_spconv2_weights_are_taken_too(small):
    model, mit, _, _ = small
    wrapped = {f'module.{name}': value for name, value in mit.items()}
    assert same(convert(wrapped, 'mmdet3d')[0], float_state_dict(model))
    newer = {n: v.permute(4, 0, 1, 2, 3) if v.dim() == 5 else v for n, v in mit.items()}
    assert same(convert(newer, 'mmdet3d')[0], float_state_dict(model))


def test_any_image_backbone_passes_through(small):
    _, mit, _, _ = small
    small_swin = dict(embed_dims=24, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8])
    swin = MODELS.build(dict(type='mmdet.SwinTransformer', **small_swin)).state_dict()
    other = {n: v for n, v in mit.items() if not n.startswith('encoders.camera.backbone.')}
    state, parts = convert(
        {**other, **{f'encoders.camera.backbone.{n}': v for n, v in swin.items()}}, 'mmdet3d'
    )
    assert all(torch.equal(state[f'img_backbone.{n}'], v) for n, v in swin.items())
    assert parts['img_backbone'].entries == len(swin) > 50


@pytest.mark.parametrize('without', ['encoders.camera.', 'encoders.lidar.'])
def test_one_sensor(small, without):
    model, mit, _, cfg = small
    one = {n: v for n, v in mit.items() if not n.startswith((without, 'fuser.'))}
    state, _ = convert(one, 'mmdet3d')
    assert same(convert(state, 'mit')[0], one)
    absent = dict(fusion_layer=None)
    if 'camera' in without:
        absent.update(img_backbone=None, img_neck=None, view_transform=None)
    else:
        absent.update(pts_voxel_encoder=None, pts_middle_encoder=None)
    cfg = copy.deepcopy(cfg)
    cfg.model.update(absent)
    assert fit(state, fc.build_model(cfg)) == []


def test_ranges_come_along_where_the_model_has_the_quantizer(small):
    model, mit, _, _ = small
    concat = 'encoders.camera.neck.quant_concat0._input_quantizer._amax'
    lidar = 'encoders.lidar.backbone.conv_input.0._weight_quantizer._amax'
    deblock = 'decoder.neck.deblocks.1.0._weight_quantizer._amax'  # theirs is per input channel
    ranges = {
        concat: torch.tensor(3.0),
        lidar: torch.ones(1, 1, 1, 1, 8),
        deblock: torch.ones(32, 1, 1, 1),
    }
    state, _ = convert({**mit, **ranges}, 'mmdet3d')
    assert state['img_neck.concats.1._input_quantizer._amax'] == 3.0
    assert state[rename(lidar, 'mmdet3d')].shape == (8, 1, 1, 1, 1)
    assert fit(state, model) == [rename(lidar, 'mmdet3d'), rename(deblock, 'mmdet3d')]
    assert same(convert(state, 'mit')[0], {**mit, **ranges})


def test_what_has_no_place_is_told_with_its_shape(small):
    _, mit, _, _ = small
    odd = {'heads.object.task_heads.0.reg.weight': torch.zeros(2, 3), 'heads.map.x': torch.zeros(4)}
    with pytest.raises(ConversionError, match=r'2 entries have no place') as err:
        convert({**mit, **odd}, 'mmdet3d')
    assert err.value.entries == {
        'heads.object.task_heads.0.reg.weight': '(2, 3)',
        'heads.map.x': '(4,)',
    }
    with pytest.raises(ConversionError, match='names of mmdet3d already'):
        convert(convert(mit, 'mmdet3d')[0], 'mmdet3d')
    twice = {'encoders.camera.neck.concats.1.x': torch.ones(1)}
    twice['encoders.camera.neck.quant_concat0.x'] = torch.ones(1)
    with pytest.raises(ConversionError, match='share a place'):
        convert({**mit, **twice}, 'mmdet3d')
    folded = {n: v for n, v in mit.items() if not n.startswith('decoder.backbone.blocks.0.1.')}
    with pytest.raises(ConversionError, match='batch norm is folded'):
        convert(folded, 'mmdet3d')


def test_what_the_model_lacks_or_shapes_otherwise_is_told(small):
    model, mit, _, _ = small
    state, _ = convert(mit, 'mmdet3d')
    del state['fusion_layer.0.weight']
    state['img_backbone.conv1.weight'] = torch.zeros(8, 4, 7, 7)
    state['pts_neck.extra'] = torch.zeros(1)
    with pytest.raises(ConversionError, match='3 entries') as err:
        fit(state, model)
    assert err.value.entries == {
        'fusion_layer.0.weight': '(32, 48, 3, 3) is missing',
        'img_backbone.conv1.weight': '(8, 4, 7, 7), expected (8, 3, 7, 7)',
        'pts_neck.extra': '(1,) is not in the model',
    }


def test_unclear_layouts_are_refused():
    assert layout_of([(3, 3, 3, 5, 16), (3, 3, 3, 16, 16), (1, 1, 3, 128, 128)]) == 'spconv1'
    assert layout_of([(16, 3, 3, 3, 5), (128, 1, 1, 3, 128)]) == 'spconv2'
    for shapes in ([(3, 3, 3, 3, 3)], [(3, 3, 3, 16, 16), (16, 3, 3, 3, 16)], [(8, 8, 8, 8, 8)]):
        with pytest.raises(LayoutError, match='shapes found'):
            layout_of(shapes)


ENCODER = dict(
    in_channels=5,
    sparse_shape=[16, 16, 13],
    base_channels=8,
    output_channels=16,
    encoder_channels=((8, 12), (12,)),
    encoder_paddings=((0, 1), (0,)),
    block_type='basicblock',
)


class Detector(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.pts_middle_encoder = BEVFusionSparseEncoder(**ENCODER)
        self.eval()


@pytest.mark.parametrize('version', [None, 1, 2])
@pytest.mark.parametrize('layout', ['spconv1', 'spconv2'])
def test_sparse_weights_of_every_layout_load(layout, version, tmp_path):
    """Through ours and mmengine's loader (that of init_model), whatever the version says."""
    torch.manual_seed(0)
    model = Detector()
    state = model.state_dict()
    metadata = {name: dict(version=version) for name in state._metadata}
    if layout == 'spconv1':
        for name, value in state.items():
            if value.dim() == 5:
                state[name] = value.permute(1, 2, 3, 4, 0).contiguous()
    del state._metadata
    if version is not None:
        state._metadata = metadata
    torch.save(dict(state_dict=state), tmp_path / 'x.pth')

    coords = torch.randint(0, 13, (50, 4)) * torch.tensor([0, 1, 1, 1])
    coords = coords.unique(dim=0)
    feats = torch.randn(len(coords), 5)
    for load in (load_ours, load_mmengine, torch_load_into_a_copy):
        other = load(tmp_path / 'x.pth')
        assert same(model.state_dict(), other.state_dict()), load
        with torch.no_grad():
            out = [m.pts_middle_encoder(feats, coords, 1) for m in (model, other)]
        assert torch.equal(*out) and out[0].abs().sum() > 0


def load_ours(path):
    model = Detector()
    fc.load_weights(model, path, calibrated=False)
    return model


def load_mmengine(path):
    model = Detector()
    load_checkpoint(model, str(path), map_location='cpu', strict=True)
    return model


def torch_load_into_a_copy(path):
    model = copy.deepcopy(Detector())
    model.load_state_dict(torch.load(path)['state_dict'])
    return model


def test_a_weight_that_fits_both_layouts_needs_the_version():
    conv = SubMConv3d(3, 3, 3, bias=False)
    accept_any_layout(conv)
    conv.load_state_dict(conv.state_dict())
    with pytest.raises(RuntimeError, match='fits both layouts'):
        conv.load_state_dict(dict(conv.state_dict()))
