"""Q/DQ pairs of a file by quantizer: their names are in its metadata, and none may be missing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.copies import deep_copy, tensors
from mmdet3d_quant.core.errors import QuantError

#: Key in a file's ``metadata_props`` for the names of quantizers by the output of their
#: QuantizeLinear, as JSON.
QUANTIZERS_KEY = 'mmdet3d_quant.quantizers'
#: How many names an error lists.
SHOWN = 5


class ExportError(QuantError):
    """The exported graph is not what an engine expects; nothing was written."""


def store_names(model: onnx.ModelProto, names: Mapping[str, str]) -> None:
    """Writes the names of quantizers into the metadata of a file.

    Args:
        model: The file; changed in place.
        names: Name of the quantizer by output of its QuantizeLinear.
    """
    props = {p.key: p.value for p in model.metadata_props}
    onnx.helper.set_model_props(model, {**props, QUANTIZERS_KEY: json.dumps(dict(names))})


def stored_names(model: onnx.ModelProto) -> dict[str, str] | None:
    """Reads the names of quantizers from the metadata of a file.

    Returns:
        Dict of names by output of the QuantizeLinear; None if the file does not tell.
    """
    props = {p.key: p.value for p in model.metadata_props}
    return json.loads(props[QUANTIZERS_KEY]) if QUANTIZERS_KEY in props else None


def count_pairs(model: onnx.ModelProto) -> int:
    """Counts the integer tensors that are dequantized, one of every Q/DQ pair or stored."""
    return len({n.input[0] for n in model.graph.node if n.op_type == 'DequantizeLinear'})


def require_pairs(
    module: nn.Module, inputs: Sequence[Tensor], traced: Sequence[str], kind: type[nn.Module]
) -> None:
    """Checks that a graph has a pair for every call of a quantizer that its outputs depend on.

    Args:
        module: What was traced, with stand-ins that have the ``name`` of their quantizer.
        inputs: Example inputs.
        traced: Name of the quantizer of every QuantizeLinear.
        kind: Type of the stand-ins.

    Raises:
        ExportError: If a pair is missing; lists the quantizers.
    """
    readers = [m for m in module.modules() if isinstance(m, kind)]
    calls = _Calls(readers)
    with calls:
        wanted = module(*deep_copy(inputs))
    there = Counter(traced)
    missing = [name for name, count in calls.number.items() if there[name] < count]
    for name in missing:
        needed = sum(
            _matters(module, inputs, wanted, _Calls(readers, poisoned=(name, i)))
            for i in range(calls.number[name])
        )
        if there[name] < needed:
            shown = ', '.join(missing[:SHOWN]) + (', ...' if missing[SHOWN:] else '')
            raise ExportError(
                f'the exported graph has {len(traced)} Q/DQ pairs where the model rounds '
                f'{sum(calls.number.values())} times; missing: {shown}. The exporter of torch '
                f'{torch.__version__} dropped them: export with another version of torch, or '
                'quantized=False for a float file'
            )


class _Calls:
    """Counts the calls of stand-ins while entered.

    Args:
        readers: The stand-ins.
        poisoned: Name and number of a call that returns NaN.

    Attributes:
        number: Calls by name.
    """

    def __init__(self, readers: Sequence[Any], poisoned: tuple[str, int] | None = None) -> None:
        self.readers, self.poisoned = readers, poisoned
        self.number: Counter[str] = Counter()

    def __enter__(self) -> None:
        self._hooks = [r.register_forward_hook(self._count) for r in self.readers]

    def __exit__(self, *exc_info: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _count(self, reader: Any, args: Any, out: Tensor) -> Tensor | None:
        call = reader.name, self.number[reader.name]
        self.number[reader.name] += 1
        return torch.full_like(out, float('nan')) if call == self.poisoned else None


def _matters(module: nn.Module, inputs: Sequence[Tensor], wanted: Any, calls: _Calls) -> bool:
    """Tells whether the outputs change where a call is poisoned."""
    with calls:
        found = module(*deep_copy(inputs))
    return not all(torch.equal(a, b) for a, b in strict_zip(tensors(wanted), tensors(found)))
