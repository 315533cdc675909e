"""Frames whose values are out of all proportion, by name."""

from __future__ import annotations

from mmdet3d_quant.calibration import CalibratedRange, Calibration
from mmdet3d_quant.jobs.share import Batches


def outliers(result: Calibration, batches: Batches) -> list[str]:
    """Names the frames whose largest values leave a quantizer little for all others.

    Args:
        result: A calibration.
        batches: Indices into the data set by number of the batch.

    Returns:
        List of str, a sentence per batch.
    """
    by_batch: dict[int, list[CalibratedRange]] = {}
    for r in result.ranges:
        if r.largest_in is not None and {'lost', 'unsteady'} & set(r.health.flags):
            by_batch.setdefault(r.largest_in, []).append(r)
    return [
        f'batch {number} (frames {", ".join(map(str, batches[number]))} of the data set) has the '
        f'largest values of {len(ranges)} odd quantizer(s): up to {ranges[0].largest:.4g} in '
        f'{ranges[0].name}; look at these frames'
        for number, ranges in sorted(by_batch.items())
    ]
