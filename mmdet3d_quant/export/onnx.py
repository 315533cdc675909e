"""Export of a module to ONNX with QuantizeLinear / DequantizeLinear pairs."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.copies import tensors, uncompiled
from mmdet3d_quant.core.formats import FP8
from mmdet3d_quant.core.modes import quantizers, require_calibrated
from mmdet3d_quant.core.ties import unequal_ties
from mmdet3d_quant.core.unsigned import unsigned_amax
from mmdet3d_quant.export.deconvolution import to_depth_to_space
from mmdet3d_quant.export.fp8 import to_fp8
from mmdet3d_quant.export.graph import nonfinite_tensors
from mmdet3d_quant.export.half import LEAST, round_scales
from mmdet3d_quant.export.interface import check_inputs, find_problem, plugins_needed
from mmdet3d_quant.export.pairs import ExportError, count_pairs, store_names
from mmdet3d_quant.export.passes import (
    drop_identities,
    drop_unused,
    fold_shapes,
    store_int8_weights,
    to_half,
    to_opset,
)
from mmdet3d_quant.export.ranges import peaks
from mmdet3d_quant.export.targets import DEFAULT, TARGET_KEY, Target, require_formats, target_of
from mmdet3d_quant.export.tracing import TORCH_OPSET, trace
from mmdet3d_quant.export.typed import to_strong
from mmdet3d_quant.export.unsigned import to_unsigned
from mmdet3d_quant.files.limits import LARGEST
from mmdet3d_quant.files.outputs import whole
from mmdet3d_quant.files.plain import nonfinite_entries
from mmdet3d_quant.layers.base import QuantLayer

#: Key of the file's metadata, where the batch norms that stay are listed with their reasons.
KEPT_KEY = 'mmdet3d_quant.batch_norm'
WEIGHTS = ('float', 'int8')
LAYERNORMS = ('standard', 'custom')
#: What the first opsets of targets brought.
FIRST = {13: 'per-channel Q/DQ', 19: 'FP16 scales'}


def export_onnx(
    module: nn.Module,
    inputs: Sequence[Any],
    path: str | Path,
    input_names: Sequence[str],
    output_names: Sequence[str],
    opset_version: int | None = None,
    quantized: bool = True,
    target: str = DEFAULT,
    dynamic_batch: bool = False,
    weights: str | None = None,
    fp16: bool | None = None,
    layernorm: str = 'standard',
    metadata: Mapping[str, str] | None = None,
    custom_ops: bool = False,
    varying: Mapping[str, Mapping[int, str]] | None = None,
) -> onnx.ModelProto:
    """Writes a module as ONNX: BN folded, every quantizer a Q/DQ pair with a constant scale.

    The pattern is TensorRT's explicit quantization: signed INT8 or FP8, zero point 0, activations
    per tensor, weights per output channel over float weights. Weight scales that are too small for
    FP16 or for the bias are raised (``export/weight_scales.py``). The module itself is not changed.

    A BN that cannot be folded into one convolution stays as BatchNormalization, which computes in
    float; a quantized graph with such ones is exported with a warning that has names and reasons,
    which are in the file, too (:func:`kept_batch_norms`).

    Args:
        module: Any module with quantizers, or without; run as it would be in eval mode, and
            without ``torch.compile``.
        inputs: Example inputs in the order of ``forward``, tensors or lists of them, each of which
            has a name; the graph has their shapes. They are not changed.
        path: File to write; it appears whole or not at all.
        input_names: Names of the graph's inputs.
        output_names: Names of the graph's outputs.
        opset_version: ONNX opset, 13 (the first with per-channel Q/DQ) to 21, for strongly typed
            targets 19 (the first with FP16 scales) to 21; None: the target's, 17 or 19.
        quantized: False exports the float graph, without Q/DQ.
        target: Engine that the file is for, of ``export.targets.TARGETS``. One that takes unsigned
            activations gets UINT8 where a tensor is provably never negative.
        dynamic_batch: Let the first dimension of inputs and outputs vary. The file is tried on
            two samples.
        weights: ``'float'``: quantized weights are stored float32 with a Q/DQ pair, as TensorRT
            has always taken them; ``'int8'``: stored as INT8 or FP8 with a DequantizeLinear, a
            quarter of the size and equal results; None: as the target has it.
        fp16: Store weights, and compute, in FP16. For a strongly typed target also with Q/DQ, which
            is its default: inputs, outputs and scales are FP16, too, and float32 is what FP16
            cannot hold (:mod:`mmdet3d_quant.export.typed`). For others of graphs without Q/DQ.
        layernorm: ``'standard'``: ONNX's ops (LayerNormalization from opset 17 on);
            ``'custom'``: ``nv::CustomLayerNormalization``, the plugin of CUDA-BEVFusion.
        metadata: More entries of the file's ``metadata_props``.
        custom_ops: Allow operators that ONNX does not have, such as deformable convolutions: the
            file then needs plugins, and is not tried with another batch size.
        varying: Axes of inputs that may vary, with names, by input.

    Returns:
        The exported model.

    Raises:
        UncalibratedError: If a quantizer has no range.
        ValueError: If members of a tie group have unequal ranges, a quantizer has a number format
            that the target does not run, FP16 is asked for a quantized module, or an argument is
            none of the above.
        ExportError: If the graph fails ``onnx.checker``, has other inputs or outputs than named or
            random numbers, needs custom operators, lacks the Q/DQ pair of a quantizer, holds NaN
            or infinity, or what FP16 cannot hold where it is typed so, cannot take another batch
            size, or is too large for a file.
        OSError: If the file cannot be written.
    """
    wants = target_of(target)
    opset_version = wants.opset if opset_version is None else opset_version
    weights = weights or wants.weights
    fp16 = wants.strong if fp16 is None else fp16
    check_inputs(inputs, input_names, output_names)
    _check_arguments(opset_version, weights, layernorm, wants)
    module = uncompiled(module)
    _check_module(module, quantized, fp16 and not wants.strong)
    if quantized:
        require_formats(quantizers(module), wants)
    found = quantizers(module) if quantized else {}
    ranges = {n: float(q._amax) for n, q in found.items() if q.calibrated and q.spec.axis is None}
    with whole(path) as tmp:
        model, names, kept = trace(
            module,
            inputs,
            tmp,
            input_names,
            output_names,
            min(opset_version, TORCH_OPSET),
            quantized,
            dynamic_batch,
            layernorm,
            varying,
        )
        problem = find_problem(model.graph, input_names, output_names)
        if problem:
            raise ExportError(f'{type(module).__name__} cannot be exported: {problem}')
        plugins = plugins_needed(model)
        if plugins and not custom_ops:
            raise ExportError(f'{Path(path).name} cannot be exported: {plugins}')
        drop_identities(model.graph)
        if wants.tiles:
            names = to_depth_to_space(model.graph, names)
            drop_unused(model.graph)
        if not dynamic_batch and not varying:
            fold_shapes(model)
        props = {**(metadata or {}), TARGET_KEY: target}
        if any(n.op_type == 'BatchNormalization' for n in model.graph.node):
            props[KEPT_KEY] = json.dumps(kept)
        onnx.helper.set_model_props(model, props)
        if quantized:
            store_names(model, names)
        if wants.unsigned:
            finer = {n: unsigned_amax(found[n]) for n in ranges}
            to_unsigned(model, {n: q for n, q in names.items() if q in ranges}, ranges, finer)
            drop_unused(model.graph)
        strong = fp16 and wants.strong
        fp8 = {name for name, q in found.items() if q.spec.format == FP8}
        if fp8:
            model = to_opset(model, opset_version)
            to_fp8(model.graph, names, fp8)
            drop_unused(model.graph)
        if strong:
            round_scales(model.graph, names, LEAST)
        if weights == 'int8':
            store_int8_weights(model.graph)
        if strong:
            round_scales(model.graph, names)
        model = to_opset(model, opset_version)
        examples = {n: t.cpu().numpy() for n, t in strict_zip(input_names, tensors(inputs))}
        if fp16:
            model = to_strong(model, peaks(model, examples)) if strong else to_half(model)
        onnx.save(model, str(tmp))
        _check(model, tmp, type(module).__name__, len(names))
        if dynamic_batch and not plugins:
            _check_batch(tmp, examples)
    left = kept_batch_norms(model)
    if left and quantized:
        reasons = '\n'.join(f'  {name}: {reason}' for name, reason in left.items())
        warnings.warn(
            f'{Path(path).name}: {len(left)} batch norm(s) cannot be folded and stay, in float:\n'
            f'{reasons}',
            stacklevel=2,
        )
    return model


def kept_batch_norms(model: onnx.ModelProto) -> dict[str, str]:
    """Reasons by name of the batch norms that could not be folded into a convolution."""
    props = {p.key: p.value for p in model.metadata_props}
    return json.loads(props.get(KEPT_KEY, '{}'))


def _check_arguments(opset_version: int, weights: str, layernorm: str, target: Target) -> None:
    first, last = target.opsets
    if not first <= opset_version <= last:
        raise ValueError(
            f'opset_version must be {first} (the first with {FIRST[first]}) to {last}, '
            f'not {opset_version}'
        )
    if layernorm in LAYERNORMS and layernorm not in target.layernorms:
        raise ValueError(f'{target.name} has no {layernorm} layer norm: take tensorrt8')
    if layernorm == 'custom' and opset_version > TORCH_OPSET:
        raise ValueError(
            f'the custom layer norm goes up to opset {TORCH_OPSET}, not {opset_version}: '
            'ONNX cannot convert what it does not know'
        )
    for name, value, known in (('weights', weights, WEIGHTS), ('layernorm', layernorm, LAYERNORMS)):
        if value not in known:
            raise ValueError(f'{name} must be {" or ".join(known)}, not {value!r}')


def _check_module(module: nn.Module, quantized: bool, fp16: bool) -> None:
    size = sum(t.numel() * t.element_size() for t in module.state_dict().values())
    if size >= LARGEST:
        raise ExportError(
            f'the weights of {type(module).__name__} take {size / 2**30:.1f} GiB; ONNX files end '
            'at 2 GiB: export it in parts (see mmdet3d_quant.export.Cut)'
        )
    odd = nonfinite_entries(module.state_dict())
    if odd:
        more = f', and {len(odd) - 1} more' if odd[1:] else ''
        raise ExportError(
            f'{odd[0]} of {type(module).__name__} holds NaN or infinity{more}: take a checkpoint '
            'from before the training diverged'
        )
    if not quantized:
        return
    require_calibrated(module)
    for name, layer in module.named_modules():
        if isinstance(layer, QuantLayer) and layer.weight.dtype != torch.float32:
            raise ExportError(
                f'{name or type(layer).__name__} has weights of {layer.weight.dtype}; Q/DQ pairs '
                'take float32: export module.float(), with inputs of float32'
            )
    active = [n for n, q in quantizers(module).items() if q.float_reason is None]
    if fp16 and active:
        raise ValueError(
            f"fp16 is for graphs without Q/DQ, and {active[0]} is quantized: weights='int8' saves "
            'more, or export with quantized=False'
        )
    broken = unequal_ties(module)
    if broken:
        raise ValueError(
            'quantizers that must share one scale have unequal ranges: '
            f'{", ".join(broken[0])} ({len(broken)} group(s)); calibrate the whole model'
        )


def _check(model: onnx.ModelProto, path: Path, name: str, pairs: int) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as err:
        raise ExportError(f'the exported graph is invalid: {err}') from err
    if count_pairs(model) != pairs:
        raise ExportError(
            f'a pass over the graph of {name} left {count_pairs(model)} of {pairs} Q/DQ pairs; '
            'export with another opset or target'
        )
    for node, tensor, share in nonfinite_tensors(model.graph):
        raise ExportError(
            f'{name}: {tensor}, which {node.name or node.op_type} reads, is NaN or infinite in '
            f'{share}: a weight or a folded batch norm is too large for float32'
        )


def _check_batch(path: Path, one: dict[str, np.ndarray]) -> None:
    """Runs a file on one sample and on the same twice."""
    from mmdet3d_quant.engines import EngineError, ONNXRuntime

    two = {n: np.concatenate([a, a]) for n, a in one.items()}
    try:
        engine = ONNXRuntime(path)
        single, double = engine(one), engine(two)
    except EngineError as err:
        raise ExportError(f'the graph does not run: {err}') from err
    except Exception as err:  # ONNX Runtime has a class of its own per cause
        reason = str(err).splitlines()[0]
        raise ExportError(f'the graph does not take two samples: {reason}') from err
    for name, value in double.items():
        if value.shape != (2 * len(single[name]), *single[name].shape[1:]):
            raise ExportError(
                f'the graph does not take two samples: {name} has shape {value.shape} instead of '
                f'twice {single[name].shape}; export it with a fixed batch'
            )
