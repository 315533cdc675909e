"""Random graphs of shapes, constants and branches, as exporters and people write them."""

import numpy as np
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
INT, FLOAT = TensorProto.INT64, TensorProto.FLOAT
#: Operators of two whole numbers.
ARITHMETIC = ('Add', 'Sub', 'Mul', 'Div', 'Mod')


class Maker:
    """Builds a graph of ``x`` (2, 3, 4) by random steps; every tensor may become an output."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.nodes, self.constants = [], []
        self.whole, self.floats = [], ['x']  # int64 (1,); float of any shape

    def pick(self, choices):
        return choices[self.rng.integers(len(choices))]

    def constant(self, value):
        """Stores a value, as an initializer or in a Constant node."""
        name = f'c{len(self.constants) + len(self.nodes)}'
        tensor = numpy_helper.from_array(np.asarray(value), name)
        if self.rng.random() < 0.3:
            self.nodes.append(helper.make_node('Constant', [], [name], value=tensor))
        else:
            self.constants.append(tensor)
        return name

    def node(self, kind, *inputs, **attributes):
        name = f'{kind.lower()}{len(self.nodes)}'
        self.nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def number(self):
        """An int64 of shape (1,)."""
        if not self.whole or self.rng.random() < 0.4:
            self.whole.append(self.constant(np.int64([self.pick((-7, -3, -2, -1, 1, 2, 3, 5))])))
        return self.pick(self.whole)

    def size(self):
        shape = self.node('Shape', self.pick(self.floats))
        self.whole.append(self.node('Gather', shape, self.constant(np.int64([0]))))

    def arithmetic(self):
        kind = self.pick(ARITHMETIC)
        other = self.constant(np.int64([self.pick((-4, -2, 2, 3))]))  # never 0
        self.whole.append(self.node(kind, self.number(), other))

    def choose(self):
        smaller = self.node('Less', self.number(), self.number())
        self.whole.append(self.node('Where', smaller, self.number(), self.number()))

    def cast(self):
        small = self.node('Cast', self.number(), to=TensorProto.INT32)
        self.whole.append(self.node('Cast', small, to=INT))

    def same(self):
        """Identity of anything, of constants and of others of its kind, too."""
        where = self.pick([w for w in (self.whole, self.floats) if w])
        where.append(self.node('Identity', self.pick(where)))

    def stored(self):
        self.floats.append(self.constant(np.float32(self.rng.standard_normal(4))))

    def flatten(self):
        minus = self.constant(np.int64([-1]))
        self.floats.append(self.node('Reshape', self.pick(self.floats), minus))

    def scale(self):
        self.floats.append(
            self.node(
                'Mul',
                self.pick(self.floats),
                self.constant(np.float32([0.5, 3][: self.pick((1, 1))])),
            )
        )

    def number_as_float(self):
        self.floats.append(self.node('Cast', self.number(), to=FLOAT))

    def branch(self):
        """An If whose branches read tensors of the graph around them."""
        made = [self.pick(self.floats), self.pick(self.floats)]
        bodies = [
            helper.make_graph(
                [helper.make_node('Neg', [source], ['out'])],
                body,
                [],
                [helper.make_tensor_value_info('out', FLOAT, None)],
            )
            for source, body in zip(made, ('then', 'other'))
        ]
        total = self.node('ReduceSum', 'x', keepdims=0)
        test = self.node('Less', total, self.constant(np.float32(0)))
        name = self.node('If', test, then_branch=bodies[0], else_branch=bodies[1])
        self.ends.append(name)


STEPS = (
    ('size',) * 3
    + ('arithmetic',) * 4
    + (
        'choose',
        'cast',
        'same',
        'same',
        'stored',
        'flatten',
        'scale',
        'number_as_float',
        'branch',
    )
)


def shape_graph(seed):
    """Builds a graph and its input.

    Returns:
        Tuple of the model and ``{'x': array}``.
    """
    m = Maker(seed)
    m.ends = []
    for _ in range(int(m.rng.integers(2, 14))):
        getattr(m, str(m.pick(STEPS)))()
    ends = list(dict.fromkeys([*m.ends, m.pick(m.floats), *(m.whole and [m.pick(m.whole)])]))
    ends = [e for e in ends if e != 'x'] or [m.node('Identity', 'x')]
    outputs = [helper.make_tensor_value_info(e, INT if e in m.whole else FLOAT, None) for e in ends]
    inputs = [helper.make_tensor_value_info('x', FLOAT, [2, 3, 4])]
    graph = helper.make_graph(m.nodes, 'shapes', inputs, outputs, m.constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', OPSET)], ir_version=9)
    return model, {'x': m.rng.standard_normal((2, 3, 4)).astype(np.float32)}
