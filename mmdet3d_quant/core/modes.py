"""Finding the quantizers of a model, switching them, and keeping some of them float."""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, Iterable, Iterator, Mapping

from torch import nn

from mmdet3d_quant.core.macs import weighted
from mmdet3d_quant.core.quantizer import Quantizer, UncalibratedError
from mmdet3d_quant.core.skip import how_to_skip
from mmdet3d_quant.core.spec import as_bits, as_reasons, check_mode, select


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Finds all quantizers of a model, those kept float included.

    Args:
        model: Any module.

    Returns:
        Dict from the dotted name in ``model`` to the quantizer, in the order of registration.
    """
    return {n: m for n, m in model.named_modules() if isinstance(m, Quantizer)}


def uncalibrated(model: nn.Module) -> list[str]:
    """Lists the quantizers that should have a range and have none."""
    return [
        name for name, q in quantizers(model).items() if q.float_reason is None and not q.calibrated
    ]


def float_state_dict(model: nn.Module) -> dict[str, Any]:
    """Makes a state dict without ranges, with the keys of the float parent.

    Args:
        model: Any module.

    Returns:
        The dict of ``model.state_dict()`` itself, since a copy by comprehension would lose its
        ``_metadata``, from which spconv reads the layout of its weights.
    """
    state = model.state_dict()
    for name, module in model.named_modules(remove_duplicate=False):  # layers may share one
        if isinstance(module, Quantizer):
            state.pop(f'{name}._amax', None)
    return state


def require_calibrated(model: nn.Module, reasons: Mapping[str, str] | None = None) -> None:
    """Raises :class:`UncalibratedError` with every quantizer that lacks a range.

    Args:
        model: Any module.
        reasons: Why quantizers were kept float when the checkpoint was saved, by name, if known.
    """
    names = uncalibrated(model)
    if not names:
        return
    by_name = quantizers(model)
    if not any(q.calibrated for q in by_name.values()):
        raise UncalibratedError(names)
    raise UncalibratedError(
        names,
        'Other quantizers have ranges: these were kept float, or were of a float type, when the '
        'checkpoint was saved. To keep them float, write in the config:\n  '
        f'{how_to_skip(model, names, by_name, reasons)}\nTo quantize them:',
    )


def kept_float(model: nn.Module) -> dict[str, str]:
    """Lists the quantizers that are kept float, with the reason of each."""
    return {n: q.float_reason for n, q in quantizers(model).items() if q.float_reason is not None}


class set_mode(AbstractContextManager):  # noqa: N801 - reads as the function it is
    """Switches all quantizers of a model; as a context manager, restores them on leaving.

    >>> from mmdet3d_quant import set_mode
    >>> from mmdet3d_quant.layers import QuantConv2d
    >>> conv = QuantConv2d(3, 8, 1)
    >>> _ = set_mode(conv, 'float')
    >>> with set_mode(conv, 'observe'):
    ...     conv._input_quantizer.mode
    'observe'
    >>> conv._input_quantizer.mode
    'float'

    Args:
        model: Any module.
        mode: ``'float'``: quantizers pass their input, the model equals its float parent;
            ``'observe'``: the same, and calibrators see the tensors; ``'quant'``: fake-quantized.

    Raises:
        ValueError: If the mode is unknown.
    """

    def __init__(self, model: nn.Module, mode: str):
        check_mode(mode)
        self._before = [(q, q.switches) for q in quantizers(model).values()]
        for q, _ in self._before:
            q.mode = mode

    def __exit__(self, *exc_info: object) -> None:
        for q, switches in self._before:
            q.switches = switches


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into eval mode, and restores every module's training flag afterwards."""
    before = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def constant_parameters(model: nn.Module) -> Iterator[None]:
    """Computes no gradients of a model's parameters for a while."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def name_quantizers(model: nn.Module) -> None:
    """Labels all quantizers with their names in ``model``, for error messages."""
    for name, q in quantizers(model).items():
        q.label = f'{type(model).__name__}: {name}'


def keep_float(model: nn.Module, skip: str | Iterable[str] | Mapping[str, str]) -> None:
    """Keeps the layers that match float, for good.

    Args:
        model: Any module.
        skip: A name pattern, several, or ``{pattern: reason}``. A pattern names a layer, a
            quantizer or a part of the tree with all inside it, relative to ``model``:
            ``'layer1.0'``, ``'*.conv1'``, ``'conv1._input_quantizer'``. A layer of a float type
            is float anyway; its reason is then told where :mod:`mmdet3d_quant.core.coverage` is.

    Raises:
        ValueError: If a pattern matches neither a quantizer nor a layer with weights.
    """
    by_name = quantizers(model)
    layers = weighted(model)
    for pattern, reason in as_reasons(skip).items():
        names = select(by_name, pattern)
        floats = [n for n in select(layers, pattern) if not quantizers(layers[n])]
        for name in floats:
            layers[name].float_reason = reason  # type: ignore[assignment]
        if not names and not floats:
            some = ', '.join(dict.fromkeys(n.rpartition('.')[0] for n in by_name)) or 'none'
            raise ValueError(
                f'skip pattern {pattern!r} matches no quantized layer of '
                f'{type(model).__name__}; its quantized layers are: {some}'
            )
        for name in names:
            by_name[name].keep_float(reason)


def set_formats(model: nn.Module, formats: str | Mapping[str, str] | tuple[()]) -> None:
    """Gives the quantizers that match a number format; of several patterns the last counts.

    Args:
        model: Any module.
        formats: A name, for all, or ``{pattern: name}``: ``'int8'``, ``'fp8'``, or another of
            ``core.formats.FORMATS``. Patterns are those of :func:`keep_float`.

    Raises:
        ValueError: If a name is unknown or a pattern matches no quantizer.
    """
    by_name = quantizers(model)
    for pattern, bits in as_bits(formats).items():
        names = select(by_name, pattern)
        if not names:
            some = ', '.join(dict.fromkeys(n.rpartition('.')[0] for n in by_name)) or 'none'
            raise ValueError(
                f'format pattern {pattern!r} matches no quantized layer of '
                f'{type(model).__name__}; its quantized layers are: {some}'
            )
        for name in names:
            by_name[name].spec = replace(by_name[name].spec, num_bits=bits)
