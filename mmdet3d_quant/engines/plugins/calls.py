"""Plugin nodes as calls of Python, by onnxruntime-extensions.

The nodes of a copy of the graph become PyOps: domain ``ai.onnx.contrib``, one for each signature,
with the key of an :class:`Operator` as their attribute. PyOps have no FP16, so numbers are cast to
float32 before the call and to the type they had behind it, which is exact for what FP16 holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import onnx
from onnx import NodeProto, TensorProto, helper

from mmdet3d_quant.engines.files import EngineError
from mmdet3d_quant.engines.plugins.operators import Kind, Operator

#: The domain that onnxruntime-extensions gives its operators.
CONTRIB = 'ai.onnx.contrib'
#: The first opset that casts to the type of another tensor.
OPSET = 15
_LIVE: WeakValueDictionary[str, Operator] = WeakValueDictionary()
_NUMBERS = count()
_KNOWN: dict[str, Any] = {}


class Calls:
    """The operators of one file, and what went wrong in them.

    They live as long as this object does.
    """

    def __init__(self) -> None:
        self.failures: list[str] = []
        self._operators: list[Operator] = []

    def __bool__(self) -> bool:
        return bool(self._operators)

    def add(self, kind: Kind, attributes: dict[str, Any], name: str, inputs: int) -> NodeProto:
        """Makes a node that calls an operator.

        Args:
            kind: The operator.
            attributes: Of the node, checked.
            name: What errors call the node.
            inputs: How many inputs the node has.

        Returns:
            Node without inputs and outputs.
        """
        operator = Operator(kind, attributes, name, self.failures)
        key = str(next(_NUMBERS))
        _LIVE[key] = operator
        self._operators.append(operator)
        signature = _declare(kind.inputs[:inputs], ''.join(letter for letter, _ in kind.outputs))
        return helper.make_node(signature, [], [], domain=CONTRIB, key=key)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Raises what went wrong in a node in the block, in the place of what followed from it.

        Raises:
            EngineError: If a node failed; names it.
        """
        self.failures.clear()
        try:
            yield
        except Exception:
            if not self.failures:
                raise
        if self.failures:
            raise EngineError(self.failures[0])


def _declare(inputs: str, outputs: str) -> str:
    """Declares the PyOp of a signature once, and returns its name."""
    from onnxruntime_extensions import PyOp, onnx_op

    name = f'PluginOf_{inputs}_{outputs}'
    if name not in _KNOWN:
        given = {'f': PyOp.dt_float, 'i': PyOp.dt_int64}
        made = {'f': PyOp.dt_float, 'i': PyOp.dt_int32}

        @onnx_op(
            op_type=name,
            inputs=[given[letter] for letter in inputs],
            outputs=[made[letter] for letter in outputs],
            attrs={'key': PyOp.dt_string},
        )
        def call(*arrays: Any, key: str) -> Any:
            results = _LIVE[key](*arrays)
            return results if len(results) > 1 else results[0]

        _KNOWN[name] = call
    return name


def library() -> str:
    """Path of the library that ONNX Runtime loads for the calls.

    Raises:
        EngineError: If onnxruntime-extensions is not installed.
    """
    try:
        from onnxruntime_extensions import get_library_path
    except ImportError as err:
        raise EngineError(
            f'plugin nodes run on a CPU by onnxruntime-extensions, which is not installed ({err}): '
            "pip install 'mmdet3d-quant[plugins]', or onnxruntime-extensions"
        ) from None
    return get_library_path()


def called(node: NodeProto, call: NodeProto, kind: Kind) -> list[NodeProto]:
    """Puts a call in the place of a node, with casts around it.

    Args:
        node: The plugin's node.
        call: That of :meth:`Calls.add`.
        kind: The operator.

    Returns:
        List of nodes in order.
    """
    prefix = node.name or node.output[0]
    types = {'f': TensorProto.FLOAT, 'i': TensorProto.INT64}
    before, behind = [], []
    for i, (name, letter) in enumerate(zip(node.input, kind.inputs)):
        call.input.append(f'{prefix}/call_{i}')
        before.append(helper.make_node('Cast', [name], [call.input[i]], to=types[letter]))
    like = node.input[kind.inputs.index('f')] if 'f' in kind.inputs else ''
    for i, (letter, _) in enumerate(kind.outputs):
        name = node.output[i] if i < len(node.output) and node.output[i] else f'{prefix}/none_{i}'
        call.output.append(name if letter == 'i' else f'{prefix}/called_{i}')
        if letter == 'f':
            behind.append(helper.make_node('CastLike', [call.output[i], like], [name]))
    call.name = prefix
    return [*before, call, *behind]


def import_calls(model: onnx.ModelProto) -> None:
    """Names the domain of the calls in a model, in place.

    Raises:
        EngineError: If the model's opset has no cast to the type of another tensor.
    """
    opset = max((o.version for o in model.opset_import if not o.domain), default=1)
    if opset < OPSET:
        raise EngineError(
            f'its opset is {opset}; plugin nodes run on a CPU from {OPSET} on: export with it'
        )
    if all(o.domain != CONTRIB for o in model.opset_import):
        model.opset_import.append(helper.make_opsetid(CONTRIB, 1))
