"""Finding the quantizers of a model, switching them, and keeping some of them float."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Iterable, Mapping

from torch import nn

from mmdet3d_quant.core.quantizer import Quantizer, UncalibratedError
from mmdet3d_quant.core.spec import as_reasons, check_mode, select


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


def require_calibrated(model: nn.Module) -> None:
    """Raises :class:`UncalibratedError` with every quantizer that lacks a range."""
    names = uncalibrated(model)
    if names:
        raise UncalibratedError(names)


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
            ``'layer1.0'``, ``'*.conv1'``, ``'conv1._input_quantizer'``.

    Raises:
        ValueError: If a pattern matches no quantizer.
    """
    by_name = quantizers(model)
    for pattern, reason in as_reasons(skip).items():
        names = select(by_name, pattern)
        if not names:
            some = ', '.join(dict.fromkeys(n.rpartition('.')[0] for n in by_name)) or 'none'
            raise ValueError(
                f'skip pattern {pattern!r} matches no quantized layer of '
                f'{type(model).__name__}; its quantized layers are: {some}'
            )
        for name in names:
            by_name[name].keep_float(reason)
