"""Tracing of a torch module to an ONNX graph with Q/DQ pairs.

To support another exporter (torch's dynamo), only :func:`trace` has to be replaced: it gets a
module with quantizers, and returns a graph with Q/DQ pairs and the names of their quantizers.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.onnx import register_custom_op_symbolic, symbolic_helper

from mmdet3d_quant.core.compat import set_submodule, strict_zip
from mmdet3d_quant.core.copies import deep_copy, tensors
from mmdet3d_quant.core.formats import INT8
from mmdet3d_quant.core.modes import quantizers, set_mode
from mmdet3d_quant.core.quantizer import Quantizer
from mmdet3d_quant.export.pairs import require_pairs
from mmdet3d_quant.export.weight_scales import raise_scales
from mmdet3d_quant.layers.fold import fold_known

#: Newest opset that torch writes itself.
TORCH_OPSET = 17
#: Attribute that carries a quantizer's name through torch's exporter; ONNX's checker lets names
#: with two underscores pass.
_NAME = '__quantizer'
#: Selects the tracing exporter in newer versions of torch, whose default drops quantizers.
TRACED = {'dynamo': False} if 'dynamo' in signature(torch.onnx.export).parameters else {}


def trace(
    module: nn.Module,
    inputs: Sequence[Tensor],
    path: Path,
    input_names: Sequence[str],
    output_names: Sequence[str],
    opset_version: int,
    quantized: bool,
    dynamic_batch: bool = False,
    layernorm: str = 'standard',
    varying: Mapping[str, Mapping[int, str]] | None = None,
) -> tuple[onnx.ModelProto, dict[str, str], dict[str, str]]:
    """Traces a module in eval mode, with batch norm folded and a Q/DQ pair for every quantizer.

    Args:
        module: Module to trace; left unchanged.
        inputs: Example inputs; a forward may change copies of them.
        path: Scratch file, which this overwrites.
        input_names: Names of the inputs.
        output_names: Names of the outputs.
        opset_version: 13 to :data:`TORCH_OPSET`.
        quantized: False leaves the quantizers out.
        dynamic_batch: Whether the first dimension of inputs and outputs may vary.
        layernorm: ``'standard'`` or ``'custom'``, the layer of NVIDIA's runtime.
        varying: Axes of inputs that may vary, with names, by input.

    Returns:
        Tuple of the graph, a dict of names of quantizers by output of the QuantizeLinear node, and
        a dict of the reasons by name of the batch norms that could not be folded.

    Raises:
        ExportError: If the graph lacks the pair of a quantizer that the module runs.
    """
    module = deep_copy(module)
    module.eval()
    kept, _ = fold_known(module, lambda m: m(*deep_copy(inputs)), quantized)
    if quantized:
        raise_scales(module)
        set_mode(module, 'quant')
        _quantizers_to_qdq(module)
    else:
        set_mode(module, 'float')
    if layernorm == 'custom':
        for name, layer in list(module.named_modules()):
            if isinstance(layer, nn.LayerNorm):
                set_submodule(module, name, _CustomLayerNorm(layer))
    axes = {n: {0: 'batch'} for n in input_names}
    axes.update({n: {0: f'batch_{n}'} for n in output_names})
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore', torch.jit.TracerWarning)  # shapes are fixed
        warnings.filterwarnings('ignore', 'Constant folding')  # constants it did not fold
        warnings.filterwarnings('ignore', 'The shape inference of')  # ops it does not know
        torch.onnx.export(
            module,
            tuple(deep_copy(inputs)),
            str(path),
            input_names=list(input_names),
            output_names=list(output_names),
            opset_version=opset_version,
            do_constant_folding=True,
            dynamic_axes=axes if dynamic_batch else varying,
            **TRACED,
        )
        model = onnx.load(str(path))
        _fix_output_shapes(model.graph, module, inputs, dynamic_batch)
        names = _take_names(model.graph)
        require_pairs(module, inputs, list(names.values()), _QDQ)
    return model, names, kept


def _take_names(graph: onnx.GraphProto) -> dict[str, str]:
    """Removes the names of quantizers from the graph; returns them by output of QuantizeLinear."""
    names = {}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == _NAME:
                names[node.output[0]] = attribute.s.decode()
                node.attribute.remove(attribute)
                break
    return names


def _fix_output_shapes(
    graph: onnx.GraphProto, module: nn.Module, inputs: Sequence[Tensor], dynamic_batch: bool
) -> None:
    """Sets the shapes of outputs that torch's exporter left open (slices, gathers)."""
    skip = 1 if dynamic_batch else 0
    shapes = [output.type.tensor_type.shape.dim[skip:] for output in graph.output]
    if all(dim.HasField('dim_value') for shape in shapes for dim in shape):
        return
    outputs = module(*deep_copy(inputs))
    for shape, output in strict_zip(shapes, tensors(outputs)):
        for dim, size in strict_zip(shape, output.shape[skip:]):
            dim.dim_value = size


