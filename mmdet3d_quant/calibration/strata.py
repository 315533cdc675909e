"""Clipping and SQNR of sparse layers by distance from the sensor.

Most voxels lie near the sensor, so a range that is best for all of them may cut or blur the few
far ones, on which the hard objects depend.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmdet3d_quant.calibration.observe import Forward, run
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.decibels import decibels
from mmdet3d_quant.core.fake_quant import fake_quantize
from mmdet3d_quant.core.modes import evaluating, set_mode
from mmdet3d_quant.layers.base import QuantLayer
from mmdet3d_quant.layers.features import values

#: Bands of the distance from the sensor, and where each ends as a share of the half grid.
BANDS = (('near', 1 / 3), ('middle', 2 / 3), ('far', math.inf))


@dataclass(frozen=True)
class Band:
    """The input of a layer in one band.

    Attributes:
        band: ``'near'``, ``'middle'`` or ``'far'``.
        num_voxels: Active sites in it.
        clipped: Share of their values beyond the range; NaN without sites.
        sqnr: Power of the values over that of their quantization error, dB; infinity without
            error, NaN without sites or with zeros only.
    """

    band: str
    num_voxels: int
    clipped: float
    sqnr: float


@dataclass(frozen=True)
class Strata:
    """One sparse layer.

    Attributes:
        name: Name of its input quantizer in the model.
        amax: Its range.
        bands: Near, middle, far.
    """

    name: str
    amax: float
    bands: tuple[Band, ...]


def by_distance(
    model: nn.Module,
    batch: Any,
    forward: Forward | None = None,
    sensor: Sequence[float] = (0.5, 0.5),
) -> list[Strata]:
    """Measures clipping and SQNR of the inputs of all sparse layers, by distance from the sensor.

    The model runs in float; the inputs are fake-quantized for the measurement only.

    Args:
        model: A calibrated model. Its sparse encoders are the modules with a ``height_axis``.
        batch: Batch to measure on.
        forward: See :func:`mmdet3d_quant.calibrate`.
        sensor: Where the sensor is, as a share of the grid along x and y.

    Returns:
        List of :class:`Strata`, one per quantized sparse layer that ran, in the order of the model.
    """
    sums: dict[str, Tensor] = {}
    layers = dict(_sparse_layers(model))
    if not layers:
        return []
    with set_mode(model, 'float'), evaluating(model), torch.no_grad():
        with _measured(layers, sensor, sums):
            (forward or run)(model, batch)
    strata = []
    for name, (layer, _) in layers.items():
        if name in sums:
            rows = strict_zip(BANDS, sums[name].tolist())
            bands = tuple(_band(band, *row) for (band, _), row in rows)
            strata.append(Strata(name, float(layer._input_quantizer._amax), bands))
    return strata


def _sparse_layers(model: nn.Module) -> Iterator[tuple[str, tuple[QuantLayer, int]]]:
    """Yields the name of each calibrated input quantizer, its layer and the vertical axis."""
    for prefix, encoder in model.named_modules():
        if hasattr(encoder, 'height_axis'):
            for name, layer in encoder.named_modules(prefix=prefix):
                if isinstance(layer, QuantLayer) and layer._input_quantizer.calibrated:
                    yield f'{name}._input_quantizer'.lstrip('.'), (layer, encoder.height_axis)


@contextmanager
def _measured(
    layers: dict[str, tuple[QuantLayer, int]], sensor: Sequence[float], sums: dict[str, Tensor]
) -> Iterator[None]:
    """Hooks layers to add up voxels, values, clipped values, squared error and power per band.

    Args:
        layers: Layers and their vertical axis, by name of the input quantizer.
        sensor: Position of the sensor, as a share of the grid along x and y.
        sums: Gets a float64 tensor (bands, 5) per layer while the model runs.
    """

    def hook_of(name: str, layer: QuantLayer, height_axis: int) -> Any:
        quantizer = layer._input_quantizer

        def hook(module: nn.Module, args: tuple) -> None:
            x = values(args[0])
            band = bands_of(args[0], height_axis, sensor)
            error = fake_quantize(x, quantizer._amax, quantizer.spec) - x
            rows = torch.stack(
                [
                    torch.ones(len(x), device=x.device),
                    torch.full((len(x),), float(x.shape[1]), device=x.device),
                    (x.abs() > quantizer._amax).sum(1),
                    error.double().square().sum(1),
                    x.double().square().sum(1),
                ],
                dim=1,
            ).double()
            total = rows.new_zeros(len(BANDS), rows.shape[1]).index_add_(0, band, rows)
            sums[name] = sums[name] + total if name in sums else total

        return layer.register_forward_pre_hook(hook)

    handles = [hook_of(name, layer, axis) for name, (layer, axis) in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def bands_of(x: Any, height_axis: int, sensor: Sequence[float] = (0.5, 0.5)) -> Tensor:
    """Assigns each active site of a sparse tensor to a band.

    The distance along each axis is a share of that from the sensor to the farther end of the grid.

    Returns:
        int64 (n,), indices into :data:`BANDS`.
    """
    axes = (0, 1) if height_axis == 2 else (2, 1)  # of a grid x, y, z, or else z, y, x
    squares = []
    for axis, origin in strict_zip(axes, sensor):
        place = (x.indices[:, 1 + axis].double() + 0.5) / x.spatial_shape[axis]
        squares.append(((place - origin) / max(origin, 1 - origin)).square())
    distance = torch.stack(squares).sum(0).sqrt()
    ends = distance.new_tensor([end for _, end in BANDS[:-1]])
    return torch.bucketize(distance, ends, right=True)


def _band(
    band: str, voxels: float, count: float, clipped: float, error: float, power: float
) -> Band:
    """Computes a band's measures from its sums."""
    if not count or not power:
        return Band(band, int(voxels), clipped / count if count else math.nan, math.nan)
    return Band(band, int(voxels), clipped / count, decibels(power, error))
