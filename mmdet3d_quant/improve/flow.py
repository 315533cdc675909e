"""The way of tensors through one forward: which layer or operator makes each, and which read it."""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Callable, Iterable, List, Tuple

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from mmdet3d_quant.improve.operators import (
    FILLS,
    NOT_READ,
    SLOPES,
    ZEROS,
    joins_channels,
    keeps,
    keeps_channels,
    written,
)
from mmdet3d_quant.layers.pairs import CONVS, problem_alone
from mmdet3d_quant.layers.watch import Calls, storage_of, tensors_in

NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class Layout:
    """Where in its memory a dense tensor lies: offset, shape and strides, in elements."""

    offset: int
    shape: Tuple[int, ...]
    stride: Tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor) -> Layout:
        """Describes a tensor."""
        return cls(x.storage_offset(), tuple(x.shape), tuple(x.stride()))

    def has_channels_of(self, other: Layout, axis: int = 1) -> bool:
        """Tells whether channel c is the same along axis 1, or the last axis (-1), of both."""
        if axis == -1:
            return self.offset == other.offset and self._tokens() == other._tokens() != 0
        same = self.offset == other.offset and self.shape[:2] == other.shape[:2]
        return same and self.stride[:2] == other.stride[:2]

    def _tokens(self) -> int:
        """Channels, where they are the last axis and lie side by side; else 0."""
        channels = self.shape[-1] if self.shape else 0
        whole = (
            channels and self.stride[-1] == 1 and not any(s % channels for s in self.stride[:-1])
        )
        return channels if whole else 0


@dataclass(eq=False)
class Value:
    """What a piece of memory holds until it is written again.

    Attributes:
        maker: What wrote it; None if that was not seen, as for inputs of the model.
        layout: Layout of the tensor that was written.
        reads: Each step that reads it, with the number of the argument and the view of it.
        kept: Whether it outlives the forward.
    """

    maker: Step | None
    layout: Layout
    reads: List[Tuple[Step, int, Layout]] = field(default_factory=list)
    kept: bool = False

    @property
    def origin(self) -> Step | None:
        """What gives it its size: its maker, or the first before that hands no factor on."""
        step = self.maker
        while step is not None and step.kind == 'keeps':
            step = step.inputs[step.source].maker
        return step


@dataclass(eq=False)
class Step:
    """A layer or an operator that ran.

    Attributes:
        kind: ``'layer'``; ``'concat'``, along axis 1; ``'keeps'``: a positive factor of one input
            becomes one of the outputs; ``'zeros'``: what it makes is zero; ``'other'``.
        label: Its name in messages.
        module: The layer, or the innermost module that the operator ran in.
        inputs: What it read, in order.
        outputs: What it made, floating tensors only.
        source: Of ``'keeps'``: number of the input whose factor the outputs get.
        channels_at: Of ``'keeps'``: axes, of 1 and -1, along which channels stay what and where
            they are.
    """

    kind: str
    label: str
    module: nn.Module
    inputs: List[Value] = field(default_factory=list)
    outputs: List[Value] = field(default_factory=list)
    source: int = 0
    channels_at: Tuple[int, ...] = ()


