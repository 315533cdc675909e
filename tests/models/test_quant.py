"""`type='Quant'`: any float module, against itself in float, types written by hand, brute force."""

import copy
import pickle

import pytest
import torch
from mmdet3d.registry import MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

import mmdet3d_quant.bevfusion  # noqa: F401 - registers the float neck
from mmdet3d_quant import calibrate, quantizers, set_mode, ties
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.copies import tensors
from mmdet3d_quant.core.coverage import coverage
from mmdet3d_quant.core.fake_quant import fake_quantize
from tests.models.zoo import SWIN, ZOO, image

#: Types written by hand, by what `Quant` builds from; their names of joins.
NAMED = {
    'ResNet-18': ('QuantResNet', {'quant_joins.add0': 'residual_quantizer'}),
    'ResNet-50': ('QuantResNet', {'quant_joins.add0': 'residual_quantizer'}),
    'SECOND': ('QuantSECOND', {}),
    'SECONDFPN': ('QuantSECONDFPN', {}),
    'LSSFPN': (
        'QuantGeneralizedLSSFPN',
        {f'quant_joins.cat{1 - i}': f'concats.{i}._input_quantizer' for i in range(2)},
    ),
}


def quant(name, **more):
    cfg = ZOO[name][0]
    return MODELS.build(dict(cfg, type='Quant', of=cfg['type'], **more))


def both(name, **more):
    """The float module and the quantized one, with the same weights."""
    torch.manual_seed(0)
    floating = MODELS.build(dict(ZOO[name][0]))
    torch.manual_seed(0)
    quantized = quant(name, **more)
    for module in floating.modules():
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
    quantized.load_state_dict(floating.state_dict(), strict=False)
    floating.eval()
    quantized.eval()
    return floating, quantized


def calibrated(name, **more):
    quantized = both(name, **more)[1]
    calibrate(quantized, [[ZOO[name][1]]], 'max')
    return quantized


def equal(a, b):
    return all(torch.equal(x, y) for x, y in strict_zip(tensors(a), tensors(b)))


@pytest.mark.parametrize('name', ZOO)
def test_float_mode_equals_the_float_module_bit_for_bit(name):
    floating, quantized = both(name)
    x = ZOO[name][1]
    with set_mode(quantized, 'float'), torch.no_grad():
        assert equal(floating(x), quantized(x))
        floating.train()
        quantized.train()
        for model in (floating, quantized):
            torch.manual_seed(0)  # of drop path
            model.result = model(x)
        assert equal(floating.result, quantized.result)
    assert isinstance(quantized, type(floating))


@pytest.mark.parametrize('name', ZOO)
def test_building_leaves_weights_keys_and_random_numbers_as_they_are(name):
    torch.manual_seed(0)
    floating = MODELS.build(dict(ZOO[name][0]))
    after = torch.rand(1)
    torch.manual_seed(0)
    quantized = quant(name)
    assert torch.equal(torch.rand(1), after)
    state = quantized.state_dict()
    assert [k for k in state if not k.endswith('._amax')] == list(floating.state_dict())
    assert all(torch.equal(v, state[k]) for k, v in floating.state_dict().items())
    trained = {n for n, p in floating.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in quantized.named_parameters() if p.requires_grad}
    flags = {n: m.training for n, m in floating.named_modules()}
    assert flags == {n: m.training for n, m in quantized.named_modules() if n in flags}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in quantized.modules())


@pytest.mark.parametrize('name', ZOO)
def test_every_layer_and_the_known_number_of_adds_and_concats_are_quantized(name):
    quantized = quant(name)
    assert not coverage(quantized).float_groups()
    joins = [n.rpartition('.')[2][:3] for n in quantizers(quantized) if 'quant_joins' in n]
    assert (joins.count('add'), joins.count('cat')) == ZOO[name][2:]


class _Adds(TorchFunctionMode):
    """Counts, of adds of two maps, those with a summand on the grid of a quantizer."""

    def __init__(self, model):
        super().__init__()
        own = [q for n, q in quantizers(model).items() if 'quant_joins.add' in n]
        self.grids = {(float(q.amax), q.spec) for q in own}
        self.rounded = self.bare = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        names = ('add', 'add_', '__add__', '__iadd__', '__radd__')
        if getattr(func, '__name__', '') in names and len(args) > 1:
            a, b = args[:2]
            if isinstance(b, torch.Tensor) and a.shape == b.shape and a.dim() == 4:
                on_grid = any(self.on_grid(x) for x in (a, b))
                self.rounded, self.bare = self.rounded + on_grid, self.bare + (not on_grid)
        return func(*args, **(kwargs or {}))

    def on_grid(self, x):
        return any(
            torch.equal(fake_quantize(x, torch.tensor(amax), spec), x) for amax, spec in self.grids
        )


