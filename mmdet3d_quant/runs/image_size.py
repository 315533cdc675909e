"""The size of the images that a config's model gets, from its pipelines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from mmdet3d_quant.core.naming import type_name

#: Where pipelines are, those of evaluation first, and keys that hold sizes in their steps.
_LOADERS = ('test_dataloader', 'val_dataloader', 'train_dataloader')
#: Keys of steps: (height, width), or (width, height).
_HEIGHT_FIRST, _WIDTH_FIRST = ('final_dim', 'crop_size'), ('scale', 'img_scale')
#: Sizes of the images as the sensors give them, by data set: height, width.
_SENSORS = {
    'KittiDataset': (375, 1242),
    'NuScenesDataset': (900, 1600),
    'SUNRGBDDataset': (530, 730),
}


def image_size(cfg: Mapping[str, Any]) -> tuple[int, int] | None:
    """Reads the height and width of a config's images after preprocessing.

    The first step of a pipeline that names a size decides, else the data set; the size is padded
    as the data preprocessor pads.

    Args:
        cfg: A whole config.

    Returns:
        Height and width; None if nothing tells.
    """
    size = next((s for s in map(_size, _steps(cfg)) if s is not None), None)
    if size is None:
        size = next((_SENSORS[n] for n in _datasets(cfg) if n in _SENSORS), None)
    if size is None:
        return None
    divisor = (cfg['model'].get('data_preprocessor') or {}).get('pad_size_divisor', 1)
    height, width = (math.ceil(side / divisor) * divisor for side in size)
    return height, width


def _size(step: Mapping[str, Any]) -> tuple[int, int] | None:
    for key in (*_HEIGHT_FIRST, *_WIDTH_FIRST):
        value = step.get(key)
        value = value[-1] if isinstance(value, (list, tuple)) and _is_pair(value[-1]) else value
        if _is_pair(value):
            assert value is not None
            a, b = (int(side) for side in value)
            return (b, a) if key in _WIDTH_FIRST else (a, b)
    return None


def _is_pair(value: Any) -> bool:
    pair = isinstance(value, (list, tuple)) and len(value) == 2
    return pair and all(isinstance(side, (int, float)) and side > 8 for side in value)


def _steps(cfg: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """All steps of all pipelines, those inside of others, too."""
    for name in _LOADERS:
        yield from _nested((cfg.get(name) or {}).get('dataset') or {})


def _nested(value: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, Mapping):
        if 'type' in value:
            yield value
        for item in value.values():
            yield from _nested(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _nested(item)


def _datasets(cfg: Mapping[str, Any]) -> Iterator[str]:
    for name in _LOADERS:
        for part in _nested((cfg.get(name) or {}).get('dataset') or {}):
            yield type_name(part.get('type'))
