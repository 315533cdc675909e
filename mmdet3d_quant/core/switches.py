"""The switches of pytorch-quantization's ``TensorQuantizer``: each acts, or names a remedy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Callable

from pytorch_quantization.nn import TensorQuantizer

from mmdet3d_quant.core.errors import QuantError
from mmdet3d_quant.core.formats import Bits
from mmdet3d_quant.core.spec import QuantSpec

_CALIBRATE = (
    'ranges are chosen for all quantizers of a model together: '
    '`mmdet3d_quant.calibrate(model, batches)`, whose third argument is the method'
)
_LEARN = (
    'there is no clip stage; to train ranges, build the model with `learn_amax=True` '
    '(docs/qat.md), or call `quantizer.learn()` before there is an optimizer'
)
_SIGNED = (
    'engines take signed integers for what may be negative; '
    '`mmdet3d_quant.export.export_onnx(..., target="openvino")` makes those unsigned that never are'
)
#: Told by layers that are asked for other descriptors.
DESCRIPTORS = (
    'layers have no default descriptors. Bits are set by quantizer, once the model is built: '
    '`for q in mmdet3d_quant.quantizers(model).values(): q.num_bits = 4`, or '
    '`q.spec = QuantSpec(num_bits=4, axis=q.spec.axis)`. The method is an argument of '
    '`mmdet3d_quant.calibrate(model, batches, method)`'
)


def _refuse(name: str, cure: str) -> Callable:
    """Makes a method that raises and says what to do instead."""

    def refuse(self: Switches, *args: Any, **kwargs: Any) -> None:
        raise QuantError(f'{self.label}: {name} has no effect here: {cure}')

    refuse.__doc__ = f'Raises ``QuantError``: {cure}.'
    return refuse


def _fixed(name: str, value: Callable[[Switches], Any], cure: str) -> property:
    """Makes a property that takes no value but the one it has."""

    def take(self: Switches, new: Any) -> None:
        if new != value(self):
            raise QuantError(f'{self.label}: {name} is {value(self)} and stays so: {cure}')

    return property(value, take, doc=f'Read only: {cure}.')


class Switches(TensorQuantizer):
    """``TensorQuantizer`` of which no switch is silently ignored.

    ``disable``, ``enable``, ``disable_quant``, ``enable_quant`` and ``disable_calib`` act as there,
    by the same attributes. A subclass reads these in order: disabled, else observing, else
    quantizing. Bits and axis are those of ``spec``; setting ``num_bits`` changes it. A switch
    without counterpart raises :class:`~mmdet3d_quant.core.errors.QuantError`.

    Attributes:
        spec: Bits and axis; set before the constructor is called.
        label: How errors name the quantizer; likewise.
    """

    spec: QuantSpec
    label: str
    #: Whether it is disabled by mode float, which ``enable_quant()`` ends, not by ``disable()``.
    _by_mode = False

    @property
    def switches(self) -> tuple[bool, ...]:
        """State of the switches, to be restored later."""
        return self._disabled, self._if_calib, self._if_quant, self._by_mode

    @switches.setter
    def switches(self, state: tuple[bool, ...]) -> None:
        self._disabled, self._if_calib, self._if_quant, self._by_mode = state

    def disable(self) -> None:
        """Passes tensors as they are, until ``enable()`` or a mode."""
        self._by_mode = False
        super().disable()

    def enable_quant(self) -> None:
        """Quantizes, unless disabled by ``disable()``."""
        self._end_float_mode()
        super().enable_quant()

    def _end_float_mode(self) -> None:
        if self._by_mode:
            self._by_mode = False
            self.enable()

    @property
    def _num_bits(self) -> Bits:  # behind the library's `num_bits`
        return self.spec.num_bits

    @_num_bits.setter
    def _num_bits(self, value: Bits) -> None:
        self.spec = replace(self.spec, num_bits=value)

    axis = _axis = _fixed(
        'axis',
        lambda q: q.spec.axis,
        'the layer decides it; build a `Quantizer(QuantSpec(axis=...), channels=..., ndim=...)`',
    )
    unsigned = _unsigned = _fixed('unsigned', lambda q: False, _SIGNED)
    narrow_range = _narrow_range = _fixed(
        'narrow_range', lambda q: False, 'the grid of engines has one negative integer more'
    )
    fake_quant = _fake_quant = _fixed(
        'fake_quant', lambda q: True, 'integers are what `mmdet3d_quant.export` writes'
    )

    def enable_calib(self) -> None:
        """Observes with a calibrator that was put in as ``_calibrator``.

        Raises:
            QuantError: If there is none.
        """
        self._require_calibrator('enable_calib')
        self._end_float_mode()
        super().enable_calib()

    def load_calib_amax(self, *args: Any, **kwargs: Any) -> None:
        """Sets the range that the calibrator in ``_calibrator`` computes from the arguments.

        Raises:
            QuantError: If there is none.
        """
        self._require_calibrator('load_calib_amax')
        super().load_calib_amax(*args, **kwargs)
        self.amax = self._amax

    def _require_calibrator(self, name: str) -> None:
        if self._calibrator is None:
            raise QuantError(f'{self.label}: {name}() finds no calibrator here: {_CALIBRATE}')

    enable_clip = _refuse('enable_clip', _LEARN)
    disable_clip = _refuse('disable_clip', _LEARN)
    init_learn_amax = _refuse('init_learn_amax', _LEARN)
