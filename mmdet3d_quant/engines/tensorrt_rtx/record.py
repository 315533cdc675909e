"""What the compiler made of a file: its kernels, and the type in which each layer runs."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

from onnx import ModelProto

#: Operators that multiply matrices: what INT8 makes faster.
PRODUCTS = ('Conv', 'ConvTranspose', 'Gemm', 'MatMul')
#: Kinds in the log that wait for each other and compute nothing.
_WAITING = ('signal', 'wait')
#: Kind of the kernels that are generated around a product: bias, activation, rounding.
_POINTWISE = 'kgen'
#: Kind of the kernels that are generated with a product in them. One that casts, which its name
#: tells, reads integers and multiplies reals.
_GENERATED = 'runtime_fusion'
#: Bits of a number, by the name of its type in the log.
_BITS = {
    'Float': 32,
    'Half': 16,
    'BFloat16': 16,
    'FP8': 8,
    'Int8': 8,
    'UInt8': 8,
    'Bool': 8,
    'Int4': 4,
    'Int32': 32,
    'Int64': 64,
}


@dataclass(frozen=True)
class Kernel:
    """A layer of the engine.

    Attributes:
        name: As the compiler calls it.
        kind: Such as ``correlation`` (a convolution), ``gemm`` or ``kgen`` (generated pointwise).
        inputs: Types of the tensors it reads, in the compiler's words, without vectors behind the
            first, as a bias is; of stored ones only the first, where it reads no others.
        outputs: Types of the tensors it writes.
        made_of: Names of the nodes of the file that went into it.
        written: Bytes of its outputs; None if a type or a size is not known.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    made_of: tuple[str, ...]
    written: int | None


@dataclass(frozen=True)
class Product:
    """A convolution or matrix multiplication of the file.

    Attributes:
        name: Of its node.
        op: Its operator.
        runs_in: ``Int8``, ``FP8``, ``Float``, ...; several, joined by ``+``, if its inputs differ;
            empty if no kernel of the engine multiplies for it, as for a product of constants.
        output: The tensor that it makes.
    """

    name: str
    op: str
    runs_in: str
    output: str


@dataclass(frozen=True)
class Compiled:
    """The compiler's verdict on one file for one GPU generation.

    Attributes:
        sm: The generation, such as ``SM86``.
        accepted: Whether there is an engine.
        error: Why there is none, in the compiler's words; empty if there is one.
        warnings: Of the compiler, each once.
        products: Convolutions and matrix multiplications in the order of the file.
        layers: Kernels of the engine in the order of running.
        engine_bytes: Size of the engine.
        seconds: Time it took to parse and compile.
        version: Of the compiler; empty if it did not live to tell.
    """

    sm: str
    accepted: bool
    error: str = ''
    warnings: tuple[str, ...] = ()
    products: tuple[Product, ...] = ()
    layers: tuple[Kernel, ...] = ()
    engine_bytes: int = 0
    seconds: float = 0.0
    version: str = ''

    @property
    def int8(self) -> int:
        """Number of products that run in INT8."""
        return sum(product.runs_in == 'Int8' for product in self.products)

    @property
    def fp8(self) -> int:
        """Number of products that run in FP8."""
        return sum(product.runs_in == 'FP8' for product in self.products)

    @property
    def kernels(self) -> int:
        """Number of kernels."""
        return len(self.layers)

    @property
    def activation_bytes(self) -> int | None:
        """Bytes that the kernels write in one run; None if one of them cannot be counted."""
        written = [layer.written for layer in self.layers]
        return None if None in written else sum(bytes_ or 0 for bytes_ in written)

    def summary(self) -> dict[str, Any]:
        """Describes the verdict as plain values, for a manifest or a report.

        Returns:
            dict of ``accepted`` and ``warnings``; with ``error`` if it was refused, else with
            ``int8`` and ``fp8`` (counts) ``of`` all products, those ``not_in_int8``, ``kernels``,
            ``activation_bytes``, ``engine_bytes`` and ``seconds``.
        """
        told = dict(accepted=self.accepted, warnings=list(self.warnings))
        if not self.accepted:
            return dict(told, error=self.error)
        return dict(
            told,
            int8=self.int8,
            fp8=self.fp8,
            of=len(self.products),
            not_in_int8=[asdict(p) for p in self.products if p.runs_in != 'Int8'],
            kernels=self.kernels,
            activation_bytes=self.activation_bytes,
            engine_bytes=self.engine_bytes,
            seconds=round(self.seconds, 3),
        )


