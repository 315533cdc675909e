"""The quantizer: fake-quantizes one tensor with a calibrated range."""

from __future__ import annotations

from typing import Any, Tuple

import torch
from pytorch_quantization.nn import TensorQuantizer
from pytorch_quantization.tensor_quant import QuantDescriptor
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from mmdet3d_quant.core.errors import QuantError
from mmdet3d_quant.core.fake_quant import compiling, fake_quantize
from mmdet3d_quant.core.spec import QuantSpec, check_mode

HOW_TO_CALIBRATE = (
    'Calibrate first: `python tools/calibrate.py CONFIG CHECKPOINT --out FILE` and load FILE, '
    'or `mmdet3d_quant.calibrate(model, batches)`. To run the model unquantized: '
    "`mmdet3d_quant.set_mode(model, 'float')`."
)


Grid = Tuple[QuantSpec, Any]
#: Of rounded tensors: their version then, and the grid.
_marks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class UncalibratedError(QuantError):
    """A quantizer without a range was asked to quantize or to be exported.

    Attributes:
        names: The quantizers concerned.
    """

    def __init__(self, names: list[str]):
        self.names = names
        shown = '\n  '.join(names[:20]) + (f'\n  ... {len(names) - 20} more' if names[20:] else '')
        super().__init__(
            f'{len(names)} quantizer(s) have no calibrated range:\n  {shown}\n{HOW_TO_CALIBRATE}'
        )


