"""Random Q/DQ graphs: layers, moves, joins and arithmetic in any order, sometimes with a defect."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.engines.qdq import QDQ, SIZE

#: Share of graphs with something that engines refuse, which hides the rest.
REFUSED = 0.1


@dataclass(frozen=True)
class Tensor:
    name: str
    channels: int
    height: int
    width: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return 1, self.channels, self.height, self.width


class Generator:
    """Grows a graph; every step reads the newest tensor, joins an older one, too.

    Args:
        seed: Of the choices.
        channels: Of the input.
        half: Whether the graph is typed FP16.
    """

    def __init__(self, seed: int, channels: int, half: bool):
        self.g = QDQ(channels=channels, half=half)
        self.rng = np.random.default_rng(seed)
        self.made = [Tensor('x', channels, SIZE, SIZE)]

    def often(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def one_of(self, options):
        return options[self.rng.integers(len(options))]

    def run(self, steps: int) -> str:
        """Takes steps, the last of them a layer; returns the output."""
        kinds = (self.conv, self.conv, self.conv, self.move, self.move, self.arithmetic, self.join)
        for _ in range(steps):
            self.one_of(kinds)(self.made[-1])
        self.one_of((self.conv, self.product))(self.made[-1])
        self.prune()
        return self.made[-1].name

    def add(self, name: str, channels: int, height: int, width: int) -> None:
        self.made.append(Tensor(name, channels, height, width))

    def node(self, kind: str, x: Tensor, *more: str, size=None, **attributes) -> None:
        y = self.g.node(kind, x.name, *more, **attributes)
        self.add(y, *(size or x.shape[1:]))

    # Q and DQ

    def qdq(self, x: str, share: float = 0.85, fitting: bool = True) -> str:
        """Q and DQ of an activation, or not; of few scales, so that some are equal."""
        if not self.often(share):
            return x
        scale = self.one_of((0.1, 0.1, 0.2))
        kind = self.rng.random()
        if kind < 0.03:
            return self.g.qdq(x, [scale])
        if kind < 0.06:
            channels = next((t.channels for t in self.made if t.name == x), 0)
            return self.g.qdq(x, [scale] * channels, axis=1) if channels and fitting else x
        return self.g.qdq(x, scale, zero=3 if self.often(REFUSED / 8) else 0)

    def weight(self, shape: tuple[int, ...], axis: int) -> str:
        """A stored weight: float, or with scales of one kind or another, moved or not."""
        kind = self.rng.random()
        moved = self.often(0.15)
        if moved:
            shape = (shape[1], shape[0], *shape[2:])
            axis = 1 - axis if axis in (0, 1) else axis
        w = self.g.weight(*shape)
        if kind < 0.1:
            pass
        elif kind < 0.2:
            w = self.g.qdq(w, 0.01)
        else:
            axis = 1 - axis if self.often(0.07) else axis
            axis -= len(shape) if self.often(0.2) else 0
            w = self.g.qdq(w, [0.01] * shape[axis], axis=axis)
        if moved:
            w = self.g.node('Transpose', w, perm=[1, 0, *range(2, len(shape))])
        if self.often(0.05):
            w = self.g.node('Relu', w)
        return w

    # Steps

    def conv(self, x: Tensor) -> None:
        k = self.one_of((1, 3))
        size = min(x.height, x.width)
        stride = 2 if size > 4 and self.often(0.2) else 1
        group = x.channels if self.often(0.1) else 1
        out = x.channels if group > 1 else self.one_of((self.g.channels, 2 * self.g.channels))
        if self.often(0.06):
            w = self.weight((x.channels, out, 2, 2), 1) if group == 1 else None
            if w is not None:
                y = self.g.node('ConvTranspose', self.qdq(x.name), w, strides=[2, 2])
                return self.add(y, out, 2 * x.height, 2 * x.width)
        if group > 1:  # its weight has one input channel
            w = self.g.weight(out, 1, k, k)
            w = self.g.qdq(w, [0.01] * out, axis=0) if self.often(0.8) else w
        else:
            w = self.weight((out, x.channels, k, k), 0)
        bias = []
        if self.often(0.3):
            b = self.g.weight(out)
            bias = [self.g.qdq(b, 0.01) if self.often(0.2) else b]
        y = self.g.node(
            'Conv', self.qdq(x.name), w, *bias, pads=[k // 2] * 4, strides=[stride] * 2, group=group
        )
        self.add(y, out, (x.height - 1) // stride + 1, (x.width - 1) // stride + 1)
        if self.often(0.2):
            ones = [self.g.constant(np.ones(out, self.g.real)) for _ in range(4)]
            self.node('BatchNormalization', self.made[-1], *ones)
        if self.often(0.6):
            self.node('Relu', self.made[-1])

    def product(self, x: Tensor) -> None:
        """A product with a matrix over the channels."""
        y = self.g.node('Transpose', self.qdq(x.name, 0.3), perm=[0, 2, 3, 1])
        y = self.g.node('Reshape', y, self.g.constant(np.array([-1, x.channels])))
        kind = self.one_of(('MatMul', 'Gemm'))
        w = self.weight((x.channels, 16), 1)
        self.add(self.g.node(kind, self.qdq(y, fitting=False), w), 16, 1, 1)

    def move(self, x: Tensor) -> None:
        """An op that moves values, of a dequantized tensor or not."""
        c, h, w = x.shape[1:]
        x = Tensor(self.qdq(x.name, 0.6), c, h, w)
        store = self.g.constant
        kind = self.rng.integers(13)
        if kind == 0:
            self.node('Transpose', x, size=(c, w, h), perm=[0, 1, 3, 2])
        elif kind == 1 and min(h, w) >= 4:
            options = dict(kernel_shape=[2, 2], strides=[2, 2])
            self.node('MaxPool', x, size=(c, h // 2, w // 2), **options)
        elif kind == 2 and min(h, w) >= 4:
            bounds = (store(np.array([v])) for v in (0, h // 2, 2))
            self.node('Slice', x, *bounds, size=(c, h // 2, w))
        elif kind == 3:
            pads = store(np.array([0, 0, 1, 1, 0, 0, 1, 1]))
            self.node('Pad', x, pads, size=(c, h + 2, w + 2))
        elif kind == 4 and c % 4 == 0 and c > 4:
            self.node('DepthToSpace', x, size=(c // 4, 2 * h, 2 * w), blocksize=2)
        elif kind == 5 and h % 2 == 0 and w % 2 == 0:
            self.node('SpaceToDepth', x, size=(4 * c, h // 2, w // 2), blocksize=2)
        elif kind == 6:
            self.node('Mul', x, store(self.g.real(0.5)))
        elif kind == 7:
            self.node('Reshape', x, store(np.array([1, c, w, h])), size=(c, w, h))
        elif kind == 8:
            pads = store(np.array([0, 0, 1, 1, 0, 0, 1, 1]))
            self.node('Pad', x, pads, size=(c, h + 2, w + 2), mode='edge')
        elif kind == 9 and h < 2 * SIZE:
            self.node('Tile', x, store(np.array([1, 1, 2, 1])), size=(c, 2 * h, w))
        elif kind == 10 and h >= 4:
            self.node('Gather', x, store(np.arange(h - 1)), size=(c, h - 1, w), axis=2)
        elif kind == 11:
            self.node('Neg', x)
        else:
            self.node('Identity', x)

    def arithmetic(self, x: Tensor) -> None:
        """An op that makes other values, of a dequantized tensor or not."""
        c, h, w = x.shape[1:]
        x = Tensor(self.qdq(x.name, 0.4), c, h, w)
        kind = self.rng.integers(6)
        if kind == 0 and min(h, w) >= 4:
            options = dict(kernel_shape=[2, 2], strides=[2, 2])
            self.node('AveragePool', x, size=(c, h // 2, w // 2), **options)
        elif kind == 1:
            self.node('Sigmoid', x)
        elif kind == 2:
            self.node('Clip', x, *(self.g.constant(self.g.real(v)) for v in (0, 6)))
        elif kind == 3:
            self.node('LeakyRelu', x, alpha=0.1)
        elif kind == 4:
            self.node('Add', x, self.g.constant(self.g.real(0.5)))
        else:
            self.node('Relu', x)

    def join(self, x: Tensor) -> None:
        """An add or a concat with an older tensor, each with Q/DQ or not."""
        add = self.often(0.5)
        sizes = [t.shape if add else t.shape[2:] for t in self.made[:-1]]
        wanted = x.shape if add else x.shape[2:]
        fitting = [t for t, size in zip(self.made, sizes) if size == wanted and t.name != x.name]
        if not fitting or x.channels > 8 * self.g.channels:
            return
        other = self.one_of(fitting)
        share = self.one_of((0.0, 0.5, 1.0))
        names = [self.qdq(t.name, share) for t in (x, other)]
        if add:
            self.add(self.g.node('Add', *names), *x.shape[1:])
        else:
            y = self.g.node('Concat', *names, axis=1)
            self.add(y, x.channels + other.channels, x.height, x.width)

    def prune(self) -> None:
        """Removes what the output does not need."""
        needed, kept = {self.made[-1].name}, []
        for node in reversed(self.g.nodes):
            if needed.intersection(node.output):
                kept.insert(0, node)
                needed.update(node.input)
        self.g.nodes = kept


def generate(seed: int, channels: int, half: bool) -> tuple[QDQ, str]:
    """Makes a graph; returns it and the name of its output."""
    generator = Generator(seed, channels, half)
    return generator.g, generator.run(int(generator.rng.integers(2, 8)))
