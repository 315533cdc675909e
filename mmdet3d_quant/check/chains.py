"""A detector of mmdet3d whose chains of modules run in an engine; the rest stays in torch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmdet3d_quant.check.parts import EnginePart
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.engines import Engine
from mmdet3d_quant.export.families import CENTER, Chain, ChainModule, chains_of, head_outputs
from mmdet3d_quant.export.onnx import ExportError


def chain_detector(
    detector: nn.Module, folder: str | Path, engine: Callable[[Path], Engine]
) -> nn.Module:
    """Copies a detector with its exported chains run by an engine.

    Args:
        detector: A detector of a family of ``export.families``; left unchanged.
        folder: Its files, from ``export_suite``.
        engine: Constructor of the engine, from a file.

    Returns:
        A detector of the same type.

    Raises:
        ExportError: If a file is missing.
    """
    result: Any = copy.deepcopy(detector)
    for chain in chains_of(result):
        path = Path(folder) / f'{chain.name}.onnx'
        if not path.is_file():
            raise ExportError(f'{path} does not exist; make it with tools/export_onnx.py')
        _replace(result, chain, EnginePart(engine(path), str(path)))
    return result


def _replace(detector: Any, chain: Chain, part: EnginePart) -> None:
    """Puts the engine in the place of the first module of a chain; the others hand on."""
    names = ChainModule(detector, chain).names
    for name in names[1:]:
        if not name.endswith('head'):
            setattr(detector, name, nn.Identity())
    setattr(detector, names[0], _First(part, chain.source))
    if names[-1].endswith('head'):
        head = getattr(detector, names[-1])
        head.forward = lambda outputs: restored(head, outputs[0])


class _First(nn.Module):
    """The file of a chain: from its input to a list of features, or of one dict of predictions."""

    def __init__(self, part: EnginePart, source: str) -> None:
        super().__init__()
        self.part, self.source = part, source

    def forward(self, x: Tensor) -> list[Any]:
        outputs = self.part(**{self.source: x})
        features = [n for n in outputs if n.startswith('feature')]
        return [outputs[n] for n in sorted(features, key=len)] if features else [outputs]


def restored(head: Any, outputs: Mapping[str, Tensor]) -> Any:
    """Puts predictions back into the form that ``forward`` of a head returns.

    Args:
        head: A head of ``export.families.HEADS``.
        outputs: Its predictions by name.
    """
    names = head_outputs(head) or ()
    levels = len({names[0].format(i) for i in range(len(outputs))} & set(outputs))
    lists = [[outputs.get(name.format(i)) for i in range(levels)] for name in names]
    if hasattr(head, 'task_heads'):
        return _tasks(head, dict(strict_zip(names, lists)), levels)
    return lists


def _tasks(head: Any, joined: Mapping[str, Any], levels: int) -> list[list[dict[str, Tensor]]]:
    """Splits the predictions of a ``CenterHead`` by task."""
    at = {name: [0] * levels for name in joined}
    tasks = []
    for task in head.task_heads:
        regressions = getattr(task, 'task_head', task)  # apart where convolutions deform
        layers = {k: getattr(regressions, k) for k in regressions.heads if hasattr(regressions, k)}
        layers.update(heatmap=task.cls_head if hasattr(task, 'cls_head') else task.heatmap)
        sizes = {key: layer[-1].out_channels for key, layer in layers.items()}
        found: list[dict[str, Tensor]] = [{} for _ in range(levels)]
        for name, keys in CENTER.items():
            for key in (k for k in keys if k in sizes):
                for i in range(levels):
                    start = at[name][i]
                    at[name][i] = start + sizes[key]
                    found[i][key] = joined[name][i][:, start : at[name][i]]
        tasks.append(found)
    return tasks
