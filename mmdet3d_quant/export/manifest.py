"""Entries of the manifest of an exported folder: its graphs and scales."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import onnx
from torch import nn

from mmdet3d_quant.core.formats import UINT8
from mmdet3d_quant.core.modes import quantizers
from mmdet3d_quant.core.quantizer import Quantizer
from mmdet3d_quant.core.ties import ties
from mmdet3d_quant.core.unsigned import unsigned_amax
from mmdet3d_quant.export.graph import opset
from mmdet3d_quant.export.pairs import ExportError, count_pairs, stored_names
from mmdet3d_quant.files.outputs import whole

#: Name of the file in an exported folder.
MANIFEST = 'manifest.json'
_DTYPES = onnx.TensorProto.DataType


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Reads the manifest of a folder of exported files.

    Returns:
        dict as ``export_suite`` wrote it; ``files`` has a dict per file.

    Raises:
        ExportError: If it is missing or damaged.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ExportError(f'{path} does not exist; make the folder with tools/export_onnx.py')
    try:
        manifest = json.loads(path.read_text())
        files = {name: dict(entry) for name, entry in dict(manifest['files']).items()}
    except (KeyError, TypeError, ValueError) as err:
        raise ExportError(f'{path} is damaged ({err!r}); export again') from None
    return dict(manifest, files=files)


def add_to_manifest(folder: str | Path, **entries: Any) -> None:
    """Adds entries to the manifest of a folder.

    Args:
        folder: As ``export_suite`` wrote it.
        **entries: Plain values by key; those of the same keys are replaced.

    Raises:
        ExportError: If the manifest is missing or damaged.
    """
    manifest = dict(read_manifest(folder), **entries)
    with whole(Path(folder) / MANIFEST) as part:
        part.write_text(json.dumps(manifest, indent=2) + '\n')


def describe_graph(model: onnx.ModelProto) -> dict[str, Any]:
    """Describes a graph: inputs and outputs with shapes and types, opset, node counts."""

    def tensors(values: Any) -> dict[str, Any]:
        return {
            v.name: dict(
                shape=[d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim],
                dtype=_DTYPES.Name(v.type.tensor_type.elem_type).lower(),
            )
            for v in values
        }

    kinds: dict[str, int] = {}
    for node in model.graph.node:
        if node.op_type != 'Constant':
            kinds[node.op_type] = kinds.get(node.op_type, 0) + 1
    return dict(
        inputs=tensors(model.graph.input),
        outputs=tensors(model.graph.output),
        opset=opset(model),
        nodes=kinds,
    )


def describe_pairs(model: onnx.ModelProto, module: nn.Module) -> dict[str, Any]:
    """Counts the quantizers of a module and those of them that its file rounds with.

    Args:
        model: The file.
        module: What was exported.

    Returns:
        ``quantizers``, a dict: ``active``, how many the module has; ``in_file``, how many of them
        have Q/DQ pairs; ``pairs``, how many pairs, of which a quantizer that is called twice has
        two; ``unused``, the names of those without, on which no output depends.
    """
    active = [n for n, q in quantizers(module).items() if q.float_reason is None]
    there = set((stored_names(model) or {}).values())
    unused = [n for n in active if n not in there]
    counts = dict(active=len(active), in_file=len(there), pairs=count_pairs(model))
    return dict(quantizers=dict(counts, unused=unused))


def describe_scales(model: nn.Module, unsigned: Collection[int] = ()) -> list[dict[str, Any]]:
    """Lists the activation scales by tie group, single quantizers included.

    Args:
        model: The detector.
        unsigned: Ids of the quantizers that are unsigned in the files.

    Returns:
        Entries with ``scale`` (step size), ``amax``, ``dtype`` and the names of the
        ``quantizers``, in the order of the model; ``known`` tells where a range comes from that is
        not of data.
    """
    ranged = {n: q for n, q in quantizers(model).items() if q.calibrated and q.spec.axis is None}
    group_of = {name: group for group in ties(model) for name in group}
    groups = dict.fromkeys(group_of.get(name, (name,)) for name in ranged)
    return [_describe_scale(ranged[g[0]], list(g), id(ranged[g[0]]) in unsigned) for g in groups]


def _describe_scale(quantizer: Quantizer, names: list[str], unsigned: bool) -> dict[str, Any]:
    amax = unsigned_amax(quantizer) if unsigned else float(quantizer._amax)
    fmt = UINT8 if unsigned else quantizer.spec.format
    scale = float(fmt.step(quantizer._amax.new_tensor(amax)))
    known = quantizer.known
    why = dict(known=known.reason) if known and amax == known.amax else {}
    return dict(scale=scale, amax=amax, dtype=fmt.name, quantizers=names, **why)
