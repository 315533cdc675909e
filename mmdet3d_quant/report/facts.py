"""The numbers of a report, as plain values that JSON takes."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from mmdet3d_quant.core.coverage import coverage
from mmdet3d_quant.core.modes import quantizers
from mmdet3d_quant.core.ties import ties
from mmdet3d_quant.data.evaluation import Scores, bootstrap
from mmdet3d_quant.files.plain import finite_or_none
from mmdet3d_quant.layers.base import QuantLayer
from mmdet3d_quant.runs.provenance import provenance

#: Names that people know -> those of the devkit.
ERRORS = {
    'mATE': 'trans_err',
    'mASE': 'scale_err',
    'mAOE': 'orient_err',
    'mAVE': 'vel_err',
    'mAAE': 'attr_err',
}
ENGINES = ('onnx', 'onnxruntime', 'openvino')
CPUINFO = Path('/proc/cpuinfo')


def score_facts(scores: Scores) -> dict[str, Any]:
    """Extracts the scores that the page shows.

    Returns:
        ``mAP``, ``NDS``, the five mean errors (None where the metric has none) and ``ap`` by class.
    """
    errors = {name: finite_or_none(scores.errors[key]) for name, key in ERRORS.items()}
    ap = {name: float(value) for name, value in scores.ap.items()}
    return dict(mAP=float(scores.mAP), NDS=float(scores.NDS), **errors, ap=ap)


def data_facts(scores: Scores) -> dict[str, Any]:
    """Counts frames, sceneries and boxes of the validation set.

    Returns:
        ``frames``, ``scenery`` (groups of frames that show the same objects) and ``boxes`` by
        class.
    """
    boxes = {name: int(of[0].positives.sum()) for name, of in scores.matches.items()}
    return dict(frames=len(scores.clusters), scenery=int(scores.clusters.max()) + 1, boxes=boxes)


def difference_facts(
    scores: Mapping[str, Scores], draws: int = 1000, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Computes each model's difference in mAP to the first, with its interval under resampling.

    Args:
        scores: By model, on the same frames; the reference first.
        draws: Resampled validation sets.
        seed: Seed of the draws.

    Returns:
        Dict by model, without the first: ``difference``; ``low`` and ``high``, its 2.5 % and 97.5 %
        quantiles on resampled sets; ``scenery``, the number of groups of frames to draw from.
    """
    reference, *others = scores
    drawn = bootstrap(list(scores.values()), draws, seed)
    scenery = int(scores[reference].clusters.max()) + 1
    result = {}
    for row, name in enumerate(others, 1):
        low, high = np.quantile(drawn[row] - drawn[0], (0.025, 0.975))
        difference = scores[name].mAP - scores[reference].mAP
        result[name] = dict(
            difference=float(difference), low=float(low), high=float(high), scenery=scenery
        )
    return result


def calibration_facts(
    model: Any, calibration: Mapping[str, Any], macs: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Collects the numbers of quantizers, scale groups and float layers of a calibrated model.

    Args:
        model: The calibrated model.
        calibration: ``method``, ``num_batches`` and ``loader`` of the checkpoint's ``meta``.
        macs: Multiply-accumulates by layer, which the ``meta`` has, too.

    Returns:
        Dict of the entries of ``calibration``, the counts of quantizers, ``groups`` that share a
        scale, ``kept_float`` with reasons, and ``coverage``, how much of the model is quantized.
    """
    by_name = quantizers(model)
    active = {n: q for n, q in by_name.items() if q.float_reason is None}
    weights = sum(n.endswith('_weight_quantizer') for n in active)
    return dict(
        calibration,
        activation_quantizers=len(active) - weights,
        weight_quantizers=weights,
        groups=[list(group) for group in ties(model)],
        kept_float={n: q.float_reason for n, q in by_name.items() if q.float_reason is not None},
        coverage=coverage(model, macs).plain(),
    )


def weight_bytes(model: Any) -> dict[str, int]:
    """Counts the bytes of the quantized layers' weights: 4 per weight in float, 1 in INT8."""
    count = sum(
        m.weight.numel()
        for m in model.modules()
        if isinstance(m, QuantLayer) and m._weight_quantizer.float_reason is None
    )
    return dict(float=4 * count, int8=count)


def provenance_facts(cfg: Any, checkpoint: str | Path, command: str) -> dict[str, Any]:
    """Collects config, checkpoint, versions of packages, command line and machine."""
    origin = provenance(cfg, checkpoint)
    versions = dict(origin['versions'])
    for name in ENGINES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return dict(
        config=origin.get('config'),
        checkpoint=origin['source_checkpoint'],
        command=command,
        versions=versions,
        machine=machine_facts(),
    )


def machine_facts() -> dict[str, Any]:
    """Reads processor, INT8 instructions and number of cores, as far as the system tells them."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.is_file() else []
    fields = dict(
        (key.strip(), value.strip()) for key, _, value in (line.partition(':') for line in lines)
    )
    flags = fields.get('flags', '').split()
    return dict(
        system=platform.platform(),
        python=platform.python_version(),
        processor=fields.get('model name') or platform.processor() or platform.machine(),
        int8_instructions=[f for f in ('avx_vnni', 'avx512_vnni', 'amx_int8') if f in flags],
        cores=os.cpu_count(),
    )
