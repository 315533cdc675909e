"""`format`: FP8 by type, by pattern and for a whole detector, and what cannot be mixed."""

import copy

import pytest
import torch
from mmdet3d.registry import MODELS

import mmdet3d_quant as mq
from mmdet3d_quant.core.ties import ties
from mmdet3d_quant.files.checkpoint import CheckpointError
from mmdet3d_quant.models import QuantSECOND
from mmdet3d_quant.runs.weights import load_weights
from tests.qat.toy import QAT, Points, Toy, runner

SECOND = dict(
    type='QuantSECOND', in_channels=4, out_channels=[4, 8], layer_nums=[1, 1], layer_strides=[1, 2]
)
NECK = dict(type='QuantSECONDFPN', in_channels=[4, 8], out_channels=[4, 4], upsample_strides=[1, 2])
RESNET = dict(type='QuantResNet', depth=18, base_channels=4, num_stages=2,
              strides=(1, 2), dilations=(1, 1), out_indices=(0, 1))  # fmt: skip
#: Types of parts and a pattern that names a piece of each by which nothing is tied.
PARTS = [
    (SECOND, 'blocks.0.0'),
    (NECK, 'deblocks.1'),
    (RESNET, 'conv1'),
    (dict(type='QuantConvFuser', in_channels=[4, 4], out_channels=4), '*'),
    (
        dict(type='QuantGeneralizedLSSFPN', in_channels=[4, 8, 8], out_channels=4, num_outs=3,
             start_level=0),
        'fpn_convs.0',
    ),
]  # fmt: skip


def formats(model):
    return {name: q.spec.format.name for name, q in mq.quantizers(model).items()}


@pytest.mark.parametrize('cfg, pattern', PARTS, ids=lambda x: x['type'] if 'type' in x else '')
def test_a_part_takes_a_format_for_all_or_by_pattern(cfg, pattern):
    usual = formats(MODELS.build(dict(cfg)))
    assert set(usual.values()) == {'int8'}
    wholly = MODELS.build(dict(cfg, format='fp8'))
    assert set(formats(wholly).values()) == {'fp8'}
    assert list(wholly.state_dict()) == list(MODELS.build(dict(cfg)).state_dict())
    by_pattern = formats(MODELS.build(dict(cfg, format={pattern: 'fp8'})))
    named = set(mq.core.spec.select(usual, pattern))
    assert named and {name for name, own in by_pattern.items() if own == 'fp8'} == named


def test_a_detector_takes_patterns_of_which_the_last_counts():
    parts = dict(pts_backbone=dict(SECOND, format='fp8'), pts_neck=NECK)
    of = dict(type='Quantized', of='MVXFasterRCNN', **parts)
    with pytest.raises(ValueError, match='pts_neck.deblocks.0.0._input_quantizer is int8'):
        ties(MODELS.build(dict(of)))
    found = formats(MODELS.build(dict(of, format={'*': 'int8', 'pts_*': 'fp8'})))
    assert set(found.values()) == {'fp8'}
    cut = dict(of, format={'pts_*': 'fp8', 'pts_neck.deblocks.1': 'int8'})
    mixed = formats(MODELS.build(cut))
    assert {n for n, own in mixed.items() if own == 'int8'} == {
        f'pts_neck.deblocks.1.0._{what}_quantizer' for what in ('input', 'weight')
    }
    with pytest.raises(ValueError, match="'img_.' matches no quantized layer of MVXFasterRCNN"):
        MODELS.build(dict(of, format={'img_*': 'fp8'}))


def test_any_module_takes_it():
    found = MODELS.build(
        dict(type='Quant', of='SECOND', in_channels=4, out_channels=[4, 8], layer_nums=[1, 1],
             layer_strides=[1, 2], format='fp8')
    )  # fmt: skip
    assert set(formats(found).values()) == {'fp8'}


@pytest.mark.parametrize(
    'given, match',
    [
        ('fp16', "format of '.' must be one of int2, .*int8, fp8, got 'fp16'"),
        (['fp8'], r'format expects a name or \{pattern: name\}'),
        ({'block': 'fp8'}, "'block' matches no quantized layer of QuantSECOND"),
        ({'*._weight_quantizer': 'fp8'}, 'blocks.0.0._input_quantizer is int8 and .* is fp8'),
    ],
)
def test_wrong_formats_are_told(given, match):
    with pytest.raises(ValueError, match=match):
        MODELS.build(dict(SECOND, format=given))


