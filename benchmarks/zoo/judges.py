"""What is judged of one model: shares, float mode, reload, files, engines, linter, compiler."""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import helper
from torch import Tensor, nn

import mmdet3d_quant as mq
from mmdet3d_quant.check.ladder import LAYER_DB, climb
from mmdet3d_quant.check.lint import layers, lint, read_graph
from mmdet3d_quant.core.coverage import Coverage
from mmdet3d_quant.core.macs import counting
from mmdet3d_quant.core.modes import float_state_dict
from mmdet3d_quant.core.ties import unequal_ties
from mmdet3d_quant.engines import make_engine
from mmdet3d_quant.engines.deformable import is_deformable, to_onnx_names
from mmdet3d_quant.engines.tensorrt_rtx import compile_onnx
from mmdet3d_quant.export import Cut, detector_cuts, export_onnx
from mmdet3d_quant.export.examples import sparse_encoder
from mmdet3d_quant.export.graph import custom_ops
from mmdet3d_quant.files.typed import tensor_types
from zoo.inputs import run, voxels

ENGINES = ('onnxruntime', 'openvino')
#: Types of layers that no engine runs in INT8.
DEFORMABLE = ('DeformConv2d', 'ModulatedDeformConv2d')


@torch.no_grad()
def count(detector: nn.Module, full: dict[str, Tensor], small: dict[str, Tensor]) -> dict[str, int]:
    """Multiply-accumulates by layer, at full size where modules take tensors without values."""
    with mq.set_mode(detector, 'float'):
        shapes = copy.deepcopy(detector)
        with counting(shapes) as dense:
            try:
                run(shapes.to('meta'), {n: x.to('meta') for n, x in full.items()}, encode=False)
            except (NotImplementedError, RuntimeError):  # a deformable convolution, say
                dense.macs.clear()
        if not dense.macs:
            with counting(detector) as dense:
                run(detector, small, encode=False)
        encoder = sparse_encoder(detector)
        with counting(detector) as sparse:
            if encoder is not None:
                encoder(*voxels(encoder), 1)
    return {**dense.macs, **sparse.macs}


def share_without_deformable(detector: nn.Module, found: Coverage) -> float:
    """Share of the work in INT8, of all that is no deformable convolution itself."""
    kinds = {n: {c.__name__ for c in type(m).__mro__} for n, m in detector.named_modules()}
    plain = [k for k in found.layers if not kinds[k.name].intersection(DEFORMABLE)]
    total = sum(layer.macs or 0 for layer in plain)
    return sum(layer.macs or 0 for layer in plain if layer.reason is None) / total


def float_equal(detector: nn.Module, original: nn.Module, inputs: dict[str, Tensor]) -> bool:
    """Whether the INT8 model in float mode computes what the float one does, bit for bit."""
    original.load_state_dict(float_state_dict(detector))
    with torch.no_grad(), mq.set_mode(detector, 'float'):
        return _equal(run(detector, inputs, encode=False), run(original, inputs, encode=False))


def reload_equal(detector: nn.Module, again: nn.Module, inputs: dict[str, Tensor]) -> bool:
    """Whether a model that was loaded from a checkpoint computes the same in INT8, bit for bit."""
    with torch.no_grad():
        return _equal(run(detector, inputs), run(again, inputs))


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def judge_files(
    detector: nn.Module, again: nn.Module, inputs: dict[str, Tensor], folder: Path, sm: str | None
) -> list[dict[str, Any]]:
    """Exports and judges every file of a model.

    Args:
        detector: The calibrated model.
        again: The same, loaded from its checkpoint.
        inputs: By name.
        folder: For the files.
        sm: GPU generation to compile for; None: not compiled.

    Returns:
        A dict of plain values by file.
    """
    cuts = detector_cuts(detector, inputs)
    reloaded = {cut.name: cut.module for cut in detector_cuts(again, inputs)}
    return [_judge(cut, reloaded[cut.name], folder / f'{cut.name}.onnx', sm) for cut in cuts]


def _judge(cut: Cut, reloaded: nn.Module, path: Path, sm: str | None) -> dict[str, Any]:
    with warnings.catch_warnings(record=True):
        model = export_onnx(
            cut.module,
            list(cut.inputs.values()),
            path,
            list(cut.inputs),
            cut.output_names,
            weights='int8',  # equal results, and files that are read in a quarter of the time
            custom_ops=True,
        )
    graph = read_graph(path)
    makers = {name: partial(make_engine, name, num_threads=1) for name in ENGINES}
    rungs = climb(cut, reloaded, path, makers, real=False)
    found: dict[str, Any] = dict(
        name=cut.name,
        plugins={kind: len(at) for kind, at in custom_ops(model).items()},
        layers=_count_layers(graph),
        lint=dict(Counter(finding.rule.id for finding in lint(graph))),
        unequal_ties=len(unequal_ties(cut.module)),
        faults={r.stage: r.fault for r in rungs if r.fault},
        engines={},
    )
    for rung in (r for r in rungs if r.stage in ENGINES):
        at, value = min(rung.layers.items(), key=lambda x: (not math.isnan(x[1]), x[1]))
        found['engines'][rung.stage] = dict(
            worst_db=round(value, 1),
            at=at,
            layers=len(rung.layers),
            below=sum(not v >= LAYER_DB for v in rung.layers.values()),
            points=list(rung.points),
        )
    if sm is not None:
        found['compiler'] = _compile(model, path, sm)
    return found


def _count_layers(graph: Any) -> dict[str, int]:
    """Layers of a file, those in INT8, and transposed convolutions in float."""
    listed = layers(graph)
    transposed = [n for n in graph.of('ConvTranspose') if not graph.is_int8(n)]
    return dict(
        all=len(listed),
        int8=sum(layer.int8 for layer in listed),
        transposed=len(list(graph.of('ConvTranspose'))),
        transposed_float=len(transposed),
    )


def _compile(model: onnx.ModelProto, path: Path, sm: str) -> dict[str, Any]:
    """NVIDIA's verdict on a file, of one with plugins on what is around them."""
    around = any(map(is_deformable, model.graph.node))
    if around:
        path = path.with_suffix('.around.onnx')
        onnx.save(without_deformable(model), str(path))
    verdict = compile_onnx(path, [sm])[sm]
    products = [product.name for product in verdict.products]
    return dict(
        sm=sm,
        accepted=verdict.accepted,
        error=verdict.error[:200],
        around_plugins=around,
        int8=verdict.int8,
        products=len(products),
    )


def without_deformable(model: onnx.ModelProto) -> onnx.ModelProto:
    """Cuts deformable convolutions out: their outputs are inputs of the graph, and vice versa.

    Returns:
        A new model that an engine without plugins takes.
    """
    types = tensor_types(to_onnx_names(model))
    cut = onnx.ModelProto()
    cut.CopyFrom(model)
    graph = cut.graph
    gone = [n for n in graph.node if is_deformable(n)]
    stored = {t.name for t in graph.initializer} | {o.name for o in graph.output}
    for node in gone:
        graph.node.remove(node)
    made = {o for n in graph.node for o in n.output if n.op_type != 'Constant'}
    for node in gone:
        for name in node.output:
            graph.input.append(_value(name, types[name]))
        for name in dict.fromkeys(node.input):
            if name in made and name not in stored:
                stored.add(name)
                graph.output.append(_value(name, types[name]))
    return cut


def _value(name: str, kind: Any) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(
        name, kind.elem_type, [d.dim_value for d in kind.shape.dim]
    )
