"""Random Q/DQ graphs in which float32 is exact, so that engines must agree to the last bit.

All scales are powers of two and all weights are small integers of them. A tensor is known by its
grid: every value is a multiple of ``step``, and none is larger than ``bound``. While their quotient
stays below 2**23, sums and products come out the same in any order.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from onnx import TensorProto, helper, numpy_helper

#: Opset of the graphs: the first that ONNX's own evaluator runs.
OPSET = 19
#: Largest quotient of bound and step for which float32 is exact, with a margin for sums.
EXACT = 2.0**22


@dataclass(frozen=True)
class Grid:
    """A tensor of the graph.

    Attributes:
        name: Its name.
        shape: (C, H, W), or (N, C) after flattening; the batch dimension is left out.
        step: All values are multiples of it.
        bound: Upper bound of the absolute values.
        positive: Whether no value is below 0.
    """

    name: str
    shape: tuple[int, ...]
    step: float
    bound: float
    positive: bool = False


@dataclass
class Maker:
    """Builds one random graph, operator by operator.

    Attributes:
        rng: Source of all choices.
        tied: Whether tensors that are joined get one scale.
    """

    rng: np.random.Generator
    nodes: list = field(default_factory=list)
    constants: list = field(default_factory=list)
    tensors: list = field(default_factory=list)
    ends: list = field(default_factory=list)

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def pick(self, choices):
        return choices[self.rng.integers(len(choices))]

    def constant(self, value) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value), f'c{len(self.constants)}'))
        return self.constants[-1].name

    def node(self, kind: str, *inputs: str, **attributes) -> str:
        name = f'{kind.lower()}{len(self.nodes)}'
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name, **attributes))
        return name

    def add(self, *args, **kwargs) -> Grid:
        self.tensors.append(Grid(*args, **kwargs))
        return self.tensors[-1]

    def round(self, x: Grid, scale: float | None = None, signed: bool | None = None) -> Grid:
        """Adds a Q/DQ pair; a few values are cut off."""
        scale = (
            2.0 ** np.floor(np.log2(x.bound / 127 * self.pick((0.5, 1, 2))))
            if scale is None
            else scale
        )
        signed = (not x.positive or self.chance(0.6)) if signed is None else signed
        dtype = np.int8 if signed else np.uint8
        ends = self.constant(np.float32(scale)), self.constant(dtype(0))
        y = self.node('DequantizeLinear', self.node('QuantizeLinear', x.name, *ends), *ends)
        least = 128 if signed else 255
        return Grid(
            y, x.shape, scale, min(least * scale, x.bound + scale), x.positive or not signed
        )

    def exact(self, x: Grid, factor: float) -> Grid:
        """Rounds a tensor if the sums of the next operator would not be exact."""
        return x if x.bound / x.step * factor < EXACT else self.round(x)

    def weights(self, shape, axis: int):
        """Adds per-channel or per-tensor INT8 weights; returns name, values."""
        largest = self.pick((1, 7, 127))
        integers = self.rng.integers(-largest, largest + 1, shape).astype(np.int8)
        count = shape[axis] if self.chance(0.7) else 1
        scale = 2.0 ** -self.rng.integers(4, 7, count).astype(np.float32)
        scale = scale if count > 1 or self.chance(0.5) and shape[axis] == 1 else scale.reshape(())
        zero = np.zeros(scale.shape, np.int8)
        axes = {'axis': axis} if scale.ndim else {}
        name = self.node(
            'DequantizeLinear',
            self.constant(integers),
            self.constant(scale),
            self.constant(zero),
            **axes,
        )
        wide = (
            scale.reshape([-1 if i == axis else 1 for i in range(len(shape))])
            if scale.ndim
            else scale
        )
        return name, integers * wide, float(scale.min())

    def conv(self, x: Grid) -> None:
        channels, height, width = x.shape
        depthwise = self.chance(0.2)
        outputs = channels if depthwise else int(self.pick((2, 4, 8, 16)))
        groups = channels if depthwise else 1
        kernel = int(self.pick((1, 3)))
        stride, pad, dilation = (
            int(self.pick((1, 1, 2))),
            int(self.pick((0, 1))),
            int(self.pick((1, 1, 2))),
        )
        if min(height, width) + 2 * pad < (kernel - 1) * dilation + 1:
            return
        transposed = self.chance(0.25) and max(height, width) < 10
        if transposed and kernel == 1:
            stride, pad = 1, 0  # OpenVINO is wrong on others, in float too
        shape = (
            (channels, outputs // groups, kernel, kernel)
            if transposed
            else (outputs, channels // groups, kernel, kernel)
        )
        if x.bound / x.step > 255 or self.chance(0.8):
            x = self.round(x)
        w, values, step = self.weights(shape, 1 if transposed and groups == 1 else 0)
        total = (
            np.abs(values).sum(axis=(0, 2, 3) if transposed else (1, 2, 3)).max()
            if groups == 1 or not transposed
            else np.abs(values).sum()
        )
        bias = []
        bound = x.bound * float(total)
        if self.chance(0.6):
            offsets = self.rng.integers(-100, 100, outputs).astype(np.float32) * np.float32(
                x.step * step
            )
            bias, bound = [self.constant(offsets)], bound + float(np.abs(offsets).max())
        if bound / (x.step * step) > 2 * EXACT or not bound:
            return
        kind = 'ConvTranspose' if transposed else 'Conv'
        y = self.node(
            kind,
            x.name,
            w,
            *bias,
            kernel_shape=[kernel] * 2,
            strides=[stride] * 2,
            pads=[pad] * 4,
            dilations=[dilation] * 2,
            group=groups,
        )
        extent = (kernel - 1) * dilation + 1
        size = [
            (n - 1) * stride - 2 * pad + extent
            if transposed
            else (n + 2 * pad - extent) // stride + 1
            for n in (height, width)
        ]
        if min(size) < 1:
            self.nodes.pop()
            return
        y = self.add(y, (outputs, *size), x.step * step, bound)
        if self.chance(0.6):
            self.relu(y)

    def relu(self, x: Grid) -> None:
        kind = 'Relu'
        self.add(self.node(kind, x.name), x.shape, x.step, x.bound, True)

    def join(self, x: Grid) -> None:
        """Concat by channels, of tensors rounded with one scale, with several, or not at all."""
        others = [t for t in self.tensors if t.shape[1:] == x.shape[1:] and len(t.shape) == 3]
        parts = [x] + [self.pick(others) for _ in range(self.rng.integers(1, 3))]
        style = self.pick(('tied', 'tied', 'untied', 'float'))
        scale = 2.0 ** np.floor(np.log2(max(p.bound for p in parts) / 127))
        if style != 'float':
            parts = [self.round(p, scale if style == 'tied' else None) for p in parts]
            if self.chance(0.3):
                parts = [self.pool(p) if self.chance(0.5) else p for p in parts]
                smallest = [min(p.shape[i] for p in parts) for i in (1, 2)]
                parts = [p for p in parts if list(p.shape[1:]) == smallest]
        shape = (sum(p.shape[0] for p in parts), *parts[0].shape[1:])
        step, bound = min(p.step for p in parts), max(p.bound for p in parts)
        if shape[0] > 32 or bound / step > EXACT:
            return
        y = self.node('Concat', *(p.name for p in parts), axis=1)
        y = self.add(y, shape, step, bound, all(p.positive for p in parts))
        if style == 'tied' and self.chance(0.6):
            self.tensors.append(self.round(y, scale))

    def sum(self, x: Grid) -> None:
        others = [t for t in self.tensors if t.shape == x.shape]
        parts = [x, self.pick(others)]
        parts = [self.round(p) if self.chance(0.5) else p for p in parts]
        step, bound = min(p.step for p in parts), sum(p.bound for p in parts)
        if bound / step > EXACT:
            return
        y = self.add(
            self.node('Add', *(p.name for p in parts)),
            x.shape,
            step,
            bound,
            all(p.positive for p in parts),
        )
        if self.chance(0.5):
            self.relu(y)

    def pool(self, x: Grid) -> Grid:
        if min(x.shape[1:]) < 2:
            return x
        size = tuple(n // 2 for n in x.shape[1:])
        kind = 'MaxPool' if self.chance(0.7) or x.bound / x.step * 4 > EXACT else 'AveragePool'
        y = self.node(kind, x.name, kernel_shape=[2, 2], strides=[2, 2])
        return self.add(
            y, (x.shape[0], *size), x.step / (4 if kind != 'MaxPool' else 1), x.bound, x.positive
        )

    def resize(self, x: Grid) -> None:
        if max(x.shape[1:]) > 8 or x.bound / x.step * 16 > EXACT:
            return
        mode = self.pick(('nearest', 'linear'))
        sizes = self.constant(np.array([1, 1, 2, 2], np.float32))
        options = (
            dict(nearest_mode='floor', coordinate_transformation_mode='asymmetric')
            if mode == 'nearest'
            else dict(coordinate_transformation_mode='half_pixel')
        )
        y = self.node('Resize', x.name, '', sizes, mode=mode, **options)
        self.add(
            y,
            (x.shape[0], *(2 * n for n in x.shape[1:])),
            x.step / (1 if mode == 'nearest' else 16),
            x.bound,
            x.positive,
        )

    def slice(self, x: Grid) -> None:
        axis = int(self.pick((1, 1, 2, 3)))
        size = x.shape[axis - 1]
        if size < 2:
            return
        cut = int(self.rng.integers(1, size))
        ends = [(0, cut), (cut, size)] if self.chance(0.7) else [(0, cut)]
        for low, high in ends:
            y = self.node(
                'Slice',
                x.name,
                *(self.constant(np.array([v], np.int64)) for v in (low, high, axis, 1)),
            )
            shape = list(x.shape)
            shape[axis - 1] = high - low
            self.add(y, tuple(shape), x.step, x.bound, x.positive)

    def pad(self, x: Grid) -> None:
        before, after = self.rng.integers(0, 2, 2)
        pads = self.constant(np.array([0, 0, before, 0, 0, 0, 0, after], np.int64))
        value = self.pick((0, 0, -3, 5)) * x.step
        y = self.node('Pad', x.name, pads, self.constant(np.float32(value)))
        self.add(
            y,
            (x.shape[0], int(x.shape[1] + before), int(x.shape[2] + after)),
            x.step,
            max(x.bound, abs(value)),
            x.positive and value >= 0,
        )

    def mul(self, x: Grid) -> None:
        shape = self.pick(((), (1, x.shape[0], 1, 1)))
        factor = self.rng.choice(np.float32([0.5, 1, 2]), shape)
        if x.bound / x.step * 4 > EXACT:
            return
        y = self.node('Mul', x.name, self.constant(np.asarray(factor, np.float32)))
        self.add(y, x.shape, x.step / 2, x.bound * 2, x.positive)

    def shift(self, x: Grid) -> None:
        """Adds a constant: one number, one per channel, or one per place."""
        shape = self.pick(((), (x.shape[0], 1, 1), (1, 1, 1, x.shape[2])))
        offset = self.rng.integers(-9, 10, shape) * np.float32(x.step)
        bound = x.bound + 9 * x.step
        positive = x.positive and bool((offset >= 0).all())
        y = self.node('Add', x.name, self.constant(np.asarray(offset, np.float32)))
        self.add(y, x.shape, x.step, bound, positive)

    def product(self, x: Grid) -> None:
        """MatMul with weights, or of two rounded tensors."""
        if self.chance(0.5):
            x = self.round(x)
            w, values, step = self.weights((x.shape[2], 4), 1)
            bound = x.bound * float(np.abs(values).sum(0).max())
            shape = (*x.shape[:2], 4)
        else:
            y, x = self.round(x), self.round(x)
            turned = self.node('Transpose', y.name, perm=[0, 1, 3, 2])
            w, step, bound, shape = (
                turned,
                y.step,
                x.bound * y.bound * x.shape[2],
                (*x.shape[:2], x.shape[1]),
            )
        if not bound or bound / (x.step * step) > EXACT:
            return
        self.ends.append(Grid(self.node('MatMul', x.name, w), shape, x.step * step, bound))

    def read_twice(self, x: Grid) -> None:
        """Two convolutions with roundings of their own read one tensor."""
        for _ in range(2):
            self.conv(x)

    def requantize(self, x: Grid) -> None:
        self.tensors.append(self.round(x))


STEPS = ('conv',) * 5 + (
    'relu',
    'join',
    'join',
    'join',
    'sum',
    'sum',
    'pool',
    'resize',
    'slice',
    'pad',
    'mul',
    'shift',
    'product',
    'read_twice',
    'requantize',
)


def random_graph(seed: int):
    """Builds a graph and inputs for it.

    Returns:
        Tuple of the model and its inputs by name.
    """
    m = Maker(np.random.default_rng(seed))
    channels, size = int(m.pick((3, 4, 8))), [int(n) for n in m.rng.integers(5, 10, 2)]
    inputs = {}
    for i in range(m.rng.integers(1, 3)):
        scale = 2.0**-7
        values = m.rng.integers(-400, 401, (1, channels, *size))
        inputs[f'x{i}'] = (values * scale).astype(np.float32)
        m.add(f'x{i}', (channels, *size), scale, 400 * scale)
    m.conv(m.pick(m.tensors))
    for _ in range(m.rng.integers(3, 9)):
        recent = m.tensors[-4:] if m.chance(0.7) else m.tensors
        getattr(m, str(m.pick(STEPS)))(m.pick(recent))
    read = {i for node in m.nodes for i in node.input}
    inputs = {n: v for n, v in inputs.items() if n in read}
    shapes = {t.name: t.shape for t in m.tensors + m.ends}
    ends = [n.output[0] for n in m.nodes if n.output[0] not in read and n.output[0] in shapes]
    made = [n.output[0] for n in m.nodes if n.output[0] in shapes and n.output[0] not in ends]
    if made and (not ends or m.chance(0.3)):  # all of them may be read by what leads nowhere
        ends.append(m.pick(made))
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        m.nodes,
        'random',
        [info(n, TensorProto.FLOAT, v.shape) for n, v in inputs.items()],
        [info(n, TensorProto.FLOAT, (1, *shapes[n])) for n in ends],
        m.constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', OPSET)], ir_version=9)
    return model, inputs
