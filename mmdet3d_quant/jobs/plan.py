"""Reads the plan of a calibration from a config and from what a caller adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmengine.config import Config

from mmdet3d_quant.calibration import Plan
from mmdet3d_quant.runs.from_config import ConfigError


def read_plan(cfg: Config, methods: Sequence[str] = (), weights: str | None = None) -> Plan:
    """Reads the plan of a config, then what a caller adds.

    Args:
        cfg: The config; its ``calibration`` may hold ``method``, ``overrides`` and ``weights``.
        methods: They follow those of the config.
        weights: Instead of the config's.

    Raises:
        ConfigError: If the config's ``calibration`` has an unknown entry.
        ValueError: If a method is unknown.
    """
    own = cfg.get('calibration') or {}
    overrides = own.get('overrides') or {} if isinstance(own, Mapping) else None
    if not isinstance(overrides, Mapping):
        raise ConfigError(
            f'{cfg.filename}: `calibration` and its `overrides` must be dicts, got {own!r}'
        )
    own = {key: value for key, value in own.items() if key != 'overrides'}
    texts = [own.pop('method', 'mse')]
    texts += [f'{pattern}={method}' for pattern, method in overrides.items()]
    default = own.pop('weights', None)
    for key in ('recipe', 'steps'):  # see steps.py
        own.pop(key, None)
    if own:
        raise ConfigError(
            f'{cfg.filename}: `calibration` has unknown entries {", ".join(own)}; it takes method, '
            'overrides, weights, recipe and steps'
        )
    return Plan.parse([*texts, *methods], default if weights is None else weights)