@pytest.mark.parametrize('name', [n for n in ZOO if ZOO[n][2]])
def test_every_add_gets_a_rounded_summand(name):
    """Seen from below, where the functions arrive after the rounding."""
    model = calibrated(name)
    with torch.no_grad(), _Adds(model) as seen:
        model(ZOO[name][1])
    assert (seen.rounded, seen.bare) == (ZOO[name][2], 0)


@pytest.mark.parametrize('name', ZOO)
def test_no_tensor_is_read_with_two_scales(name):
    model = calibrated(name)
    scales, kept = {}, []

    def note(quantizer, args):
        kept.append(args[0])  # or an id is given twice
        key = id(args[0]), args[0]._version
        scales.setdefault(key, set()).add(float(quantizer.amax))

    for n, q in quantizers(model).items():
        if not n.endswith('_weight_quantizer'):
            q.register_forward_pre_hook(note)
    with set_mode(model, 'float'), torch.no_grad():
        model(ZOO[name][1])
    assert scales and all(len(found) == 1 for found in scales.values())


def renamed(text, table):
    for old, new in table.items():
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize('name', NAMED)
def test_groups_and_numbers_are_those_of_the_type_written_by_hand(name):
    """The same quantizers, the same groups, the same outputs to the bit with the same ranges."""
    kind, table = NAMED[name]
    general = calibrated(name)
    named = MODELS.build(dict(ZOO[name][0], type=kind))
    named.eval()
    state = {renamed(k, table): v for k, v in general.state_dict().items()}
    named.load_state_dict(state)
    groups = {frozenset(renamed(n, table) for n in group) for group in ties(general)}
    assert groups == set(map(frozenset, ties(named)))
    x = ZOO[name][1]
    with torch.no_grad():
        assert equal(general(x), named(x))


@pytest.mark.parametrize('name', ['ResNet-18', 'LSSFPN'])
def test_gradients_are_those_of_the_type_written_by_hand(name):
    kind, table = NAMED[name]
    general = calibrated(name)
    named = MODELS.build(dict(ZOO[name][0], type=kind))
    named.eval()
    named.load_state_dict({renamed(k, table): v for k, v in general.state_dict().items()})
    for model in (general, named):
        sum(y.square().mean() for y in tensors(model(ZOO[name][1]))).backward()
    wanted = {n: p.grad for n, p in named.named_parameters()}
    for n, p in general.named_parameters():
        assert torch.allclose(p.grad, wanted[n], rtol=1e-4, atol=1e-7), n


def whole_detector_parts():
    backbone = dict(ZOO['ResNet-18'][0], type='Quant', of='mmdet.ResNet', out_indices=(1, 2, 3))
    neck = dict(ZOO['FPN'][0], type='Quant', of='mmdet.FPN', in_channels=[16, 32, 64])
    model = nn.Module()
    model.backbone, model.neck = MODELS.build(backbone), MODELS.build(neck)
    return model


def test_parts_are_tied_to_each_other_through_what_they_read():
    groups = [g for g in ties(whole_detector_parts()) if any(n.startswith('neck') for n in g)]
    across = [set(g) for g in groups if any(n.startswith('backbone') for n in g)]
    assert across == [
        {
            f'backbone.layer{i + 3}.0.{n}'
            for n in ('conv1._input_quantizer', 'downsample.0._input_quantizer')
        }
        | {f'neck.lateral_convs.{i}.conv._input_quantizer'}
        for i in range(2)
    ]


def test_a_copy_and_a_pickle_compute_the_same():
    model = calibrated('DLA-34')
    x = ZOO['DLA-34'][1]
    with torch.no_grad():
        wanted = model(x)
        assert equal(copy.deepcopy(model)(x), wanted)
        assert equal(pickle.loads(pickle.dumps(model))(x), wanted)


