"""The whole set of files of one detector."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

from torch import Tensor, nn

from mmdet3d_quant.export.cuts import Cut, bevfusion_cuts
from mmdet3d_quant.export.manifest import describe_graph, describe_scales
from mmdet3d_quant.export.onnx import ExportError, export_onnx
from mmdet3d_quant.files import sha256, whole_folder
from mmdet3d_quant.modes import quantizers


def export_suite(
    detector: nn.Module,
    inputs: dict[str, Tensor],
    out_dir: str | Path,
    provenance: dict[str, Any],
    quantized: bool = True,
    opset_version: int = 17,
    tell: Callable[[str], None] = print,
) -> tuple[list[Cut], dict[str, Any]]:
    """Writes one ONNX file per cut and ``manifest.json``; all of them or none.

    Args:
        detector: A BEVFusion detector, calibrated unless ``quantized`` is False.
        inputs: Example inputs by name; see ``export.cuts``.
        out_dir: Folder to write to; files of the same names are replaced.
        provenance: Plain dict to put into the manifest.
        quantized: False exports float graphs.
        opset_version: ONNX opset.
        tell: Called with the name of each file before it is made.

    Returns:
        The cuts and the manifest: per file its inputs, outputs, shapes, node counts and SHA-256;
        ``scales`` by group; ``kept_float`` with reasons.

    Raises:
        ExportError: If the detector has nothing to export, or as ``export_onnx``.
        UncalibratedError: If a quantizer of a cut has no range.
    """
    cuts = bevfusion_cuts(detector, inputs)
    if not cuts:
        raise ExportError(f'{type(detector).__name__} has no part that can be exported')
    files = {}
    with whole_folder(out_dir) as folder:
        for cut in cuts:
            tell(f'{cut.name}.onnx')
            path = folder / f'{cut.name}.onnx'
            model = export_onnx(
                cut.module,
                tuple(cut.inputs.values()),
                path,
                tuple(cut.inputs),
                cut.output_names,
                opset_version,
                quantized,
            )
            files[path.name] = dict(describe_graph(model), sha256=sha256(path))
        manifest = dict(
            provenance,
            precision='int8' if quantized else 'float',
            files=files,
            scales=describe_scales(detector) if quantized else [],
            kept_float={
                n: q.float_reason for n, q in quantizers(detector).items() if q.float_reason
            },
        )
        (folder / 'manifest.json').write_text(json.dumps(manifest, indent=2) + '\n')
    return cuts, manifest
