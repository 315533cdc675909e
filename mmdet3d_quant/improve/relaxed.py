"""Weights between two numbers of their grid: how far up each is, as a parameter to learn."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

#: Ends of the stretched sigmoid, which reaches 0 and 1.
GAMMA, ZETA = -0.1, 1.1
#: First and last power of the term that pulls to 0 or 1, and the share of steps before it begins.
POWERS, WARM = (20.0, 2.0), 0.2
#: Weights nearer to a number than this, in steps, are on it and stay.
ON_GRID = 1e-3


class Relaxed:
    """The weight of a quantized layer, each value between the two numbers around it.

    Args:
        layer: A calibrated :class:`~mmdet3d_quant.layers.base.QuantLayer` of integers.

    Attributes:
        layer: The layer.
        up: What is learned: before a stretched sigmoid how far up each weight is.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        quantizer = layer._weight_quantizer
        weight = layer.weight.detach().float()
        self._most = quantizer.spec.format.qmax
        self._step = quantizer.spec.format.step(quantizer.amax.to(weight.device))
        self._steps = (weight * (1 / self._step)).clamp(-self._most, self._most)
        nearest = self._steps.round()
        self._fixed = (self._steps - nearest).abs() < ON_GRID
        self._below = torch.where(self._fixed, nearest, self._steps.floor())
        part = ((self._steps - self._below - GAMMA) / (ZETA - GAMMA)).clamp(1e-4, 1 - 1e-4)
        self.up = torch.log(part / (1 - part)).requires_grad_()

    def share(self) -> Tensor:
        """Computes how far up each weight is, in [0, 1]; its shape is the weight's."""
        share = (torch.sigmoid(self.up) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
        return share.masked_fill(self._fixed, 0)

    def soft(self) -> Tensor:
        """Computes the weight, with gradient."""
        return ((self._below + self.share()) * self._step).to(self.layer.weight.dtype)

    def undecided(self, power: float) -> Tensor:
        """Computes ``1 - |2 share - 1| ** power``: 0 where a weight is on a number."""
        return (1 - (2 * self.share() - 1).abs().pow(power)).masked_fill(self._fixed, 0)

    def ups(self) -> Tensor:
        """Tells which weights are nearer to the number above; bool, of the weight's shape."""
        return self.share().detach() >= 0.5

    def nearest(self) -> Tensor:
        """Tells which weights rounding to nearest takes up; bool, of the weight's shape."""
        return self._steps.round() > self._below

    def starts(self) -> list[Tensor]:
        """Lists roundings: the one learned, to nearest, all down, all up.

        Returns:
            bool, of the weight's shape, whether each weight is on the number above.
        """
        down = torch.zeros_like(self._fixed)
        return [self.ups(), self.nearest(), down, ~self._fixed]

    def grid(self) -> tuple[Tensor, Tensor, Tensor]:
        """Lists the numbers below the weights, in steps, the steps, and which weights may move.

        Returns:
            Tensors that broadcast to the weight's shape; the last is bool.
        """
        return self._below, self._step, ~self._fixed

    def choose(self, ups: Tensor) -> None:
        """Sets which weights are on the number above.

        Args:
            ups: bool, of the weight's shape.
        """
        with torch.no_grad():
            self.up.copy_(torch.where(ups, 10.0, -10.0))

    def rounded(self) -> Tensor:
        """Computes the weight on the nearer of its two numbers."""
        number = self._below + self.ups()
        return (number.clamp(-self._most, self._most) * self._step).to(self.layer.weight.dtype)

    def flipped(self) -> float:
        """Computes the share of the weights that are not rounded to nearest."""
        return float((self.ups() != self.nearest()).double().mean())


def exponent(step: int, steps: int) -> float | None:
    """Computes the power of :meth:`Relaxed.undecided` in a step; None while it is left out."""
    start = math.ceil(WARM * steps)
    if step < start:
        return None
    first, last = POWERS
    done = (step - start) / max(1, steps - start)
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * done))
