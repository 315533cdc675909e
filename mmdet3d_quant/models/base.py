"""Shared constructor steps of quantized models, which take their parent's arguments."""

from __future__ import annotations

import inspect
from typing import Any, Iterable, Mapping, Tuple, Union

from mmengine.registry import MODELS
from torch import nn

from mmdet3d_quant.core.formats import FP8
from mmdet3d_quant.core.modes import keep_float, name_quantizers, quantizers, set_formats
from mmdet3d_quant.core.ties import ties
from mmdet3d_quant.layers.base import QuantLayer
from mmdet3d_quant.layers.sparse import QUANT_SPARSE
from mmdet3d_quant.parents import PortableSparseEncoder

Skip = Union[str, Iterable[str], Mapping[str, str]]
Formats = Union[str, Mapping[str, str], Tuple[()]]

#: Layer types of a float config, and what each becomes. None is the default of its place.
CONVS = dict.fromkeys((None, 'Conv', 'Conv2d', 'QuantConv2d'), 'QuantConv2d')
UPSAMPLES = dict.fromkeys(('deconv', 'deconv2d', 'QuantConvTranspose2d'), 'QuantConvTranspose2d')
#: The same of sparse blocks, whose float encoders name types, and have them as types, too.
SPARSE_CONVS: dict[str | type | None, type] = {
    known: quantized
    for name, quantized in QUANT_SPARSE.items()
    for known in (name, f'Quant{name}', PortableSparseEncoder.convs[name], quantized)
}
SPARSE_CONVS[None] = QUANT_SPARSE['SubMConv3d']


def arguments(parent: type, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Binds positional arguments to the names of the parent's constructor.

    Raises:
        TypeError: If the parent does not take them; names the parent.
    """
    try:
        return dict(inspect.signature(parent).bind(*args, **kwargs).arguments)
    except TypeError as err:
        raise TypeError(f'{parent.__name__} (whose arguments this type takes): {err}') from None


def quant_conv_cfg(cfg: dict | None) -> dict:
    """Converts a float ``conv_cfg`` to the quantized type, with all else as it was.

    Raises:
        ValueError: If the type has no quantized counterpart.
    """
    return _swapped(cfg, CONVS, 'conv_cfg')


def quant_upsample_cfg(cfg: dict) -> dict:
    """Converts a float ``upsample_cfg``; interpolations have no weights and stay.

    Raises:
        ValueError: If the type has no quantized counterpart.
    """
    if isinstance(cfg, Mapping) and cfg.get('type') in ('nearest', 'bilinear'):
        return dict(cfg)
    return _swapped(cfg, UPSAMPLES, 'upsample_cfg')


def quant_sparse_conv_cfg(cfg: dict | None) -> dict:
    """Converts the ``conv_cfg`` of a sparse block to the quantized type, with all else as it was.

    Raises:
        ValueError: If the type has no quantized counterpart.
    """
    return _swapped(cfg, SPARSE_CONVS, 'conv_cfg of a sparse block:')


def _swapped(cfg: Mapping | None, types: Mapping, what: str) -> dict:
    if cfg is not None and not isinstance(cfg, Mapping):
        raise ValueError(f"{what} expects a dict such as dict(type='...'), got {cfg!r}")
    new = dict(cfg or {})
    kind = new.get('type')
    if kind not in list(types) and kind is not None:  # a class or its path, as in Python configs
        cls = _found(kind) if isinstance(kind, str) else kind
        kind = next((t for t in types if isinstance(t, str) and _is(MODELS.get(t), cls)), kind)
    if kind not in list(types):
        known = ', '.join(repr(t) for t in types if not isinstance(t, type))
        raise ValueError(f'{what} type {kind!r} cannot be quantized; expected one of {known}')
    new['type'] = types[kind]
    return new


def _found(name: str) -> Any:
    """The registered type of a name, None where there is none, nor a name that mmengine reads."""
    try:
        return MODELS.get(name)
    except (RuntimeError, TypeError, ValueError):
        return None


def _is(registered: Any, cls: Any) -> bool:
    """Tells whether a class is the registered one, or torch's that mmcv wraps under its name."""
    wraps = getattr(registered, '__module__', '').startswith('mmcv.')
    return cls is not None and (registered is cls or (wraps and cls in registered.__bases__))


def finish(model: nn.Module, skip: Skip, learn_amax: bool = False, format: Formats = ()) -> None:
    """Finishes the constructor of a quantized model: float layers, formats, learned ranges.

    Args:
        model: The model, built.
        skip: Layers to keep float; see :func:`mmdet3d_quant.core.modes.keep_float`.
        learn_amax: Make the ranges of activations parameters; see :mod:`mmdet3d_quant.qat`.
        format: Number formats; see :func:`mmdet3d_quant.core.modes.set_formats`.

    Raises:
        ValueError: If a pattern matches nothing, formats that must be equal differ, or a layer has
            a format that nothing runs.
    """
    keep_float(model, skip)
    set_formats(model, format)
    if format:
        _check_formats(model)
    if learn_amax:
        for quantizer in quantizers(model).values():
            if quantizer.spec.axis is None:  # weights have a range per channel, which follows them
                quantizer.learn()
    name_quantizers(model)


def _check_formats(model: nn.Module) -> None:
    ties(model)  # whose members must be of one format
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLayer) and layer.why_integers:
            quantizer = layer._input_quantizer
            if quantizer.float_reason is None and quantizer.spec.format == FP8:
                raise ValueError(
                    f'{name} of {type(model).__name__} cannot be {FP8.name}: {layer.why_integers}. '
                    "Name its part in `format` with 'int8', behind the others: of several patterns "
                    'the last counts'
                )
