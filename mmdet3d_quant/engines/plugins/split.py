"""A graph with plugin nodes, run in parts: an engine's sessions, and numpy for what is between.

Nodes have a stage, the number of plugin nodes on the longest way to them. The ordinary nodes of one
stage are one graph, and run in one session; then the plugin nodes of the stage run. What depends on
stored tensors alone is repeated in each graph that reads it, so that weights stay constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.engines.engine import Arrays
from mmdet3d_quant.engines.plugins.operators import Operator
from mmdet3d_quant.files.typed import emulated, tensor_types


class SplitGraph:
    """A graph in parts, with the methods of ONNX Runtime's session that an engine needs.

    Args:
        model: The graph.
        operators: Its plugin nodes, by the number of the node.
        session: Makes a session of ONNX Runtime from a serialized model.
        rounded: Round every FP16 tensor to it and compute in float32 (``files/typed.py``).

    Raises:
        EngineError: If a plugin node reads what it does not take.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        operators: dict[int, Operator],
        session: Callable[[bytes], Any],
        rounded: bool,
    ) -> None:
        self._inputs, self._outputs = _declared(model, session)
        graph = model.graph
        stored = {t.name: t for t in graph.initializer}
        self._stored = {
            name: numpy_helper.to_array(stored[name])
            for operator in operators.values()
            for name in operator.inputs
            if name in stored
        }
        types = {n: a.dtype for n, a in self._stored.items()}
        types.update((i.name, _dtype(i.type.tensor_type.elem_type)) for i in graph.input)
        self._steps: list[_Part | Operator] = []
        for part, mine in _stages(model, operators):
            if part.graph.node:
                for name in _read(part.graph.node) & set(types) - set(stored):
                    info = helper.make_tensor_value_info(name, _onnx_type(types[name]), None)
                    part.graph.input.append(info)
                step = _Part(part, session, rounded)
                types.update(step.types)
                self._steps.append(step)
            for operator in mine:
                made = operator.types([types[name] for name in operator.inputs])
                types.update(zip(operator.outputs, made))
                self._steps.append(operator)
        self._wide = rounded

    def get_inputs(self) -> list[Any]:
        """Inputs of the graph, as ONNX Runtime describes them."""
        return self._inputs

    def get_outputs(self) -> list[Any]:
        """Outputs of the graph, as ONNX Runtime describes them."""
        return self._outputs

    def run(self, names: list[str], inputs: Arrays) -> list[np.ndarray]:
        """Runs the graph once.

        Args:
            names: Outputs that are wanted.
            inputs: Arrays by name.

        Returns:
            List of arrays; FP16 as float32 where tensors are rounded.

        Raises:
            EngineError: If what a plugin node gets does not fit it; names the node.
        """
        arrays = {**self._stored, **inputs}
        for step in self._steps:
            if isinstance(step, Operator):
                arrays.update(step([arrays[name] for name in step.inputs]))
            else:
                arrays.update(step(arrays))
        found = [arrays[name] for name in names]
        wide = self._wide
        return [a.astype(np.float32) if wide and a.dtype == np.float16 else a for a in found]


class _Part:
    """The ordinary nodes of a stage; arrays have the types of the file, whatever it computes in."""

    def __init__(
        self, model: onnx.ModelProto, session: Callable[[bytes], Any], rounded: bool
    ) -> None:
        inferred = tensor_types(model)
        if rounded:
            model = _outputs_typed(model, inferred)
            model = emulated(model)
        self._session = session(model.SerializeToString())
        self._names = [out.name for out in self._session.get_outputs()]
        self._reads = {i.name: _ORT[i.type] for i in self._session.get_inputs()}
        self.types = {
            out.name: _dtype(inferred[out.name].elem_type)
            if out.name in inferred and inferred[out.name].elem_type
            else np.dtype(_ORT[out.type])
            for out in self._session.get_outputs()
        }

    def __call__(self, arrays: Arrays) -> Arrays:
        inputs = {n: arrays[n].astype(t, copy=False) for n, t in self._reads.items()}
        found = strict_zip(self._names, self._session.run(self._names, inputs))
        return {n: a.astype(self.types[n], copy=False) for n, a in found}


#: NumPy's types by ONNX Runtime's names.
_ORT = {
    f'tensor({name})': np.dtype(kind)
    for name, kind in (
        ('float', 'float32'), ('float16', 'float16'), ('double', 'float64'), ('bool', 'bool'),
        *((f'{u}int{n}', f'{u}int{n}') for u in ('', 'u') for n in (8, 16, 32, 64)),
    )
}  # fmt: skip