class Quantizer(TensorQuantizer):
    """pytorch-quantization's ``TensorQuantizer`` that always knows whether it is calibrated.

    The range lives in the buffer ``_amax``, present from the start and NaN until calibrated, so
    that the keys of a state dict do not depend on the history of the model, and loading works on
    any device. A quantizer kept float has no buffer and ignores one in a checkpoint. After
    :meth:`learn` the range is a parameter of the same name.

    Args:
        spec: The grid.
        channels: Number of ranges along ``spec.axis``; needed when an axis is given.
        ndim: Number of dimensions of the tensor; ``_amax`` then has shape
            ``(1, ..., channels, ..., 1)``, as in pytorch-quantization.
        label: How errors name this quantizer until the model that contains it is known.
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
        spec = spec or QuantSpec()
        super().__init__(QuantDescriptor(num_bits=spec.num_bits, axis=spec.axis))
        self._calibrator = None
        self.spec = spec
        self.label = label
        self.float_reason: str | None = None
        shape = [channels if i == spec.axis else 1 for i in range(ndim)]
        self.register_buffer('_amax', torch.full(shape, float('nan')))
        self._calibrated = False
        #: The range when it was last read, its place, version and value.
        self._read: tuple[Tensor, int, int, float] | None = None
        #: A tensor that the range covers, mostly the weight; the range; the versions of both.
        self._covered: tuple[Tensor, Tensor, int, int] | None = None

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
            raise ValueError(f'{self.label}: a range must be finite and >= 0, got {new.flatten()}')
        with torch.no_grad():
            self._amax.copy_(new.reshape(self._amax.shape))
        self._calibrated = True

    @property
    def calibrated(self) -> bool:
        """True when a finite range is set or loaded."""
        return self._calibrated

    @property
    def mode(self) -> str:
        """``'float'``, ``'observe'`` or ``'quant'``."""
        if self._disabled:
            return 'float'
        return 'observe' if self._if_calib else 'quant'

    @mode.setter
    def mode(self, mode: str) -> None:
        check_mode(mode)
        self._disabled = mode == 'float' or self.float_reason is not None
        self._if_calib = mode == 'observe'
        self._if_quant = mode == 'quant'

    def keep_float(self, reason: str) -> None:
        """Makes this quantizer an identity for good.

        Args:
            reason: Why; shown when the model is printed.
        """
        self.float_reason = reason
        self._amax = None
        self._calibrated = False
        self.mode = 'float'

    def learn(self) -> None:
        """Makes the range a parameter that an optimizer trains; its key stays as it is."""
        if self.float_reason is None and not self.learned:
            amax = self._amax
            del self._amax
            self._amax = nn.Parameter(amax)

    @property
    def learned(self) -> bool:
        """True when the range is a parameter."""
        return isinstance(self._amax, nn.Parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Quantizes, observes or passes ``x``, by mode.

        Args:
            x: Floating tensor of any shape.

        Returns:
            Tensor of the shape and dtype of ``x``; ``x`` itself in modes float and observe.

        Raises:
            UncalibratedError: In mode quant without a range.
        """
        if self._disabled:
            return x
        if self._if_calib:
            if self._calibrator is not None:
                self._calibrator.collect(x)
            return x
        if not self._calibrated:
            raise UncalibratedError([self.label])
        if compiling():  # nothing is noted there
            return fake_quantize(x, self._amax, self.spec)
        if self._covers(x):
            return fake_quantize(x, self._amax, self.spec, inside=True)
        grid = self.grid
        if grid is not None and _grid_of(x) == grid:
            return x
        return self._on_grid(x, grid)

    def rectified(self, x: Tensor) -> Tensor:
        """What the quantizer gives for ``relu(x)``, in one pass over memory; in mode quant."""
        return self._on_grid(x, self.grid, rectify=True)

    @property
    def grid(self) -> Grid | None:
        """What it rounds to: quantizers of equal grids round alike.

        A learned range equals no other, since it wants a gradient of its own. None where it does
        not round, has a range per channel or one without a version (made in inference mode), and
        in traced or compiled code, which shall show every quantizer.

        Reading a range on a GPU waits for it: that is done once for every change, as far as the
        version of the tensor tells (so not of one through ``.data``).
        """
        if compiling() or torch.jit.is_tracing():
            return None
        if self.mode != 'quant' or not self._calibrated or self._amax.numel() > 1:
            return None
        if self._amax.is_inference():  # which has no version
            return None
        if self.learned:
            return self.spec, (id(self), self._amax._version)
        if self._amax.is_cpu:
            return self.spec, self._amax.item()
        now = self._amax.data_ptr(), self._amax._version
        if self._read is None or self._read[0] is not self._amax or self._read[1:3] != now:
            self._read = (self._amax, *now, self._amax.item())
        return self.spec, self._read[3]

    def mark(self, x: Tensor) -> None:
        """Notes that the values of a tensor are on the grid already, so that it may pass.

        Holds for this tensor, not for what is made of it, copies included, nor for what becomes
        of it in place, as far as its version tells: writes through ``.data`` and collectives of
        torch.distributed leave that as it is.
        """
        _mark(x, self.grid)

    def cover(self, x: Tensor) -> None:
        """Notes that nothing in a tensor is beyond the range, until a version of either changes.

        Args:
            x: What will be quantized, for which the caller has made sure of that.
        """
        self._covered = x, self._amax, x._version, self._amax._version

    def _covers(self, x: Tensor) -> bool:
        if self._covered is None or self._covered[0] is not x:
            return False
        _, amax, *versions = self._covered
        return amax is self._amax and versions == [x._version, amax._version]

    def __getstate__(self) -> dict[str, Any]:
        """Without what was noted: a copy counts versions anew."""
        return {**self.__dict__, '_read': None, '_covered': None}

    def _on_grid(self, x: Tensor, grid: Grid | None, rectify: bool = False) -> Tensor:
        value = None if grid is None or self.learned else grid[1]
        y = fake_quantize(x, self._amax, self.spec, rectify, value)
        _mark(y, grid)
        return y

    def extra_repr(self) -> str:
        """One line for ``print(model)``: grid, range and mode, or why the layer is float."""
        if self.float_reason is not None:
            return f'float: {self.float_reason}'
        grid = 'per-tensor' if self.spec.axis is None else f'axis={self.spec.axis}'
        amax = self._short_amax() if self._calibrated else 'uncalibrated'
        return f'int{self.spec.num_bits} {grid} amax={amax} mode={self.mode}'

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
        """Loads ``_amax`` on whatever device it lives, and notes whether it is a range."""
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
        amax = state_dict[key]
        self._calibrated = bool((torch.isfinite(amax) & (amax >= 0)).all())


def _mark(x: Tensor, grid: Grid | None) -> None:
    if grid is not None and not x.is_inference():  # which has no version
        _marks[x] = x._version, grid


def _grid_of(x: Tensor) -> Grid | None:
    """The grid that a tensor is marked to be on."""
    if x.is_inference():
        return None
    version, grid = _marks.get(x, (None, None))
    return grid if version == x._version else None
