"""The library's switches: each acts as it does there, or says what does."""

from itertools import product

import pytest
import torch
from pytorch_quantization import calib
from pytorch_quantization.nn import TensorQuantizer
from pytorch_quantization.tensor_quant import QuantDescriptor
from torch import nn

import mmdet3d_quant as mq
from mmdet3d_quant import layers, quantizers, set_mode
from mmdet3d_quant.core.errors import QuantError
from mmdet3d_quant.core.quantizer import Quantizer
from mmdet3d_quant.core.spec import QuantSpec
from mmdet3d_quant.export.tracing import TRACED
from mmdet3d_quant.layers import QuantConv2d

ACT = ['disable', 'enable', 'disable_quant', 'enable_quant']
#: What each of those that have no counterpart tells.
REFUSED = {
    'enable_calib': r'mmdet3d_quant\.calibrate\(model, batches\)',
    'load_calib_amax': r'mmdet3d_quant\.calibrate\(model, batches\)',
    'enable_clip': 'learn_amax=True',
    'disable_clip': 'learn_amax=True',
    'init_learn_amax': 'learn_amax=True',
}
#: What each of those that have one value tells, and another value.
FIXED = {
    'axis': (r'QuantSpec\(axis=', 0),
    'unsigned': 'target="openvino"',
    'narrow_range': 'one negative integer more',
    'fake_quant': (r'mmdet3d_quant\.export', False),
}
X = torch.randn(1000, generator=torch.Generator().manual_seed(0))  # no tie among them


def pair(amax=2.0):
    """One of ours and one of the library, of one range."""
    ours, theirs = Quantizer(), TensorQuantizer()
    ours.amax = theirs.amax = amax
    return ours, theirs


def test_every_switch_of_the_library_is_in_these_tables():
    public = {name for name in vars(TensorQuantizer) if not name.startswith('_')}
    read = {'amax', 'forward', 'extra_repr', 'scale', 'step_size', 'use_fb_fake_quant'}
    assert public == {*ACT, *REFUSED, *FIXED, 'disable_calib', 'num_bits'} | read


@pytest.mark.parametrize('count', [1, 2, 3])
def test_switches_give_what_they_give_there(count):
    for names in product(ACT, repeat=count):
        ours, theirs = pair()
        for name in names:
            getattr(ours, name)()
            getattr(theirs, name)()
            torch.testing.assert_close(ours(X), theirs(X), msg=' '.join(names))
        assert ours.mode == ('float' if ours(X) is X else 'quant')


def test_flags_set_by_hand_as_many_recipes_do():
    ours, theirs = pair()
    for disabled in (True, False):
        ours._disabled = theirs._disabled = disabled
        torch.testing.assert_close(ours(X), theirs(X))
        assert ours.mode == ('float' if disabled else 'quant')


@pytest.mark.parametrize('mode', ['float', 'observe', 'quant'])
def test_a_mode_ends_what_switches_did_and_switches_end_a_mode(mode):
    for name in ACT:
        ours, _ = pair()
        getattr(ours, name)()
        ours.mode = mode
        assert ours.mode == mode
    for name in ('enable', 'enable_quant'):
        set_mode(ours, 'float')
        getattr(ours, name)()
        assert ours.mode == 'quant'
    ours.disable()
    ours.enable_quant()
    assert ours.mode == 'float'  # as in the library


def test_switches_are_as_before_after_a_mode_for_a_while():
    model = nn.Sequential(QuantConv2d(3, 4, 1))
    mq.calibrate(model, [torch.randn(1, 3, 4, 4)])
    off, disabled = model[0]._input_quantizer, model[0]._weight_quantizer
    off.disable_quant()
    disabled.disable()
    with set_mode(model, 'quant'):
        assert off.mode == disabled.mode == 'quant'
    assert off.mode == disabled.mode == 'float'
    for quantizer in quantizers(model).values():
        quantizer.enable_quant()
    assert off.mode == 'quant' and disabled.mode == 'float'