class _QDQ(nn.Module):
    """Quantizer with a constant scale, for tracing."""

    def __init__(self, quantizer: Quantizer, name: str):
        super().__init__()
        self.name = name
        self.spec = quantizer.spec
        # Python numbers are invisible to the tracer, so the graph gets constants. A float32 is
        # exact as a Python float.
        scale = self.spec.format.step(quantizer._amax.float()).flatten().tolist()
        # Of one channel a number: engines refuse, or take for another thing, a list of one.
        self.scale: Any = scale if len(scale) > 1 else scale[0]

    def forward(self, x: Tensor) -> Tensor:
        return _QDQFunction.apply(x, self.scale, self.spec, self.name)


class _QDQFunction(torch.autograd.Function):
    """Identity that is traced to a Q/DQ pair; its values are not used."""

    @staticmethod
    def forward(ctx, x, scale, spec, name):
        return x.clone()

    @staticmethod
    def symbolic(g, x, scale, spec, name):
        step = torch.tensor(scale, dtype=torch.float32)
        axis = {'axis_i': spec.axis} if step.dim() else {}
        zero = torch.zeros(step.shape, dtype=spec.format.dtype or INT8.dtype)
        step, zero = (g.op('Constant', value_t=value) for value in (step, zero))
        q = g.op('QuantizeLinear', x, step, zero, **axis, **{f'{_NAME}_s': name})
        return g.op('DequantizeLinear', q, step, zero, **axis).setType(x.type())


class _CustomLayerNorm(nn.Module):
    """A layer norm over the last axis as CUDA-BEVFusion's plugin ``CustomLayerNormalization``."""

    def __init__(self, norm: nn.LayerNorm):
        super().__init__()
        channels = norm.normalized_shape[-1]
        if len(norm.normalized_shape) != 1:
            raise ValueError(
                'the custom layer norm is over the last axis only, not over '
                f'{len(norm.normalized_shape)}: leave layernorm="standard"'
            )
        self.eps = norm.eps
        self.weight = torch.ones(channels) if norm.weight is None else norm.weight
        self.bias = nn.Parameter(torch.zeros(channels)) if norm.bias is None else norm.bias

    def forward(self, x: Tensor) -> Tensor:
        return _CustomLayerNormFunction.apply(x, self.weight, self.bias, self.eps)


class _CustomLayerNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        return F.layer_norm(x, weight.shape, weight, bias, eps)

    @staticmethod
    def symbolic(g, x, weight, bias, eps):
        # Attributes as its creator reads them: epsilon first, then axis.
        y = g.op('nv::CustomLayerNormalization', x, weight, bias, epsilon_f=eps, axis_i=-1)
        return y.setType(x.type())


def _unflatten(g, x, dim, sizes, *names):  # torch 2.0 cannot read annotations here
    """Exports ``Tensor.unflatten``, which torch 2.0's attention calls and its exporter lacks."""
    dim = symbolic_helper._get_const(dim, 'i', 'dim')
    sizes = symbolic_helper._maybe_get_const(sizes, 'is')
    if symbolic_helper._is_packed_list(sizes):
        sizes = symbolic_helper._unpack_list(sizes)
        parts = [symbolic_helper._unsqueeze_helper(g, size, [0]) for size in sizes]
    else:
        parts = [g.op('Constant', value_t=torch.tensor(sizes))]
    shape = g.op('Shape', x)
    if dim != 0:
        parts.insert(0, symbolic_helper._slice_helper(g, shape, axes=[0], starts=[0], ends=[dim]))
    if dim != -1:
        ends = [torch.iinfo(torch.int64).max]
        rest = symbolic_helper._slice_helper(g, shape, axes=[0], starts=[dim + 1], ends=ends)
        parts.append(rest)
    return g.op('Reshape', x, g.op('Concat', *parts, axis_i=0))


if torch.__version__.startswith('2.0.'):
    register_custom_op_symbolic('aten::unflatten', _unflatten, 13)


def _quantizers_to_qdq(module: nn.Module) -> None:
    """Replaces quantizers by :class:`_QDQ`, and those kept float by identities."""
    new: dict[nn.Module, nn.Module] = {}
    for name, quantizer in quantizers(module).items():
        kept = quantizer.float_reason is not None
        new[quantizer] = nn.Identity() if kept else _QDQ(quantizer, name)
    for parent in list(module.modules()):
        for child, old in parent._modules.items():  # layers may share a quantizer
            if old in new:
                parent._modules[child] = new[old]
