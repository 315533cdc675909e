"""`type='QuantTransFusionHead'`: float parity, its map in INT8, its queries on request."""

import copy
import pickle

import pytest
import torch
from mmdet3d.registry import MODELS
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import nn

import mmdet3d_quant.bevfusion  # noqa: F401 - registers the float head
from mmdet3d_quant import UncalibratedError, calibrate, quantizers, set_mode, ties
from mmdet3d_quant.core.coverage import coverage
from mmdet3d_quant.core.macs import counting
from mmdet3d_quant.export import detector_cuts, generate_inputs
from mmdet3d_quant.jobs.child_configs import quantize_config
from mmdet3d_quant.runs import from_config as fc
from tests.small import ROOT

TINY = ROOT / 'configs/bevfusion_tiny/bevfusion_tiny_lidar-cam_synthetic.py'
ON_MAP = ['shared_conv', 'heatmap_head.0.conv']


def config(**changes):
    """A small head with two decoder layers."""
    cfg = Config.fromfile(TINY).model.bbox_head.to_dict()
    cfg['test_cfg'].update(grid_size=[64, 64, 33])
    cfg.update(in_channels=12, num_proposals=10, num_decoder_layers=2, train_cfg=None)
    return dict(cfg, **changes)


def heads(**changes):
    """The float head and the quantized one with the same weights, in eval mode."""
    torch.manual_seed(0)
    plain = MODELS.build(config())
    head = MODELS.build(config(type='QuantTransFusionHead', **changes))
    keys = head.load_state_dict(plain.state_dict(), strict=False)
    assert not keys.unexpected_keys and all(k.endswith('._amax') for k in keys.missing_keys)
    return plain.eval(), head.eval()


def bev():
    return torch.randn(2, 12, 16, 16, generator=torch.Generator().manual_seed(1)).relu()


@pytest.mark.parametrize('decoder', [False, True])
def test_float_mode_is_the_float_head_to_the_bit_with_its_keys(decoder):
    plain, head = heads(decoder=decoder)
    assert isinstance(head, type(plain))
    keys = [k for k in head.state_dict() if not k.endswith('._amax')]
    assert keys == list(plain.state_dict())
    with torch.no_grad(), set_mode(head, 'float'):
        (wanted,), (found,) = plain(bev())[0], head(bev())[0]
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[k], found[k]) for k in wanted)


def test_the_map_is_quantized_and_coverage_says_why_the_queries_are_not():
    _, head = heads()
    with torch.no_grad(), set_mode(head, 'float'), counting(head) as counted:
        head(bev())
    found = coverage(head, counted.macs)
    assert [layer.name for layer in found.quantized] == ON_MAP
    last, queries = (line.partition('): ')[2] for line in found.lines())
    assert last.startswith('its scores rank') and queries.startswith('it works on queries')
    assert coverage(heads(scores=True)[1]).layers[2].reason is None
    assert all(layer.meant for layer in found.layers if layer.name not in ON_MAP)


def test_the_map_rounds_and_float_parts_stay():
    plain, head = heads()
    calibrate(head, [(bev(),)], 'max')
    seen = {}
    hooks = [
        head.prediction_heads[0].register_forward_pre_hook(lambda m, args: seen.update(q=args[0]))
    ]
    with torch.no_grad():
        (wanted,), (found,) = plain(bev())[0], head(bev())[0]
        error = (wanted['dense_heatmap'] - found['dense_heatmap']).norm()
        assert 0 < error / wanted['dense_heatmap'].norm() < 0.1
        branch = plain.prediction_heads[0](seen['q'])  # of equal queries
        again = head.prediction_heads[0](seen['q'])
    assert all(torch.equal(branch[k], again[k]) for k in branch)
    for hook in hooks:
        hook.remove()


def test_the_decoder_on_request_but_for_attention():
    _, head = heads(decoder=True, scores=True)
    left = {layer.name: layer.reason for layer in coverage(head).layers if layer.reason}
    names = [f'decoder.{i}.{a}_attn.attn.out_proj' for i in (0, 1) for a in ('self', 'cross')]
    assert left == dict.fromkeys(names, 'attention reads its weight without calling it')
    calibrate(head, [(bev(),)], 'max')
    with torch.no_grad():
        assert all(torch.isfinite(v).all() for v in head(bev())[0][0].values())


def test_layers_that_read_one_tensor_share_a_scale():
    """Independent of the declarations: runs the head and compares the tensors read."""
    _, head = heads(decoder=True)
    readers, alive = {}, []

    def note(name):
        def hook(module, args):
            alive.append(args[0])
            readers.setdefault(id(args[0]), []).append(name)

        return hook

    for name, q in quantizers(head).items():
        if not name.endswith('_weight_quantizer'):
            q.register_forward_pre_hook(note(name))
    with torch.no_grad(), set_mode(head, 'float'):
        head(bev())
    shared = {tuple(sorted(names)) for names in readers.values() if len(names) > 1}
    assert len(shared) == 2  # the queries behind each decoder layer
    assert {tuple(sorted(group)) for group in ties(head)} == shared


