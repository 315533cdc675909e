"""What the demo finds out, as plain values: boxes on disk, the speed of files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mmdet3d.structures import LiDARInstance3DBoxes
from mmengine.structures import InstanceData

from mmdet3d_quant.engines import OpenVINO, latency
from mmdet3d_quant.export.deploy import engine_files
from mmdet3d_quant.files.outputs import whole

RUNS, THREADS = 30, 2


def save_boxes(results: list[dict[str, Any]], path: Path) -> None:
    """Writes detections as plain tensors."""
    rows = []
    for sample in results:
        found = sample['pred_instances_3d']
        tensors = (found.bboxes_3d.tensor, found.scores_3d, found.labels_3d)
        rows.append((sample['sample_idx'], *tensors))
    with whole(path) as part:
        torch.save(rows, part)


def load_boxes(path: Path) -> list[dict[str, Any]]:
    """Reads what :func:`save_boxes` wrote, as ``evaluation.predict`` returns it."""
    results = []
    for index, boxes, scores, labels in torch.load(path, weights_only=True):
        found = InstanceData(
            bboxes_3d=LiDARInstance3DBoxes(boxes, box_dim=boxes.shape[1]),
            scores_3d=scores,
            labels_3d=labels,
        )
        results.append(dict(sample_idx=index, pred_instances_3d=found))
    return results


def measure(inputs: dict[str, torch.Tensor], folders: dict[str, Path]) -> dict[str, Any]:
    """Speed of the files, as the report takes it.

    Args:
        inputs: By the names that the files give them.
        folders: ``float`` and ``int8``, with files of the same names.

    Returns:
        ``latency`` (seconds per file and precision), ``engine`` (how they were measured) and
        ``int8_convolutions`` (those that run in INT8, and all, per file).
    """
    times: dict[str, dict[str, float]] = {}
    convolutions = {}
    for path in engine_files(folders['int8']):
        times[path.name] = {}
        for name, folder in folders.items():
            engine = OpenVINO(folder / path.name, THREADS)
            arrays = {n: inputs[n].numpy() for n in engine.input_names}
            times[path.name][name] = latency(engine, arrays, RUNS)
            if name == 'int8':
                convolutions[path.name] = engine.int8_convolutions()
    told = f'OpenVINO, {THREADS} threads, median of {RUNS} runs'
    return dict(latency=times, engine=told, int8_convolutions=convolutions)
