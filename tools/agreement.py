"""Runs exported files in the CPU engines and shows how far they agree with the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mmdet3d_quant.check.verify import Agreement, require_agreement, verify
from mmdet3d_quant.export import Cut


def verify_files(
    console: Console,
    folder: Path,
    cuts: list[Cut],
    manifest: dict[str, Any],
    quantized: bool,
    real: bool,
) -> list[Agreement]:
    """Verifies the files of a folder and prints the table.

    Raises:
        QuantError: If one does not agree, or its numbers are not finite.
    """
    console.print('Verifying: ONNX Runtime and OpenVINO against torch')
    results: list[Agreement] = []
    for cut in cuts:
        path = folder / f'{cut.name}.onnx'
        if 'CustomLayerNormalization' in manifest['files'][path.name]['nodes']:
            console.print(f"{path.name}: not run, since its layer norm is TensorRT's plugin")
            continue
        plugins = manifest['files'][path.name].get('custom_ops')
        if plugins:
            console.print(f'{path.name}: not run, since it needs plugins: {", ".join(plugins)}')
            continue
        results += verify(cut, path, quantized, real)
    console.print(agreement_table(results))
    require_agreement(results)
    return results


def agreement_table(results: list[Agreement]) -> Table:
    """SQNR in dB: higher is closer."""
    table = Table(title='Signal-to-quantization-noise ratio, dB')
    for heading in ('file', 'output', 'INT8 convs in OpenVINO'):
        table.add_column(heading, no_wrap=True)
    for run in ('torch fake-quant\nvs torch float', 'ONNX Runtime\nvs torch', 'OpenVINO\nvs torch'):
        table.add_column(run, justify='right')
    for r in results:
        table.add_row(
            f'{r.cut}.onnx',
            r.output,
            f'{r.int8_convs} of {r.all_convs}',
            *(f'{v:.1f}' for v in (r.fake_quant, r.onnxruntime, r.openvino)),
        )
    return table