def test_a_checkpoint_of_another_process_gives_the_same():
    model = calibrated('RegNet')
    other = quant('RegNet')
    other.eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert equal(model(image()), other(image()))


@pytest.mark.usefixtures('same_optimizers')
def test_a_compiled_model_rounds_its_adds_too():
    model = calibrated('ResNet-18')
    with torch.no_grad():
        wanted = model(image())
        found = torch.compile(model, backend='eager')(image())
    assert equal(found, wanted)


def test_ranges_of_adds_are_learned_and_frozen_stages_stay_so():
    fixed = calibrated('ResNet-18')
    learning = quant('ResNet-18', learn_amax=True, frozen_stages=1)
    learning.load_state_dict(fixed.state_dict())
    learning.eval()
    assert equal(learning(image()), fixed(image()))
    sum(y.square().mean() for y in learning(image())).backward()
    later = learning.layer3[1].quant_joins['add0']._amax
    assert later.requires_grad and float(later.grad) != 0
    assert not learning.layer1[0].quant_joins['add0']._amax.requires_grad


def test_a_transformers_stream_stays_float_unless_asked():
    with_stream = MODELS.build(dict(SWIN, type='Quant', of=SWIN['type'], joins='all'))
    names = [n for n in quantizers(with_stream) if 'quant_joins' in n]
    assert len(names) == 8  # of attention and of the MLP, four blocks
    assert not any('quant_joins' in n for n in quantizers(quant('RegNet', joins=False)))


def test_skip_and_labels_name_paths():
    model = quant('RegNet', skip={'conv1': 'first', 'layer1.*': 'wide'})
    by_name = quantizers(model)
    assert by_name['conv1._input_quantizer'].float_reason == 'first'
    assert by_name['layer1.0.quant_joins.add0'].float_reason == 'wide'
    label = 'RegNet: layer2.0.conv1._input_quantizer'
    assert by_name['layer2.0.conv1._input_quantizer'].label == label
    assert by_name['layer2.0.quant_joins.add0'].label == 'RegNet: layer2.0.quant_joins.add0'
    with pytest.raises(ValueError, match="'conv9' matches no quantized layer of RegNet"):
        quant('RegNet', skip='conv9')


def test_only_names_what_is_quantized():
    model = quant('ResNet-18', only=['layer2', '*.downsample.0'])
    active = {n for n, q in quantizers(model).items() if q.float_reason is None}
    assert (
        'layer2.0.quant_joins.add0' in active and 'layer3.0.downsample.0._input_quantizer' in active
    )
    assert all(n.startswith('layer2.') or 'downsample' in n for n in active)
    with pytest.raises(ValueError, match="only='layer9' matches no layer"):
        quant('ResNet-18', only='layer9')


DCN = dict(dcn=dict(type='DCNv2', deform_groups=1, fallback_on_stride=False))


def test_a_deformable_convolution_stays_float_and_the_rest_of_its_block_does_not():
    stages = (False, False, False, True)
    model = quant('ResNet-50', **DCN, stage_with_dcn=stages)
    reasons = {k.name: k.reason for k in coverage(model).layers if k.reason}
    at = [f'layer4.{i}.conv2' for i in range(3)]
    assert list(reasons) == at
    active = {n for n, q in quantizers(model).items() if q.float_reason is None}
    assert active >= {f'{name}.conv_offset._input_quantizer' for name in at}
    assert all('deformable' in why for why in reasons.values())
    floating = MODELS.build(dict(ZOO['ResNet-50'][0], **DCN, stage_with_dcn=stages))
    assert len(coverage(floating).layers) == len(coverage(model).layers)
    with pytest.raises(ValueError, match='layer4.0.conv2 of ResNet.*deformable'):
        quant('ResNet-50', **DCN, stage_with_dcn=stages, only='layer4')


def deformed(name, **cfg):
    """A calibrated module, of another entry of the zoo, with deformable convolutions."""
    torch.manual_seed(0)
    model = quant(name, **cfg)
    for n, layer in model.named_modules():
        if n.endswith('conv_offset'):  # zero as built
            nn.init.normal_(layer.weight, std=0.02)
    model.eval()
    calibrate(model, [[ZOO[name][1]]], 'max')
    return model


DEFORMED = {
    'ResNet-50': dict(DCN, stage_with_dcn=(False, False, True, True)),
    'DLANeck': dict(use_dcn=True),
}