def test_a_neck_that_hands_on_what_it_reads_is_tied_to_the_head():
    class Neck(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = MODELS.build(dict(type='QuantSECOND', in_channels=2, out_channels=[2],
                                          layer_nums=[0], layer_strides=[1]))  # fmt: skip

        def output_readers(self):
            return [['conv.blocks.0.0._input_quantizer']]

    model = nn.Module()
    model.pts_neck, model.bbox_head = Neck(), heads()[1]
    assert ties(model) == [
        ('pts_neck.conv.blocks.0.0._input_quantizer', 'bbox_head.shared_conv._input_quantizer')
    ]


def test_settings_reach_it():
    _, head = heads(skip={'heatmap_head.1': 'measured'}, scores=True, learn_amax=True)
    assert head.heatmap_head[1]._input_quantizer.float_reason == 'measured'
    assert head.shared_conv._input_quantizer.learned
    with pytest.raises(ValueError, match="'heat' matches no quantized layer"):
        heads(skip='heat')
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert ties(other) == ties(head) and other.input_readers() == head.input_readers()


def test_a_detector_that_quant_builds_has_it():
    cfg = Config.fromfile(TINY).model.to_dict()
    cfg.update(img_backbone=None, img_neck=None, view_transform=None, fusion_layer=None)
    cfg['pts_backbone'].update(in_channels=96)
    with DefaultScope.overwrite_default_scope('mmdet3d'):
        model = MODELS.build(dict(cfg, type='Quant', of='BEVFusion'))
    on = [k.name for k in coverage(model).quantized if k.name.startswith('bbox_head')]
    assert on == [f'bbox_head.{name}' for name in ON_MAP]


@pytest.fixture(scope='module')
def detector():
    return fc.build_model(fc.read_config(TINY.with_name(TINY.name.replace('_syn', '_int8_syn'))))


def test_a_checkpoint_that_had_it_float_is_told_with_the_config_that_fits(detector, tmp_path):
    for quantizer in quantizers(detector).values():
        quantizer.amax = torch.ones_like(quantizer._amax)
    later = ('bbox_head.', 'pts_neck.')
    state = {
        k: v for k, v in detector.state_dict().items()
        if not (k.startswith(later) and k.endswith('._amax'))
    }  # fmt: skip
    torch.save(dict(state_dict=state), tmp_path / 'old.pth')
    cfg = fc.read_config(TINY.with_name(TINY.name.replace('_syn', '_int8_syn')))
    with pytest.raises(UncalibratedError, match='Other quantizers have ranges') as err:
        fc.load_weights(fc.build_model(cfg), tmp_path / 'old.pth', calibrated=True)
    text = str(err.value)
    assert "skip={'pts_neck': 'why', 'bbox_head': 'why'}" in text
    kept = dict.fromkeys(('pts_neck', 'bbox_head'), 'as it was')
    cfg.model.update(type='Quantized', of='BEVFusion', skip=kept)
    fc.load_weights(fc.build_model(cfg), tmp_path / 'old.pth', calibrated=True)


def test_quantize_config_writes_it(tmp_path, detector):
    written = quantize_config(TINY, tmp_path / 'int8.py')
    made = Config.fromfile(written.int8).model
    assert made.type == 'BEVFusion' and made.bbox_head.type == 'QuantTransFusionHead'
    model = fc.build_model(fc.read_config(written.int8))
    with torch.no_grad(), set_mode(model, 'float'), counting(model) as counted:
        for cut in detector_cuts(model, generate_inputs(model, 1)):
            cut.module(*cut.inputs.values())
    assert coverage(model, counted.macs).share > 0.95
    ours, found = ({k.name for k in coverage(m).quantized} for m in (detector, model))
    more = ('pts_middle_encoder', 'view_transform.downsample')
    assert ours == {name for name in found if not name.startswith(more)}


@pytest.mark.parametrize('decoder', [False, True])
def test_it_takes_a_number_format_as_the_other_types(decoder):
    usual = quantizers(MODELS.build(config(type='QuantTransFusionHead', decoder=decoder)))
    head = MODELS.build(config(type='QuantTransFusionHead', decoder=decoder, format='fp8'))
    found = quantizers(head)
    assert list(found) == list(usual)
    assert {q.spec.format.name for q in found.values() if q.float_reason is None} == {'fp8'}
    assert {q.spec.format.name for q in usual.values() if q.float_reason is None} == {'int8'}