def test_kept_float_stays_float():
    for name in ACT:
        ours, _ = pair()
        ours.keep_float('a reason')
        getattr(ours, name)()
        assert ours(X) is X and ours.mode == 'float'


@pytest.mark.parametrize('bits', range(2, 9))
def test_bits_are_those_of_the_spec(bits):
    ours, theirs = pair()
    ours.num_bits = theirs.num_bits = bits
    torch.testing.assert_close(ours(X), theirs(X))
    torch.testing.assert_close(ours.step_size, theirs.step_size)
    assert ours.spec == QuantSpec(bits) and f'int{bits} ' in repr(ours)
    ours.spec = QuantSpec(10 - bits)
    assert ours.num_bits == 10 - bits
    with pytest.raises(ValueError, match='one of 2, 3'):
        ours.num_bits = 16


def test_axis_is_that_of_the_spec():
    conv = layers.QuantConvTranspose2d(3, 4, 1)
    assert conv._weight_quantizer.axis == 1 and conv._input_quantizer.axis is None


@pytest.mark.parametrize('name', REFUSED)
def test_what_has_no_counterpart_says_what_to_do(name):
    conv = QuantConv2d(3, 4, 1)
    with pytest.raises(QuantError, match=f'input of QuantConv2d.*{name}.*{REFUSED[name]}'):
        getattr(conv._input_quantizer, name)()


@pytest.mark.parametrize('name', FIXED)
def test_what_has_one_value_says_so(name):
    told, other = FIXED[name] if isinstance(FIXED[name], tuple) else (FIXED[name], True)
    ours, theirs = pair()
    assert getattr(ours, name) == getattr(theirs, name)
    setattr(ours, name, getattr(ours, name))
    for private in ('', '_'):
        with pytest.raises(QuantError, match=f'quantizer: {name} .*{told}'):
            setattr(ours, private + name, other)


def test_a_calibrator_of_the_library_may_be_put_in():
    ours, theirs = pair(1e-3)
    for quantizer in (ours, theirs):
        quantizer._calibrator = calib.MaxCalibrator(8, None, False)
        quantizer.disable_quant()
        quantizer.enable_calib()
        assert quantizer(X) is X
        quantizer.load_calib_amax()
        quantizer.disable_calib()
        assert quantizer(X) is X
        quantizer.enable_quant()
    assert ours.amax == theirs.amax == X.abs().max() and ours.mode == 'quant'
    torch.testing.assert_close(ours(X), theirs(X))


@pytest.mark.parametrize('kind', ['QuantConv2d', 'QuantConvTranspose2d', 'QuantLinear'])
@pytest.mark.parametrize('which', ['input', 'weight'])
def test_layers_have_no_default_descriptors(kind, which):
    choose = getattr(getattr(layers, kind), f'set_default_quant_desc_{which}')
    with pytest.raises(QuantError, match=f'{kind}: .*QuantSpec.num_bits=4.*calibrate'):
        choose(QuantDescriptor(num_bits=4))


def test_the_library_s_way_to_export_gives_its_operators(tmp_path, monkeypatch):
    onnx = pytest.importorskip('onnx')
    conv = QuantConv2d(3, 4, 1).eval()
    conv._input_quantizer.amax = 1.5
    conv._weight_quantizer.amax = conv.weight_amax()
    x = torch.randn(1, 3, 4, 4)
    expected = conv(x)
    monkeypatch.setattr(TensorQuantizer, 'use_fb_fake_quant', True)
    assert conv(x).equal(expected)
    torch.onnx.export(conv, x, tmp_path / 'conv.onnx', opset_version=13, **TRACED)
    found = [node.op_type for node in onnx.load(tmp_path / 'conv.onnx').graph.node]
    assert found.count('QuantizeLinear') == found.count('DequantizeLinear') == 2
    assert found[-1] == 'Conv' and not {'Round', 'Clip'} & set(found)