@pytest.mark.parametrize('name', DEFORMED)
def test_adds_around_deformable_convolutions_are_rounded_as_without(name):
    model = deformed(name, **DEFORMED[name])
    with torch.no_grad(), _Adds(model) as seen:
        model(ZOO[name][1])
    assert (seen.rounded, seen.bare) == (ZOO[name][2], 0)
    left = {layer.kind for layer in coverage(model).layers if layer.reason}
    assert left == {'ModulatedDeformConv2dPack'}
    floating = MODELS.build(dict(ZOO[name][0], **DEFORMED[name]))
    floating.load_state_dict(model.state_dict(), strict=False)
    floating.eval()
    with torch.no_grad(), set_mode(model, 'float'):
        assert equal(floating(ZOO[name][1]), model(ZOO[name][1]))


def test_offsets_that_are_zero_as_built_can_be_calibrated():
    model = quant('ResNet-50', **DEFORMED['ResNet-50'])
    model.eval()
    calibrate(model, [[image()]], 'max')
    with torch.no_grad():
        assert all(torch.isfinite(x).all() for x in model(image()))


def test_one_shot_aggregation_shares_a_scale_along_its_chain():
    """All that a block joins: what it got, what its convolutions made, and their readers."""
    groups = list(map(set, ties(quant('VoVNet'))))
    own = 'blocks.1.{}'.format
    layers = {own(f'layers.{i}.0._input_quantizer') for i in range(2)}
    joins = {own('quant_joins.cat0'), own('quant_joins.add0')}
    (chain,) = [g for g in groups if own('quant_joins.cat0') in g]
    assert chain == layers | joins | {own('concat.0._input_quantizer')}


def test_a_convolution_that_pads_by_itself_stays_float_and_the_function_its_own():
    cfg = dict(type='mmdet.EfficientNet', arch='b0', out_indices=(2,))
    model = MODELS.build(dict(cfg, type='Quant', of=cfg['type']))
    left = [k for k in coverage(model).layers if k.reason]
    assert left and all(k.kind == 'Conv2dAdaptivePadding' and 'pads' in k.reason for k in left)
    floating = MODELS.build(dict(cfg))
    floating.load_state_dict(model.state_dict(), strict=False)
    floating.eval()
    model.eval()
    with torch.no_grad(), set_mode(model, 'float'):
        assert equal(floating(image()), model(image()))


@pytest.mark.parametrize(
    'cfg, text',
    [
        (dict(of='QuantResNet', depth=18), "write type='QuantResNet'"),
        (dict(of='mmdet.ResNet', depth=18, with_cp=True), 'with_cp=False'),
        (dict(of='PointPillarsScatter', in_channels=4, output_shape=[4, 4]), 'no layers'),
        (dict(of='mmdet.FPN', in_channels=[4], out_channels=4, num_outs=1, example=[(1, 3, 4, 4)]),
         'example=.*list of maps'),
        (dict(of='mmdet.ResNet', depth=18, example=(1, 3, 64, 64)), r'write \[\(1, 3, 64, 64\)\]'),
        (dict(of='mmdet.ResNet', depth=18, joins='some'), "'some'"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_with_the_remedy(cfg, text):
    with pytest.raises(ValueError, match=text):
        MODELS.build(dict(cfg, type='Quant'))


def test_it_is_found_where_mmdet_builds_backbones():
    from mmdet.registry import MODELS as MMDET

    cfg = dict(ZOO['ResNet-18'][0], type='Quant', of='mmdet.ResNet')
    assert 'layer1.0.quant_joins.add0' in quantizers(MMDET.build(cfg))


def test_layers_that_are_swapped_by_conv_cfg_get_the_same_rights():
    by_cfg = quant('RegNet', conv_cfg=dict(type='QuantConv2d'), skip={'conv1': 'first'})
    plain = quant('RegNet', skip={'conv1': 'first'})
    assert ties(by_cfg) == ties(plain) and list(quantizers(by_cfg)) == list(quantizers(plain))
    names = {n: q.label for n, q in quantizers(by_cfg).items()}
    assert names == {n: q.label for n, q in quantizers(plain).items()}


def test_inputs_of_a_pyramid_are_drawn_from_the_channels():
    model = quant('FPN')
    assert len(model.input_readers()) == 3 and len(model.output_readers()) == 4
    assert all(len(names) == 1 for names in model.input_readers())