def test_tied_readers_of_two_formats_are_told_with_both_names():
    with pytest.raises(ValueError) as err:
        MODELS.build(dict(RESNET, format={'layer1.0.conv1': 'fp8'}))
    assert 'layer1.0.conv1._input_quantizer is fp8' in str(err.value)
    assert ' is int8, and both read one tensor' in str(err.value)


def test_sparse_convolutions_stay_integers():
    encoder = dict(type='QuantBEVFusionSparseEncoder', in_channels=5, sparse_shape=[16, 16, 41],
                   base_channels=4, output_channels=4, encoder_channels=((4, 4, 4), (4, 4)),
                   encoder_paddings=((0, 0, 1), (0, 0)), block_type='basicblock')  # fmt: skip
    with pytest.raises(ValueError, match='cannot be fp8: libspconv.* has INT8 only. Name its part'):
        MODELS.build(dict(encoder, format='fp8'))
    model = MODELS.build(dict(encoder, format={'*': 'fp8', 'conv_*': 'int8', 'enc*': 'int8'}))
    assert set(formats(model).values()) == {'int8'}


def test_calibration_training_and_loading(tmp_path):
    """A toy through calibration, QAT and strict loading in FP8; as integers it does not load."""
    cfg = dict(type='Quantized', of='Toy', learn_amax=True, format='fp8')
    torch.manual_seed(0)
    model = MODELS.build(dict(cfg))
    images = Points().images
    mq.calibrate(model, [images])
    with pytest.raises(ValueError, match='a._input_quantizer is fp8, .* one step apart'):
        mq.calibrate(copy.deepcopy(model), [images], 'entropy')
    start = tmp_path / 'fp8.pth'
    torch.save(dict(state_dict=model.state_dict(), meta={}), start)
    runner(tmp_path, start, [QAT], model=cfg).train()
    trained = MODELS.build(dict(cfg))
    load_weights(trained, tmp_path / 'epoch_2.pth', calibrated=True)
    assert not torch.equal(trained.a._input_quantizer._amax, model.a._input_quantizer._amax)
    with pytest.raises(CheckpointError, match='ranges of another shape or number format') as err:
        load_weights(Toy(), tmp_path / 'epoch_2.pth', calibrated=True)
    assert 'a._input_quantizer._amax: calibrated for fp8, and this quantizer is int8' in str(
        err.value
    )
    begun = Toy()
    load_weights(begun, tmp_path / 'epoch_2.pth', calibrated=False)
    assert begun.a._input_quantizer.amax is None
    assert torch.equal(begun.a.weight, trained.a.weight)


def test_mixed_parts_calibrate_and_quantize_each_by_its_format():
    torch.manual_seed(0)
    int8, fp8 = QuantSECOND(4, [4, 8], [1, 1], [1, 2]).eval(), None
    fp8 = QuantSECOND(4, [4, 8], [1, 1], [1, 2], format='fp8').eval()
    fp8.load_state_dict({k: v for k, v in int8.state_dict().items() if 'quantizer' not in k}, False)
    x = torch.randn(1, 4, 16, 16)
    with mq.set_mode(int8, 'float'):
        wanted = int8(x)[1]
    errors = []
    for model in (int8, fp8):
        mq.calibrate(model, [x], 'max')
        errors.append(float((model(x)[1] - wanted).square().mean() / wanted.square().mean()))
    assert errors[0] != errors[1] and max(errors) < 0.01


def test_auto_leaves_out_what_is_for_integers():
    torch.manual_seed(0)
    model = QuantSECOND(4, [4, 8], [1, 1], [1, 2], format={'blocks.1.*': 'fp8'}).eval()
    result = mq.calibrate(model, list(torch.randn(4, 1, 4, 16, 16)), 'auto')
    assert all(r.amax > 0 and r.method.startswith('auto: ') for r in result.ranges)


def test_a_calibration_tells_the_format_of_ranges_and_layers():
    torch.manual_seed(0)
    model = QuantSECOND(4, [4, 8], [1, 1], [1, 2], format={'blocks.1.*': 'fp8'}).eval()
    result = mq.calibrate(model, [torch.randn(1, 4, 16, 16)], 'max')
    told = {r.name.partition('._')[0]: r.format for r in result.ranges}
    assert set(told.values()) == {'int8', 'fp8'}
    assert all((own == 'fp8') == name.startswith('blocks.1.') for name, own in told.items())
    assert result.coverage.plain()['formats'] == {'int8': 2, 'fp8': 2}
    assert '(2 int8, 2 fp8)' in result.coverage.summary()
