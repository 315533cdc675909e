"""Inputs and outputs of an exported graph: what was asked for, and what the tracer made of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
from onnx import GraphProto, numpy_helper
from torch import Tensor

from mmdet3d_quant.core.copies import tensors
from mmdet3d_quant.export.graph import custom_ops, stored_tensors

#: Operators whose results differ from run to run.
_RANDOM = (
    'Bernoulli',
    'Multinomial',
    'RandomNormal',
    'RandomNormalLike',
    'RandomUniform',
    'RandomUniformLike',
)
#: The plugin of ``layernorm='custom'``, which is asked for by name.
_PLUGIN_LAYERNORM = 'nv::CustomLayerNormalization'


def check_inputs(inputs: Any, input_names: Any, output_names: Any) -> None:
    """Checks the arguments that say what goes into a graph and what comes out.

    Raises:
        ValueError: If they are no lists, tensors and names differ in number, or a name comes twice.
    """
    for what, value in (('input_names', input_names), ('output_names', output_names)):
        if isinstance(value, str):
            raise ValueError(f'{what} is a string: give a list of names, [{value!r}]')
    if isinstance(inputs, Tensor):
        raise ValueError('inputs is a tensor: give a list, [tensor]')
    for value in inputs:
        if not isinstance(value, (Tensor, list, tuple)):
            raise ValueError(
                f'inputs has a {type(value).__name__}: only tensors, and lists of them, become '
                'inputs of a graph; wrap the module in one that takes those'
            )
    count = len(list(tensors(inputs)))
    if count != len(input_names):
        raise ValueError(f'{count} inputs, but names {list(input_names)}')
    names = [*input_names, *output_names]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(f'names must differ, of inputs and outputs together: {", ".join(twice)}')


def find_problem(
    graph: GraphProto, input_names: Sequence[str], output_names: Sequence[str]
) -> str | None:
    """Finds why a traced graph is not what was asked for.

    Returns:
        Text with the remedy, or None: it has these inputs and outputs, and gives the same numbers
        for the same inputs.
    """
    found = [i.name for i in graph.input]
    unused = [n for n in input_names if n not in found]
    if unused:
        return (
            f'the graph does not depend on {", ".join(unused)}: leave it out of the inputs, or '
            'check why forward does not read it'
        )
    more = [n for n in found if n not in input_names]
    if more:
        return (
            f'forward has arguments with defaults, which became inputs ({", ".join(more)}): wrap '
            'the module in one that takes tensors only'
        )
    made = [o.name for o in graph.output]
    if made != list(output_names):
        return f'forward returns {len(made)} tensors, but names are {list(output_names)}'
    drawn = [n for n in graph.node if n.op_type in _RANDOM or _drops(n, graph)]
    if drawn:
        return (
            f'node {drawn[0].name!r} ({drawn[0].op_type}) draws random numbers in every run: a '
            'dropout or noise that is on in eval mode, too, such as F.dropout without '
            'training=self.training'
        )
    return None


def _drops(node: onnx.NodeProto, graph: GraphProto) -> bool:
    """Whether a node is a Dropout in training mode."""
    if node.op_type != 'Dropout' or len(node.input) < 3 or not node.input[2]:
        return False
    mode = stored_tensors(graph).get(node.input[2])
    return mode is None or bool(numpy_helper.to_array(mode))


def plugins_needed(model: onnx.ModelProto) -> str:
    """Says which operators are not ONNX's, where they are, and what to do; empty if none is."""
    found = {kind: at for kind, at in custom_ops(model).items() if kind != _PLUGIN_LAYERNORM}
    if not found:
        return ''
    kinds = [f'{kind} at {at[0]}' + _more(len(at) - 1) for kind, at in found.items()]
    return (
        f'it has operators that ONNX lacks, and TensorRT without a plugin, too: {"; ".join(kinds)}'
        '. Leave them out of the model (dcn=None, or conv_cfg of another type), or, where the '
        'engine has the plugin, allow them: custom_ops=True, --allow-custom-ops'
    )


def _more(count: int) -> str:
    return f' and {count} more' if count else ''
