"""What the judges say of a file as a row; tables of rows, and the goals that they miss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

OURS, PEERS = 'ours', ('Model-Optimizer', 'NNCF')
#: Ours that may have UINT8 tensors.
OPENVINO = 'ours for OpenVINO'
#: What Model-Optimizer's conversion to FP16 makes of ours.
AUTOCAST = 'AutoCast of the float32 file'
#: dB that ours shall be better by, on every output.
MARGIN = 1.0


@dataclass
class Row:
    """What the judges say of one file.

    Attributes:
        name: Who made it, and how.
        sqnr: Of every output against float, dB.
        compiled: Summary of the compiler's verdict; empty if it was not asked.
        faster: Float's time over this one's in OpenVINO, median and quartiles; None if not timed.
        openvino_int8: Convolutions that OpenVINO runs in INT8, and all.
        openvino_sqnr: As ``sqnr``, measured in OpenVINO, which ``sqnr`` is for files that only it
            reads; None for those.
        against: SQNR of every output against the file that AutoCast read; None if it
            was made from another.
        casts: Number of Cast nodes.
        unsigned: Whether it has UINT8 tensors, or is no ONNX file: TensorRT computes something
            else, or cannot read it.
    """

    name: str
    sqnr: dict[str, float]
    compiled: dict[str, Any] = field(default_factory=dict)
    faster: tuple[float, float, float] | None = None
    openvino_int8: tuple[int, int] | None = None
    openvino_sqnr: dict[str, float] | None = None
    against: dict[str, float] | None = None
    casts: int = 0
    unsigned: bool = False


def decibels(values: dict[str, float] | None) -> str:
    """Formats one number per output."""
    return '' if values is None else ' / '.join(f'{v:.1f}' for v in values.values())


def verdict(row: Row) -> list[str]:
    """The compiler's cells: INT8 of all, kernels, megabytes written."""
    told = row.compiled
    if row.unsigned or not told:
        return ['', '', '']
    if not told['accepted']:
        return ['refused', '', '']
    written = told['activation_bytes']
    megabytes = '?' if written is None else f'{written / 1e6:.1f}'
    return [f'{told["int8"]} of {told["of"]}', str(told['kernels']), megabytes]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, numbers to the right."""
    lines = [head, ['---', *['--:'] * (len(head) - 1)], *rows]
    return ''.join(f'| {" | ".join(cells)} |\n' for cells in lines)


def int8_table(rows: Sequence[Row]) -> str:
    """Quantizers of one graph, a row each."""
    outputs = ' / '.join(rows[0].sqnr)
    head = [
        outputs,
        'SQNR, dB',
        'INT8',
        'kernels',
        'MB written',
        'in OpenVINO',
        'faster than float',
    ]
    cells = []
    for row in rows:
        times = '' if row.faster is None else '{:.2f} ({:.2f}-{:.2f})'.format(*row.faster)
        runs = '{} of {}'.format(*row.openvino_int8) if row.openvino_int8 else ''
        close = '' if row is rows[0] else decibels(row.sqnr)
        cells.append([row.name, close, *verdict(row), runs, times])
    return markdown(head, cells)


def typed_table(rows: Sequence[Row]) -> str:
    """Files typed FP16 of one graph, a row each; the first is the float32 file."""
    outputs = ' / '.join(rows[0].sqnr)
    head = [outputs, 'SQNR, dB', 'to the float32 file, dB', 'casts', 'INT8', 'kernels']
    cells = [
        [row.name, decibels(row.sqnr), decibels(row.against), str(row.casts), *verdict(row)]
        for row in rows
    ]
    return markdown([*head, 'MB written'], cells)


def missed(rows: Sequence[Row]) -> list[str]:
    """Compares ours with every peer: the first row, and for OpenVINO the one of that name.

    Returns:
        list of sentences, one per goal that is missed; empty if none is.
    """
    first = next(row for row in rows if row.name.startswith(OURS))
    unsigned = next((row for row in rows if row.name == OPENVINO), first)
    told = []
    for peer in rows:
        if not peer.name.startswith(PEERS):
            continue
        mine = unsigned if peer.unsigned else first
        exact = peer.openvino_sqnr is not None
        for name, value in ((mine.sqnr if exact else mine.openvino_sqnr) or {}).items():
            better = value - peer.sqnr[name]
            if not better >= MARGIN:
                told.append(f'{name}: {better:+.1f} dB to {peer.name}')
        if not peer.unsigned:
            told += _missed_by_compiler(mine.compiled, peer.compiled, peer.name)
    return told


def _missed_by_compiler(mine: dict[str, Any], its: dict[str, Any], name: str) -> list[str]:
    if not its['accepted']:
        return []
    if not mine['accepted']:
        return [f'refused by the compiler, unlike {name}']
    told = []
    if mine['int8'] < its['int8']:
        told.append(f'{mine["int8"]} layers in INT8, {name} has {its["int8"]}')
    if mine['kernels'] > its['kernels']:
        told.append(f'{mine["kernels"]} kernels, {name} has {its["kernels"]}')
    return told