class Flow(Calls, TorchDispatchMode):
    """Records, while entered, the steps of one forward; views of a tensor are no steps.

    A convolution, linear layer or norm is one step, all else is seen as operators below autograd.
    A module without children whose input no operator reads, as of a CUDA extension, is a step.

    Args:
        model: Model in eval mode and mode ``float``; it has hooks while this is entered.
        on_concat: Receives each concat along axis 1 and its tensors, after it ran.

    Attributes:
        steps: All steps, in order.
        names: Modules of the model and their names.
        problems: Layers whose weight and bias must stay as they are, and why.
        sizes: Name of each layer that ran, and the sum of the absolute values that it made.
    """

    def __init__(
        self,
        model: nn.Module,
        on_concat: Callable[[Step, list[Tensor]], Any] = lambda step, tensors: None,
    ) -> None:
        self.names: dict[nn.Module, str] = {m: n for n, m in model.named_modules()}
        super().__init__(self.names)
        self.steps: list[Step] = []
        self.problems: dict[nn.Module, str] = {}
        self.sizes: list[tuple[str, float]] = []
        self._model, self._on_concat = model, on_concat
        self._values: dict[int, tuple[Any, Value]] = {}
        self._owners: dict[int, nn.Module] = {}
        self._layer: nn.Module | None = None
        for layer in self.names:
            if isinstance(layer, (*CONVS, *NORMS)):
                self._judge(layer)

    def _judge(self, layer: nn.Module) -> None:
        problem = problem_alone(layer)
        for parameter in layer.parameters(recurse=False):
            other = self._owners.setdefault(storage_of(parameter), layer)
            if other is not layer:
                problem = f'it shares a weight with {self.names[other]}'
                self.problems.setdefault(other, f'it shares a weight with {self.names[layer]}')
        if problem:
            self.problems.setdefault(layer, problem)

    def close(self, result: Any) -> None:
        """Notes what outlives the forward.

        Args:
            result: What the forward returned.
        """
        returned = {storage_of(x) for x in tensors_in(result)}
        intermediate = [
            ref
            for key, (ref, value) in self._values.items()
            if key not in returned and value.maker and value.maker.kind != 'other'
        ]
        if not all(ref.expired() for ref in intermediate):
            gc.collect()  # what only cycles hold is not kept
        for ref, value in self._values.values():
            value.kept = not ref.expired()
        self._values.clear()
        runs = Counter(step.module for step in self.steps if step.kind == 'layer')
        for layer, count in runs.items():
            if count > 1:
                self.problems.setdefault(layer, f'it runs {count} times in a forward')

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._layer is None:
            self._record(func, args, kwargs, result)
        return result

    def _record(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        name = func._schema.name.partition('::')[2].rstrip('_')
        inputs = [] if name in NOT_READ else list(tensors_in((args, kwargs)))
        made, changed = list(tensors_in(result)), written(func, args, kwargs)
        known = {storage_of(x) for x in inputs}
        fresh = [y for y in made if storage_of(y) not in known]
        if made and not fresh and not changed:
            return  # a view
        module = self.innermost or self._model
        step = Step('other', f'{name} in {self._name(module)}', module)
        floats = [i for i, x in enumerate(inputs) if x.is_floating_point()]
        if name in ZEROS:
            step.kind = 'zeros'
        elif name == 'cat' and joins_channels(args, kwargs):
            step.kind, step.label = 'concat', self._name(module)
        elif (len(floats) == 1 or name in SLOPES) and keeps(name, args, kwargs):
            step.kind, step.source = 'keeps', floats[0]
            step.channels_at = tuple(a for a in (1, -1) if keeps_channels(name, args, a))
        elif len(floats) == 2 and name in FILLS and self._is_zero(inputs[floats[0]]):
            step.kind, step.source = 'keeps', floats[1]
        self._add(step, inputs, [*fresh, *changed])
        if step.kind == 'concat':
            self._on_concat(step, inputs)

    def entering(self, module: nn.Module, args: Any, kwargs: Any) -> list[tuple[Value, int]]:
        """Notes what a module is given, and how often that was read before."""
        given = [] if self._layer else [self._value(x) for x in tensors_in((args, kwargs))]
        if self._layer is None and isinstance(module, (*CONVS, *NORMS)):
            self._layer = module
        return [(value, len(value.reads)) for value in given]

    def leaving(self, module: nn.Module, args: Any, kwargs: Any, result: Any, note: Any) -> None:
        """Records a layer, or a module that has read or made tensors by no operator."""
        outputs = list(tensors_in(result))
        if self._layer is module:
            total = sum(float(y.double().abs().sum()) for y in outputs)
            self.sizes.append((self.names[module], total))
            self._layer = None
            step = Step('layer', self._name(module), module)
            self._add(step, tensors_in((args, kwargs)), outputs)
        elif self._layer is None and not any(module.children()):
            handed_on = {storage_of(y) for y in outputs}
            unread = {id(value) for value, count in note if len(value.reads) == count}
            hidden = [
                x
                for x in tensors_in((args, kwargs))
                if id(self._value(x)) in unread and storage_of(x) not in handed_on
            ]
            unmade = [y for y in outputs if storage_of(y) not in self._values]
            if hidden or unmade:
                self._add(Step('other', self._name(module), module), hidden, unmade)

    def _add(self, step: Step, inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> None:
        for x in inputs:
            owner = self._owners.get(storage_of(x))
            if owner is not None and owner is not step.module:
                self.problems.setdefault(owner, f'its weights are read by {step.label}, too')
            value = self._value(x)
            value.reads.append((step, len(step.inputs), Layout.of(x)))
            step.inputs.append(value)
        for y in outputs:
            old = self._values.get(storage_of(y))
            layout = Layout.of(y) if old is None else old[1].layout  # y may be a part of it
            value = self._note(y, Value(step, layout))
            step.outputs += [value] if y.is_floating_point() else []
        self.steps.append(step)

    def _value(self, x: Tensor) -> Value:
        """What the memory of a tensor holds now."""
        known = self._values.get(storage_of(x))
        return known[1] if known else self._note(x, Value(None, Layout.of(x)))

    def _note(self, x: Tensor, value: Value) -> Value:
        # The reference holds no data, but sees to it that no other memory gets the same key.
        self._values[storage_of(x)] = StorageWeakRef(x.untyped_storage()), value
        return value

    def _is_zero(self, x: Tensor) -> bool:
        maker = self._value(x).maker
        return maker is not None and maker.kind == 'zeros'

    def _name(self, module: nn.Module) -> str:
        return self.names[module] or type(module).__name__
