"""Fit of the inputs of sparse layers near the sensor and far from it, for a config's data."""

from __future__ import annotations

from mmengine.config import Config
from torch import nn

from mmdet3d_quant.calibration import Strata, by_distance
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.jobs.share import Share
from mmdet3d_quant.runs import from_config as fc


def strata_of(model: nn.Module, data: Share, cfg: Config) -> list[Strata]:
    """Measures how inputs of sparse layers fit near the sensor and far from it, on one batch.

    Returns:
        One per sparse layer; none for a model without any.
    """
    if not any(hasattr(m, 'height_axis') for m in model.modules()):
        return []
    first = dict(list(data.seen.items())[:1])
    _, batch = next(fc.numbered_batches(data.loader, first))
    return by_distance(model, batch, sensor=sensor_of(cfg))


def sensor_of(cfg: Config) -> tuple[float, float]:
    """Reads where the sensor is in the voxel grid, as a share of it along x and y."""
    own = cfg.model.get('data_preprocessor') or {}
    layers = (own.get(key) or {} for key in ('voxelize_cfg', 'voxel_layer'))
    ranges = [layer['point_cloud_range'] for layer in layers if 'point_cloud_range' in layer]
    if not ranges:
        return 0.5, 0.5
    low, high = ranges[0][:2], ranges[0][3:5]
    x, y = (-a / (b - a) for a, b in strict_zip(low, high))
    return x, y
