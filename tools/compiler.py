"""NVIDIA's compiler in the tools: compiles exported files, and tells what it makes of files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from mmdet3d_quant.check.compiled import disagreements, groups, megabytes
from mmdet3d_quant.check.lint import Graph
from mmdet3d_quant.core.formats import FP8
from mmdet3d_quant.core.modes import quantizers
from mmdet3d_quant.engines import EngineError
from mmdet3d_quant.engines.tensorrt_rtx import SMS, Compiled, compile_onnx, is_installed
from mmdet3d_quant.engines.tensorrt_rtx.compiler import DEFAULT_SMS, FP8_SMS, INSTALL
from mmdet3d_quant.export.deploy import is_built
from mmdet3d_quant.export.manifest import add_to_manifest
from mmdet3d_quant.export.targets import target_of


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--compile`` and ``--no-compile``."""
    parser.add_argument(
        '--compile',
        nargs='+',
        choices=SMS,
        metavar='SM',
        help="GPU generations to try the files on with NVIDIA's compiler (TensorRT for RTX, needs "
        f'no GPU); default where it is installed: {" ".join(DEFAULT_SMS)}',
    )
    parser.add_argument(
        '--no-compile', action='store_const', dest='compile', const=[], help='do not compile'
    )


def check_generations(model: nn.Module, wanted: list[str] | None) -> None:
    """Checks that GPU generations which are asked for run the number formats of a model.

    Raises:
        ValueError: If one has no FP8, and a quantizer is FP8; names both.
    """
    names = [n for n, q in quantizers(model).items() if q.spec.format == FP8 and q.calibrated]
    old = [sm for sm in wanted or () if sm not in FP8_SMS]
    if names and old:
        raise ValueError(
            f'{names[0]} is {FP8.name}, which {old[0]} does not run: leave it out of --compile '
            f'({", ".join(FP8_SMS)} do), or set `format` of its part to int8 and calibrate again'
        )


def compile_exported(
    console: Console, folder: str, manifest: dict[str, Any], wanted: list[str] | None
) -> None:
    """Compiles the files of an exported folder, and tells the result there and on the console.

    Args:
        console: Where to tell.
        folder: The folder; its manifest gets an entry ``compiled``.
        manifest: Of the folder.
        wanted: GPU generations; empty: none; None: the default, where the compiler is installed.

    Raises:
        EngineError: If the compiler refuses a file, after all are compiled; the files stay.
    """
    if wanted == []:
        return
    if not target_of(manifest['target']).compiled:
        if wanted:
            console.print(f'Not compiled: the files are for {manifest["target"]}')
        return
    if wanted is None and not is_installed():
        console.print(f"Not compiled: NVIDIA's compiler is not installed ({INSTALL})")
        return
    verdicts = {}
    for name, entry in manifest['files'].items():
        if not is_built(entry):
            continue  # libspconv reads it
        if 'CustomLayerNormalization' in entry['nodes']:
            console.print(f"{name}: not compiled, since its layer norm is TensorRT's plugin")
            continue
        if 'custom_ops' in entry:
            console.print(f'{name}: not compiled, since it needs plugins')
            continue
        console.print(f'Compiling {name}')
        fp8 = FP8.name in manifest.get('precision', '').split('+')
        default = [sm for sm in DEFAULT_SMS if sm in FP8_SMS or not fp8]
        verdicts[name] = compile_onnx(Path(folder) / name, wanted or default)
    if not verdicts:
        return
    tried = [verdict for of_file in verdicts.values() for verdict in of_file.values()]
    version = next((verdict.version for verdict in tried if verdict.version), '')
    summaries = {
        name: {sm: verdict.summary() for sm, verdict in of_file.items()}
        for name, of_file in verdicts.items()
    }
    add_to_manifest(folder, compiled=dict(version=version, files=summaries))
    console.print(compiled_table(verdicts, version))
    refused = [
        f'{name} ({sms}): {verdict.error}'
        for name, of_file in verdicts.items()
        for sms, verdict in groups(of_file)
        if not verdict.accepted
    ]
    if refused:
        told = '\n  '.join(refused)
        raise EngineError(f"NVIDIA's compiler refuses files, which stay in {folder}:\n  {told}")


def compiled_table(verdicts: dict[str, dict[str, Compiled]], version: str) -> Table:
    """Lists what the compiler made of files; generations with equal results share a row."""
    table = Table(title=f"NVIDIA's compiler (TensorRT for RTX {version}); compiled, not run")
    table.add_column('file', no_wrap=True)
    for heading in ('GPUs', 'verdict', 'convs + matmuls\nin INT8'):
        table.add_column(heading)
    for heading in ('kernels', 'activations\nwritten, MB'):
        table.add_column(heading, justify='right')
    for name, of_file in verdicts.items():
        for sms, verdict in groups(of_file):
            row = ['refused', '', '', '']
            if verdict.accepted:
                fp8 = f' + {verdict.fp8} FP8' if verdict.fp8 else ''
                counts = f'{verdict.int8}{fp8} of {len(verdict.products)}'
                row = ['accepted', counts, str(verdict.kernels), megabytes(verdict)]
            table.add_row(name, sms, *row)
    return table


def tell_compiled(console: Console, graph: Graph, verdicts: dict[str, Compiled]) -> None:
    """The compiler's verdicts on one file, for people."""
    for sms, verdict in groups(verdicts):
        title = f"NVIDIA's compiler, {sms}"
        if not verdict.accepted:
            console.print(f'[red]{title}: refused:[/red] {escape(verdict.error)}', highlight=False)
            continue
        products = len(verdict.products)
        fp8 = f', {verdict.fp8} in FP8' if verdict.fp8 else ''
        console.print(
            f'{title}: accepted, {verdict.int8} of {products} convolutions and matrix '
            f'multiplications in INT8{fp8}, {verdict.kernels} kernels, '
            f'{megabytes(verdict)} MB written'
        )
        for warning in verdict.warnings:
            console.print('  warning:', warning, markup=False, highlight=False)
        for line in disagreements(graph, verdict):
            console.print(f'  {line}', markup=False, highlight=False)