def read_layers(log: str) -> tuple[Kernel, ...]:
    """Reads the kernels from the compiler's log.

    Args:
        log: The message that begins with ``Layers:``.

    Returns:
        tuple of kernels in the order of running, without those that only wait.

    Raises:
        ValueError: If a line has another form; such a log is not counted.
    """
    lines = [line for line in log.split('\n') if line.startswith('Name: ')]
    kernels = [_kernel(line) for line in lines]
    return tuple(kernel for kernel in kernels if kernel.kind not in _WAITING)


def read_products(model: ModelProto, layers: tuple[Kernel, ...]) -> tuple[Product, ...]:
    """Finds the type in which each product of a file runs.

    A product runs in the type of what is read by the kernels that multiply for it: those that name
    its node as an origin and are not generated pointwise. A generated kernel that casts what it
    reads before it multiplies runs in the type of what it writes.

    Args:
        model: The file, with a name of its own for every node.
        layers: Kernels of its engine.

    Returns:
        tuple of products in the order of the file.
    """
    types: dict[str, set[str]] = {}
    for layer in layers:
        if layer.kind != _POINTWISE:
            for node in layer.made_of:
                types.setdefault(node, set()).update(_multiplied(layer))
    return tuple(
        Product(node.name, node.op_type, '+'.join(sorted(types.get(node.name, ()))), node.output[0])
        for node in model.graph.node
        if node.op_type in PRODUCTS
    )


def _multiplied(layer: Kernel) -> tuple[str, ...]:
    """Types in which a kernel multiplies."""
    if layer.kind == _GENERATED and 'Cast' in layer.name:
        return tuple(type_ for type_ in layer.outputs if type_ != 'Int8') or ('Float',)
    return layer.inputs


_LINE = re.compile(
    r'Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], '
    r'Constants: \[(?P<constants>.*?)\], Outputs: \[(?P<outputs>.*?)\], TacticName: .*?'
    r', Metadata: ?(?P<made_of>.*)$'
)
#: Origins are apart by a control character, at which `str.splitlines` would cut.
_ORIGIN = re.compile(r'\[ONNX Layer: (.*?)\](?=[\x1e\x1f[]|$)')
_TENSOR = re.compile(r'\{ Name: .*?, Dimensions: \[([-\d,]*)\], .*?Datatype: (\w+)')


def _kernel(line: str) -> Kernel:
    """Reads a kernel from its line."""
    parts = _LINE.match(line)
    if parts is None:
        raise ValueError(f'a line of another form: {line[:100]}')
    inputs, constants, outputs = (
        _TENSOR.findall(parts[part]) for part in ('inputs', 'constants', 'outputs')
    )
    return Kernel(
        parts['name'],
        parts['kind'],
        tuple(
            t for i, (sizes, t) in enumerate(inputs or constants[:1]) if not (i and _thin(sizes))
        ),
        tuple(type_ for _, type_ in outputs),
        tuple(_ORIGIN.findall(parts['made_of'].strip())),
        _bytes(outputs),
    )


def _thin(sizes: str) -> bool:
    """Whether a tensor has at most one size that is not 1."""
    return sum(size != '1' for size in sizes.split(',')) <= 1


def _bytes(tensors: list[tuple[str, str]]) -> int | None:
    """Adds up the bytes of tensors, given as sizes and type; None if one cannot be counted."""
    total = 0
    for sizes, type_ in tensors:
        shape = [int(size) for size in sizes.split(',') if size]
        if type_ not in _BITS or any(size < 0 for size in shape):
            return None
        total += math.ceil(math.prod(shape) * _BITS[type_] / 8)
    return total
