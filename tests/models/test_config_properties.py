"""Settings of models and of QAT as people write them: done as they say, or refused by name."""

from fnmatch import fnmatchcase

import pytest
from hypothesis import strategies as st
from mmdet3d.registry import MODELS
from mmengine.config import Config
from torch import nn

from mmdet3d_quant import models, quantizers
from mmdet3d_quant.core.errors import QuantError
from mmdet3d_quant.models.base import quant_conv_cfg, quant_sparse_conv_cfg, quant_upsample_cfg
from mmdet3d_quant.qat.hook import QATHook
from mmdet3d_quant.runs.from_config import ConfigError, build_model
from tests.properties import deeper, holds

SMALL = dict(
    depth=18, base_channels=4, num_stages=1, strides=(1,), dilations=(1,), out_indices=(0,)
)
#: Ways to name the type, and how far each must be known.
TYPES = [
    models.QuantResNet,
    'QuantResNet',
    'mmdet3d.QuantResNet',
    'mmdet3d_quant.models.QuantResNet',
    'mmdet3d_quant.models.resnet.QuantResNet',
]
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3),
    st.floats(),
    st.binary(max_size=2),
    st.text(max_size=3),
)
NESTED = st.one_of(ANYTHING, st.lists(ANYTHING, max_size=2), st.dictionaries(ANYTHING, ANYTHING))
#: Names of layers, and pieces of them put together.
PIECES = st.lists(
    st.sampled_from(
        ['conv1', 'layer1', '0', '1', 'conv', '*', '?', '_input_quantizer', '[01]', '']
    ),
    max_size=4,
).map('.'.join)
PATTERNS = st.one_of(
    PIECES, st.sampled_from(['conv1', 'layer1.0', '*', ' conv1', 'CONV1', 'layer2'])
)


def build(**options):
    return MODELS.build(dict(type='mmdet3d.QuantResNet', **SMALL, **options))


NAMES = list(quantizers(build()))


def inside(name, pattern):
    """Whether a pattern names a quantizer, or a module that it is in."""
    parts = name.split('.')
    return any(fnmatchcase('.'.join(parts[: i + 1]), pattern) for i in range(len(parts)))


@holds(25, skip=st.one_of(PATTERNS, st.lists(PATTERNS), st.dictionaries(PATTERNS, st.text())))
def test_exactly_what_skip_names_is_float(skip):
    patterns = [skip] if isinstance(skip, str) else list(skip)
    idle = [p for p in patterns if not any(inside(n, p) for n in NAMES)]
    if idle:
        with pytest.raises(ValueError) as told:
            build(skip=skip)
        assert repr(idle[0]) in str(told.value)
        return
    found = {n for n, q in quantizers(build(skip=skip)).items() if q.float_reason is not None}
    assert found == {n for n in NAMES if any(inside(n, p) for p in patterns)}


@holds(25, skip=NESTED)
def test_a_skip_of_anything_builds_or_is_a_value_error(skip):
    try:
        build(skip=skip)
    except ValueError as err:
        assert 'skip' in str(err)


@holds(
    50,
    kind=st.one_of(
        st.sampled_from(TYPES),
        st.text(max_size=4),
        ANYTHING,
        st.sampled_from(
            ['QuantResnet', 'mmdet.QuantResNet', 'mmdet3d_quant.QuantResNet', '.', 'a.b']
        ),
    ),
)
def test_a_type_is_the_class_it_names_or_a_config_error(kind):
    cfg = Config(dict(model=dict(type=kind, **SMALL)))
    if any(kind is t or kind == t for t in TYPES):
        assert type(build_model(cfg)) is models.QuantResNet
    else:
        with pytest.raises(ConfigError):
            build_model(cfg)


@holds(
    60,
    key=st.sampled_from(
        [
            *SMALL,
            'norm_cfg',
            'conv_cfg',
            'plugins',
            'init_cfg',
            'skip',
            'learn_amax',
            'style',
            'dcn',
            'stage_with_dcn',
            'no_such_key',
        ]
    ),
    value=NESTED,
)
def test_an_argument_of_anything_builds_or_is_a_config_error(key, value):
    try:
        model = build_model(Config(dict(model=dict(type='QuantResNet', **{**SMALL, key: value}))))
    except (ConfigError, QuantError) as err:
        assert str(err)
        return
    assert isinstance(model, models.QuantResNet)


CONVS = st.one_of(
    st.sampled_from(
        [
            'Conv2d',
            'Conv',
            'QuantConv2d',
            'torch.nn.Conv2d',
            nn.Conv2d,
            'Conv1d',
            'deconv',
            'DCN',
            'nearest',
            'torch.nn.ConvTranspose2d',
            nn.ConvTranspose2d,
            'SubMConv3d',
            'mmdet3d.Conv2d',
        ]
    ),
    NESTED,
)
SWAPS = {
    quant_conv_cfg: {'QuantConv2d'},
    quant_upsample_cfg: {'QuantConvTranspose2d', 'nearest', 'bilinear'},
    quant_sparse_conv_cfg: {'QuantSubMConv3d', 'QuantSparseConv3d'},
}


@holds(150, swap=st.sampled_from(list(SWAPS)), kind=CONVS, bias=st.booleans(), whole=NESTED)
def test_a_layer_type_is_swapped_or_refused_by_name(swap, kind, bias, whole):
    try:
        new = swap(dict(type=kind, bias=bias))
        assert getattr(new['type'], '__name__', new['type']) in SWAPS[swap] and new['bias'] is bias
    except ValueError as err:
        assert repr(kind) in str(err)
        assert kind not in ('Conv2d', nn.Conv2d) or swap is not quant_conv_cfg
    try:
        swap(whole)
    except ValueError as err:
        assert 'cfg' in str(err)


TIMES = st.one_of(st.integers(-1, 4), st.sampled_from(['0', '2', '1.5', ' 1', '-1']), ANYTHING)
STAGES = st.dictionaries(PATTERNS, st.sampled_from(['float', 'quant', 'observe', 'Float', None]))


def is_time(value):
    return type(value) is int and value >= 0 or value in ('0', '2') and type(value) is str


@holds(
    200,
    freeze=st.one_of(st.none(), TIMES),
    schedule=st.one_of(
        st.dictionaries(TIMES, STAGES, max_size=2),
        st.dictionaries(TIMES, NESTED, max_size=2),
        NESTED,
    ),
)
def test_a_schedule_is_kept_or_refused_before_training(freeze, schedule):
    good = freeze is None or is_time(freeze) or (isinstance(freeze, str) and freeze.isdecimal())
    try:
        hook = QATHook(freeze_bn=freeze, schedule=schedule)
    except ValueError as err:
        assert 'freeze_bn' in str(err) or 'schedule' in str(err)
        assert not good or 'freeze_bn' not in str(err)
        return
    assert good and hook.freeze_bn == (None if freeze is None else int(freeze))
    assert hook.schedule == {int(t): dict(modes or {}) for t, modes in (schedule or {}).items()}
    assert all(mode in ('float', 'quant') for m in hook.schedule.values() for mode in m.values())


@pytest.mark.slow
@pytest.mark.parametrize('check', deeper(__name__), ids=lambda c: c.__name__)
def test_with_more_examples(check):
    check()
