"""The backbones and necks of mmdet and mmdet3d: quantized, or refused; none silently changed."""

import sys

import pytest
import torch
from mmdet3d.registry import MODELS
from torch import nn

from mmdet3d_quant import calibrate, set_mode
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.copies import tensors
from mmdet3d_quant.core.coverage import coverage
from mmdet3d_quant.layers.base import QuantLayer
from tests.models.registry import MODULES, REFUSED, WITHOUT

ROOMS = ('.backbones.', '.necks.', '.middle_encoders.')


def registered():
    from mmdet.registry import MODELS as MMDET

    return {
        f'{registry.scope}.{name}'
        for registry in (MMDET, MODELS)
        for name, kind in registry.module_dict.items()
        if kind.__module__.startswith(('mmdet.', 'mmdet3d.'))
        and any(room in kind.__module__ for room in ROOMS)
    }


def test_every_backbone_and_neck_has_its_case():
    assert registered() <= {*MODULES, *REFUSED, *WITHOUT}


def both(name):
    args, x = MODULES[name]
    torch.manual_seed(0)
    floating = MODELS.build(dict(args, type=name))
    torch.manual_seed(0)
    quantized = MODELS.build(dict(args, type='Quant', of=name))
    for key, parameter in floating.named_parameters():
        size = float(parameter.abs().max())
        if not size <= 10 or key.endswith('weight') and size < 1e-6:
            nn.init.normal_(parameter, std=0.1)  # some are only allocated
    keys = quantized.load_state_dict(floating.state_dict(), strict=False)
    assert not keys.unexpected_keys and all(k.endswith('._amax') for k in keys.missing_keys)
    floating.eval()
    quantized.eval()
    return floating, quantized, x


@pytest.mark.parametrize('name', MODULES)
def test_it_is_quantized_and_its_function_stays_the_same(name):
    if name == 'mmdet.DyHead' and hasattr(sys.modules.get('mmcv._ext'), 'LEFT_OUT'):
        pytest.skip('mmcv operators are left out in this environment')
    floating, quantized, x = both(name)
    with torch.no_grad():
        wanted = list(tensors(floating(x)))
        with set_mode(quantized, 'float'):
            found = list(tensors(quantized(x)))
        assert all(torch.equal(a, b) for a, b in strict_zip(wanted, found))
        calibrate(quantized, [[x]], 'max')
        errors = [
            float((a - b).norm() / a.norm()) for a, b in strict_zip(wanted, tensors(quantized(x)))
        ]
    assert 0 < max(errors) < 0.2
    for layer in coverage(quantized).layers:
        module = quantized.get_submodule(layer.name)
        assert isinstance(module, QuantLayer) or layer.meant, layer.name
        assert layer.reason is None or len(layer.reason) > 20


@pytest.mark.parametrize('name', REFUSED)
def test_it_is_refused_with_a_reason(name):
    args, reason = REFUSED[name]
    MODELS.build(dict(args, type=name))  # the float one is no error
    with pytest.raises(ValueError, match=reason):
        MODELS.build(dict(args, type='Quant', of=name))
