"""Export of a module to ONNX with QuantizeLinear / DequantizeLinear pairs."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any, Sequence

import onnx
import torch
from torch import Tensor, nn

from mmdet3d_quant.export.targets import TARGET_KEY, target_of
from mmdet3d_quant.export.unsigned import to_unsigned
from mmdet3d_quant.fake_quant import scale_of
from mmdet3d_quant.files import whole
from mmdet3d_quant.fold import fold_bn
from mmdet3d_quant.modes import quantizers, require_calibrated, set_mode
from mmdet3d_quant.quantizer import Quantizer
from mmdet3d_quant.ties import unequal_ties

#: Attribute that carries a quantizer's name through torch's exporter; ONNX's checker lets names
#: with two underscores pass.
_NAME = '__quantizer'


class ExportError(RuntimeError):
    """The exported graph is not what an engine expects; nothing was written."""


def export_onnx(
    module: nn.Module,
    inputs: Sequence[Tensor],
    path: str | Path,
    input_names: Sequence[str],
    output_names: Sequence[str],
    opset_version: int = 17,
    quantized: bool = True,
    target: str = 'tensorrt',
) -> onnx.ModelProto:
    """Writes a module as ONNX: BN folded, every quantizer a Q/DQ pair with a constant scale.

    The pattern is TensorRT's explicit quantization: signed INT8, zero point 0, activations per
    tensor, weights per output channel over float weights. The module itself is not changed.

    Args:
        module: Any module with quantizers, or without; run as it would be in eval mode.
        inputs: Example inputs in the order of ``forward``; the graph has their shapes.
        path: File to write; it appears whole or not at all.
        input_names: Names of the graph's inputs.
        output_names: Names of the graph's outputs.
        opset_version: ONNX opset, 13 or later (per-channel Q/DQ).
        quantized: False exports the float graph, without Q/DQ.
        target: Engine that the file is for, of ``export.targets.TARGETS``. One that takes unsigned
            activations gets UINT8 where a tensor is provably never negative.

    Returns:
        The exported model.

    Raises:
        UncalibratedError: If a quantizer has no range.
        ValueError: If members of a tie group have unequal ranges, a quantizer has other than 8
            bits, or a name, the opset or the target is wrong.
        ExportError: If the graph fails ``onnx.checker``, or keeps a batch norm that could not
            be folded.
        OSError: If the file cannot be written.
    """
    if opset_version < 13:
        raise ValueError(f'opset_version must be at least 13 for per-channel Q/DQ: {opset_version}')
    unsigned = target_of(target).unsigned
    if len(inputs) != len(input_names):
        raise ValueError(f'{len(inputs)} inputs, but names {list(input_names)}')
    if quantized:
        require_calibrated(module)
        broken = unequal_ties(module)
        if broken:
            raise ValueError(
                'quantizers that must share one scale have unequal ranges: '
                f'{", ".join(broken[0])} ({len(broken)} group(s)); calibrate the whole model'
            )
        narrow = [n for n, q in quantizers(module).items() if q.spec.num_bits != 8]
        if narrow:
            raise ValueError(f'only 8 bits can be exported; {narrow[0]} has fewer')
    module = copy.deepcopy(module)
    module.eval()
    fold_bn(module)
    ranges: dict[str, float] = {}
    if quantized:
        set_mode(module, 'quant')
        ranges = {n: float(q._amax) for n, q in quantizers(module).items() if _is_activation(q)}
        _quantizers_to_qdq(module)
    else:
        set_mode(module, 'float')
    with whole(path) as tmp:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter('ignore', torch.jit.TracerWarning)  # shapes are fixed
            torch.onnx.export(
                module,
                tuple(inputs),
                str(tmp),
                input_names=list(input_names),
                output_names=list(output_names),
                opset_version=opset_version,
                do_constant_folding=True,
            )
        model = onnx.load(str(tmp))
        names = _take_names(model.graph)
        _drop_identities(model.graph)
        onnx.helper.set_model_props(model, {TARGET_KEY: target})
        if unsigned:
            to_unsigned(model, {n: q for n, q in names.items() if q in ranges}, ranges)
            _drop_unused(model.graph)
        _fix_output_shapes(model.graph, module, inputs)
        onnx.save(model, str(tmp))
        _check(model, tmp)
    return model


def _take_names(graph: onnx.GraphProto) -> dict[str, str]:
    """Names of the quantizers by name of their QuantizeLinear; they leave the graph."""
    found = {}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == _NAME:
                found[node.name] = attribute.s.decode()
                node.attribute.remove(attribute)
                break
    return found


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Removes constants that nobody reads."""
    read = {i for node in graph.node for i in node.input} | {o.name for o in graph.output}
    kept = [n for n in graph.node if n.op_type != 'Constant' or n.output[0] in read]
    stored = [i for i in graph.initializer if i.name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(kept)
    graph.initializer.extend(stored)


def _drop_identities(graph: onnx.GraphProto) -> None:
    """Lets the readers of a copied constant read the constant.

    torch stores equal parameters once and copies them with Identity nodes.
    """
    constants = {i.name for i in graph.initializer}
    source = {
        n.output[0]: n.input[0]
        for n in graph.node
        if n.op_type == 'Identity' and n.input[0] in constants
    }
    kept = [n for n in graph.node if n.output[0] not in source]
    for node in kept:
        node.input[:] = [source.get(i, i) for i in node.input]
    del graph.node[:]
    graph.node.extend(kept)


def _fix_output_shapes(graph: onnx.GraphProto, module: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Writes the shapes of outputs that torch's exporter could not tell (slices, gathers)."""
    shapes = [output.type.tensor_type.shape.dim for output in graph.output]
    if all(dim.HasField('dim_value') for shape in shapes for dim in shape):
        return
    with torch.no_grad():
        outputs = module(*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    for shape, output in zip(shapes, outputs, strict=True):
        for dim, size in zip(shape, output.shape, strict=True):
            dim.dim_value = size


def _check(model: onnx.ModelProto, path: Path) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except onnx.checker.ValidationError as err:
        raise ExportError(f'the exported graph is invalid: {err}') from err
    left = [n.name for n in model.graph.node if n.op_type == 'BatchNormalization']
    if left:
        raise ExportError(f'batch norm could not be folded: {", ".join(left)}')


def _is_activation(quantizer: Quantizer) -> bool:
    return quantizer.float_reason is None and quantizer.spec.axis is None


class _QDQ(nn.Module):
    """A quantizer with its scale as a constant, for tracing."""

    def __init__(self, quantizer: Quantizer, name: str):
        super().__init__()
        self.name = name
        self.spec = quantizer.spec
        # Python numbers are invisible to the tracer, so the graph gets constants. A float32 is
        # exact as a Python float.
        scale = scale_of(quantizer._amax.float(), self.spec).flatten().tolist()
        self.scale: Any = scale if self.spec.axis is not None else scale[0]

    def forward(self, x: Tensor) -> Tensor:
        return _QDQFunction.apply(x, self.scale, self.spec, self.name)


class _QDQFunction(torch.autograd.Function):
    """Only traced, never run for its values: an identity that becomes two nodes."""

    @staticmethod
    def forward(ctx, x, scale, spec, name):
        return x.clone()

    @staticmethod
    def symbolic(g, x, scale, spec, name):
        shape = () if spec.axis is None else (len(scale),)
        axis = {} if spec.axis is None else {'axis_i': spec.axis}
        step = g.op('Constant', value_t=torch.tensor(scale, dtype=torch.float32))
        zero = g.op('Constant', value_t=torch.zeros(shape, dtype=torch.int8))
        q = g.op('QuantizeLinear', x, step, zero, **axis, **{f'{_NAME}_s': name})
        return g.op('DequantizeLinear', q, step, zero, **axis).setType(x.type())


def _quantizers_to_qdq(module: nn.Module) -> None:
    for name, quantizer in quantizers(module).items():
        parent_name, _, child = name.rpartition('.')
        new = nn.Identity() if quantizer.float_reason is not None else _QDQ(quantizer, name)
        setattr(module.get_submodule(parent_name), child, new)
