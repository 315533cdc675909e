"""The quantizer: fake-quantizes one tensor with a calibrated range."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_quantization.nn import TensorQuantizer
from pytorch_quantization.tensor_quant import QuantDescriptor
from torch import Tensor, nn

from mmdet3d_quant.core.errors import QuantError
from mmdet3d_quant.core.fake_quant import compiling
from mmdet3d_quant.core.formats import FP8, MIN_AMAX
from mmdet3d_quant.core.joined import Grid, Rounded, grid_of, quantize
from mmdet3d_quant.core.known import KnownRange
from mmdet3d_quant.core.spec import QuantSpec, check_mode
from mmdet3d_quant.core.switches import Switches

HOW_TO_CALIBRATE = (
    'Calibrate first: `python tools/calibrate.py CONFIG CHECKPOINT --out FILE` and load FILE, '
    'or `mmdet3d_quant.calibrate(model, batches)`. To run the model unquantized: '
    "`mmdet3d_quant.set_mode(model, 'float')`."
)
#: For one quantizer, which does not know the others.
_IF_OTHERS_HAVE = (
    'If other layers have ranges, this one was kept float, or was of a float type, when the '
    'checkpoint was saved: keep it float with `skip`, of its Quant* type, or of '
    "`model = dict(type='Quantized', of=DETECTOR, skip={PATTERN: REASON})`. Else:"
)


class UncalibratedError(QuantError):
    """A quantizer without a range was asked to quantize or to be exported.

    Attributes:
        names: The quantizers concerned.

    Args:
        names: Likewise.
        hint: Sentences before those that tell how to calibrate.
    """

    def __init__(self, names: list[str], hint: str = ''):
        self.names = names
        shown = '\n  '.join(names[:20]) + (f'\n  ... {len(names) - 20} more' if names[20:] else '')
        super().__init__(
            f'{len(names)} quantizer(s) have no calibrated range:\n  {shown}\n'
            + (f'{hint} ' if hint else '')
            + HOW_TO_CALIBRATE
        )


class Quantizer(Switches):
    """pytorch-quantization's ``TensorQuantizer`` that always knows whether it is calibrated.

    The range lives in the buffer ``_amax``, present from the start and NaN until calibrated, so
    that the keys of a state dict do not depend on the history of the model, and loading works on
    any device. A quantizer kept float has no buffer and ignores one in a checkpoint. After
    :meth:`learn` the range is a parameter of the same name.

    Args:
        spec: Bits and axis; INT8 per tensor by default.
        channels: Number of ranges along ``spec.axis``; needed when an axis is given.
        ndim: Number of dimensions of the tensor; ``_amax`` then has shape
            ``(1, ..., channels, ..., 1)``, as in pytorch-quantization.
        label: How errors name this quantizer until the model that contains it is known.

    Attributes:
        known: What calibration takes without looking at data; None where the data decides.
    """

    _amax: Any  # a Tensor, or None when kept float
    _calibrator: Any

    def __init__(
        self,
        spec: QuantSpec | None = None,
        channels: int = 1,
        ndim: int = 0,
        label: str = 'quantizer',
    ):
        self.spec = spec = spec or QuantSpec()
        self.label = label
        super().__init__(QuantDescriptor(num_bits=spec.format.bits, axis=spec.axis))
        self.spec = spec  # the library's constructor has set the width
        self._calibrator = None
        self.float_reason: str | None = None
        self.known: KnownRange | None = None
        shape = [channels if i == spec.axis else 1 for i in range(ndim)]
        self.register_buffer('_amax', torch.full(shape, float('nan')))
        self._calibrated = False
        #: Quantizers of equal ranges, a list that all of them hold; see `core.ties.share_ranges`.
        self.equals: list[Quantizer] = []

    @property
    def _version(self) -> Any:  # type: ignore[override]
        """What metadata of a state dict have beside its keys: what the range is for.

        1, torch's own number, for integers of any width; else the name of the format.
        """
        return FP8.name if self.spec.format == FP8 else 1

    @property
    def amax(self) -> Tensor | None:
        """The range limit(s), without gradient, or None while uncalibrated."""
        return self._amax.detach() if self._calibrated else None

    @amax.setter
    def amax(self, value: float | Tensor) -> None:
        """Sets the range.

        Raises:
            ValueError: If a value is negative or not finite, or if the shape does not fit.
        """
        if self._amax is None:
            raise ValueError(f'{self.label} is kept float ({self.float_reason}): it has no range')
        new = torch.as_tensor(value, dtype=self._amax.dtype, device=self._amax.device)
        if new.numel() != self._amax.numel():
            raise ValueError(
                f'{self.label}: expected {self._amax.numel()} range(s), got {new.numel()}'
            )
        if not bool((torch.isfinite(new) & (new >= 0)).all()):
            wrong = new.flatten()[~(torch.isfinite(new) & (new >= 0)).flatten()]
            raise ValueError(
                f'{self.label}: a range must be finite and >= 0, got {wrong[0].item():g}'
                + (f' and {len(wrong) - 1} more' if len(wrong) > 1 else '')
            )
        with torch.no_grad():
            self._amax.copy_(new.reshape(self._amax.shape))
        self._calibrated = True
        self.equals.clear()

    def forget(self) -> None:
        """Drops the range: the quantizer is uncalibrated again."""
        if self._amax is not None:
            with torch.no_grad():
                self._amax.fill_(float('nan'))
            self._calibrated = False
            self.equals.clear()

    @property
    def calibrated(self) -> bool:
        """True when a finite range is set or loaded."""
        return self._calibrated

    @property
    def mode(self) -> str:
        """``'float'``, ``'observe'`` or ``'quant'``, as the library's switches say.

        Setting ``'float'`` is ``disable()``, which here ``enable_quant()`` ends, too.
        """
        if self._disabled or self.float_reason is not None:
            return 'float'
        if self._if_calib:
            return 'observe'
        return 'quant' if self._if_quant else 'float'

    @mode.setter
    def mode(self, mode: str) -> None:
        check_mode(mode)
        self.switches = mode == 'float', mode == 'observe', mode != 'observe', mode == 'float'

    def keep_float(self, reason: str) -> None:
        """Makes this quantizer an identity for good.

        Args:
            reason: Why; shown when the model is printed.
        """
        self.float_reason = reason
        self._amax = None
        self._calibrated = False
        self.equals.clear()
        self.mode = 'float'

    def learn(self) -> None:
        """Makes the range a parameter that an optimizer trains; its key stays as it is."""
        if self.float_reason is None and not self.learned:
            amax = self._amax
            del self._amax
            self._amax = nn.Parameter(amax)
            self.equals.clear()

    @property
    def learned(self) -> bool:
        """True when the range is a parameter."""
        return isinstance(self._amax, nn.Parameter)

    def forward(self, x: Any) -> Tensor:
        """Quantizes, observes or passes ``x``, by mode.

        Args:
            x: Floating tensor of any shape; or, while compiling, one that is quantized already.

        Returns:
            Tensor of the shape and dtype of ``x``; ``x`` itself in modes float and observe.

        Raises:
            UncalibratedError: In mode quant without a range.
        """
        if isinstance(x, Rounded):
            return x.value
        mode = self.mode
        if mode == 'float':
            return x
        if mode == 'observe':
            if self._calibrator is not None:
                self._calibrator.collect(x)
            return x
        if not self._calibrated:
            raise UncalibratedError([self.label], _IF_OTHERS_HAVE)
        if self.use_fb_fake_quant and torch.onnx.is_in_onnx_export():  # the library's own export
            return self._fb_fake_quant(x, self._amax.clamp(min=MIN_AMAX))
        # Compilers join roundings by one tensor, not by tensors of one value.
        equals = self.equals if compiling() else ()
        return quantize(x, equals[0]._amax if equals else self._amax, self.spec)

    @property
    def grid(self) -> Grid | None:
        """Key that is equal for two quantizers iff one may stand in for the other.

        None (never shared) if not in mode quant or uncalibrated, and where
        :func:`~mmdet3d_quant.core.joined.grid_of` says so: per channel, for an inference tensor,
        while tracing or compiling. A learned range is equal to itself only.
        """
        if self.mode != 'quant' or not self._calibrated:
            return None
        return grid_of(self._amax, self.spec)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        """Moves or casts like any module, but never to fewer bits: FP16 ends at 65504."""
        amax = None if self._amax is None else self._amax.detach()
        super()._apply(fn, *args, **kwargs)
        if amax is not None and self._amax.element_size() < min(4, amax.element_size()):
            self._amax.data = amax.to(self._amax.device)
        return self

    def extra_repr(self) -> str:
        """One line for ``print(model)``: grid, range and mode, or why the layer is float."""
        if self.float_reason is not None:
            return f'float: {self.float_reason}'
        grid = 'per-tensor' if self.spec.axis is None else f'axis={self.spec.axis}'
        amax = self._short_amax() if self._calibrated else 'uncalibrated'
        return f'{self.spec.format.name} {grid} amax={amax} mode={self.mode}'

    def _load_from_state_dict(
        self,
        state_dict,
        prefix,
        local_metadata,
        strict,
        missing_keys,
        unexpected_keys,
        error_msgs,
    ):
        """Loads ``_amax`` on whatever device it lives, and notes whether it is a range.

        One of another shape, or of FP8 where this is none and the other way round, is an error of
        the loader; lenient loaders go on, and then there is no range.
        """
        errors = len(error_msgs)
        # Past TensorQuantizer's own loader: it calls `.cuda()`.
        super(TensorQuantizer, self)._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        key = prefix + '_amax'
        if key not in state_dict:
            return
        if self._amax is None:
            if key in unexpected_keys:
                unexpected_keys.remove(key)
            return
        if len(error_msgs) == errors and self._is_range():
            told = local_metadata.get('version', self._version)  # without metadata nothing is told
            # Numbers other than 1 are of layouts of weights.
            if (told == FP8.name) != (self._version == FP8.name):
                of = FP8.name if told == FP8.name else 'integers'
                error_msgs.append(
                    f'format mismatch for {key}: calibrated for {of}, and this quantizer is '
                    f'{self.spec.format.name}. Build the model with `format` as it was calibrated, '
                    'or calibrate again'
                )
        if len(error_msgs) > errors:
            with torch.no_grad():
                self._amax.fill_(float('nan'))
        self._calibrated = self._is_range()
        self.equals.clear()

    def _is_range(self) -> bool:
        return bool((torch.isfinite(self._amax) & (self._amax >= 0)).all())
