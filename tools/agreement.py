"""Runs exported files in the CPU engines and shows how far they agree with the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mmdet3d_quant.check.verify import Agreement, require_agreement, verify
from mmdet3d_quant.engines.deformable import runs_here
from mmdet3d_quant.engines.onnxruntime import has_deformable
from mmdet3d_quant.engines.plugins import without_kernels
from mmdet3d_quant.export import Cut
from mmdet3d_quant.export.runtimes import DEFAULT_RUNTIME
from mmdet3d_quant.export.suite import LIDAR


def verify_files(
    console: Console,
    folder: Path,
    cuts: list[Cut],
    manifest: dict[str, Any],
    quantized: bool,
    real: bool,
    model: nn.Module,
    inputs: dict[str, Tensor],
) -> list[Agreement]:
    """Verifies the files of a folder and prints the table.

    Args:
        console: Where to tell.
        folder: The folder.
        cuts: Its files that ONNX Runtime reads, with their modules and inputs.
        manifest: Of the folder.
        quantized: Whether the files are.
        real: Whether the inputs are data.
        model: The detector, for the LiDAR encoder's file.
        inputs: Of the files, by name; ``voxels`` and ``coors`` of the LiDAR encoder.

    Returns:
        List of :class:`Agreement`, one per output.

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
        plugins = without_kernels(manifest['files'][path.name].get('custom_ops', ()))
        if plugins and not (runs_here(plugins) and has_deformable()):
            console.print(f'{path.name}: not run, since it needs plugins: {", ".join(plugins)}')
            continue
        if not cut.inputs:
            console.print(f'{path.name}: not run, since its voxels cannot be generated; give data')
            continue
        results += verify(cut, path, quantized, real)
    results += _verify_lidar(console, folder, manifest, quantized, real, model, inputs)
    console.print(agreement_table(results))
    require_agreement(results)
    return results


def _verify_lidar(
    console: Console,
    folder: Path,
    manifest: dict[str, Any],
    quantized: bool,
    real: bool,
    model: nn.Module,
    inputs: dict[str, Tensor],
) -> list[Agreement]:
    """Verifies the LiDAR encoder's file, or its part of a body, if there are voxels to run on."""
    runtime = manifest.get('runtime', DEFAULT_RUNTIME)
    names = [n for n, e in manifest['files'].items() if n.startswith(LIDAR) or 'sparse' in e]
    if not names:
        return []
    path = folder / names[0]
    if 'voxels' not in inputs:
        console.print(f'{path.name}: not run, since its voxels cannot be generated; give data')
        return []
    from mmdet3d_quant.check.sparse import int8_layers, judge_lidar  # which need spconv

    encoder, voxels, coors = model.pts_middle_encoder, inputs['voxels'], inputs['coors']
    int8 = int8_layers(manifest)
    return [judge_lidar(encoder, path, voxels, coors, quantized, real, runtime, int8)]


def agreement_table(results: list[Agreement]) -> Table:
    """SQNR in dB: higher is closer."""
    table = Table(title='Signal-to-quantization-noise ratio, dB')
    for heading in ('file', 'output', 'INT8 convs in OpenVINO'):
        table.add_column(heading, no_wrap=True)
    runs = ['torch fake-quant\nvs torch float', 'ONNX Runtime\nvs torch', 'OpenVINO\nvs torch']
    lidar = any(r.libspconv is not None for r in results)
    for run in [*runs, *['libspconv in torch\nvs torch'] * lidar]:
        table.add_column(run, justify='right')
    for r in results:
        values = [r.fake_quant, r.onnxruntime, r.openvino, *[r.libspconv] * lidar]
        table.add_row(
            f'{r.cut}.onnx',
            r.output,
            f'{r.int8_convs} of {r.all_convs}' + ' (libspconv)' * (r.libspconv is not None)
            if r.all_convs
            else '',
            *('' if v is None else f'{v:.1f}' for v in values),
        )
    return table