def _dtype(number: int) -> np.dtype:
    return np.dtype(helper.tensor_dtype_to_np_dtype(number))


def _onnx_type(dtype: np.dtype) -> int:
    return helper.np_dtype_to_tensor_dtype(dtype)


def _declared(model: onnx.ModelProto, session: Callable[[bytes], Any]) -> tuple[list, list]:
    """Inputs and outputs of a graph as ONNX Runtime describes them; of a graph without nodes."""
    shell = onnx.ModelProto()
    shell.CopyFrom(model)
    del shell.graph.node[:], shell.graph.initializer[:], shell.graph.value_info[:]
    del shell.graph.output[:]
    stored = {t.name for t in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in stored]
    del shell.graph.input[:]
    shell.graph.input.extend(inputs)
    for value in inputs:
        shell.graph.node.append(helper.make_node('Identity', [value.name], [f'{value.name}/as']))
        shell.graph.output.add(name=f'{value.name}/as')
    return session(shell.SerializeToString()).get_inputs(), list(model.graph.output)


def _stages(
    model: onnx.ModelProto, operators: dict[int, Operator]
) -> Iterator[tuple[onnx.ModelProto, list[Operator]]]:
    """Yields the ordinary nodes of each stage as a model without inputs, and its plugin nodes."""
    graph = model.graph
    stored = {t.name for t in graph.initializer}
    ready: dict[str, int] = {}  # stage in which a tensor can be read
    fixed: dict[str, int] = {}  # number of the node that makes it from stored tensors alone
    stage_of: dict[int, int] = {}
    for number, node in enumerate(graph.node):
        read = _read([node])
        plugin = number in operators
        if not plugin and read <= stored | fixed.keys():
            fixed.update((name, number) for name in node.output)
            continue
        stage_of[number] = max((ready.get(name, 0) for name in read), default=0)
        ready.update((name, stage_of[number] + plugin) for name in node.output)
    last = max(stage_of.values(), default=0)
    ends = {o.name for o in graph.output}
    for stage in range(last + 1):
        here = [n for n in stage_of if stage_of[n] == stage]
        mine = [operators[n] for n in here if n in operators]
        ordinary = {n for n in here if n not in operators}
        later = {n for n in stage_of if n not in ordinary}
        wanted = ends | _read(graph.node[n] for n in later)
        made = {name for n in ordinary for name in graph.node[n].output}
        outputs = {name for name in wanted & made if name}
        read = _read(graph.node[n] for n in ordinary)
        asked = {name for op in mine for name in op.inputs} | (ends if stage == last else set())
        outputs |= asked & fixed.keys()
        todo = [fixed[name] for name in (read | asked) & fixed.keys()]
        while todo:
            number = todo.pop()
            if number not in ordinary:
                ordinary.add(number)
                todo += [fixed[n] for n in _read([graph.node[number]]) if n in fixed]
        yield _part(model, [graph.node[n] for n in sorted(ordinary)], sorted(outputs)), mine


def _part(model: onnx.ModelProto, nodes: list[NodeProto], outputs: list[str]) -> onnx.ModelProto:
    part = onnx.ModelProto()
    part.ir_version = model.ir_version
    part.opset_import.extend(model.opset_import)
    part.functions.extend(model.functions)
    part.graph.name = model.graph.name or 'part'
    part.graph.node.extend(nodes)
    read = _read(nodes)
    part.graph.initializer.extend(t for t in model.graph.initializer if t.name in read)
    for name in outputs:
        part.graph.output.add(name=name)
    return part


def _outputs_typed(
    model: onnx.ModelProto, types: dict[str, onnx.TypeProto.Tensor]
) -> onnx.ModelProto:
    """A copy whose outputs have the types that were inferred."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for value in result.graph.output:
        if value.name in types:
            value.type.tensor_type.elem_type = types[value.name].elem_type
    return result


def _read(nodes: Iterable[NodeProto]) -> set[str]:
    """Names of the tensors that nodes and the graphs inside them read."""
    names: set[str] = set()
    for node in nodes:
        names |= {name for name in node.input if name}
        for attribute in node.attribute:
            graphs = [attribute.g] if attribute.HasField('g') else list(attribute.graphs)
            for graph in graphs:
                names |= _read(graph.node) | {o.name for o in graph.output}
    return names
