"""The whole set of files of one detector."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable

from torch import Tensor, nn

from mmdet3d_quant.export.cuts import Cut, bevfusion_cuts
from mmdet3d_quant.export.manifest import describe_graph, describe_scales
from mmdet3d_quant.export.onnx import ExportError, export_onnx
from mmdet3d_quant.export.unsigned import unsigned_names, with_unsigned
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
    target: str = 'tensorrt',
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
        target: Engine that the files are for, as ``export_onnx`` takes it.

    Returns:
        The cuts, with modules that compute what the files do (unsigned activations for a target
        that takes them), and the manifest: per file its inputs, outputs, shapes, node counts and
        SHA-256; ``scales`` by group; ``kept_float`` with reasons.

    Raises:
        ExportError: If the detector has nothing to export, or as ``export_onnx``.
        UncalibratedError: If a quantizer of a cut has no range.
    """
    cuts = bevfusion_cuts(detector, inputs)
    if not cuts:
        raise ExportError(f'{type(detector).__name__} has no part that can be exported')
    files = {}
    exported: list[Cut] = []
    unsigned: set[int] = set()  # ids of quantizers of the detector
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
                target,
            )
            names = unsigned_names(model)
            if names:
                known = quantizers(cut.module)
                unsigned |= {id(known[n]) for n in names}
                cut = replace(cut, module=with_unsigned(cut.module, names))
            exported.append(cut)
            files[path.name] = dict(describe_graph(model), sha256=sha256(path))
        manifest = dict(
            provenance,
            precision='int8' if quantized else 'float',
            target=target,
            files=files,
            scales=describe_scales(detector, unsigned) if quantized else [],
            kept_float={
                n: q.float_reason for n, q in quantizers(detector).items() if q.float_reason
            },
        )
        (folder / 'manifest.json').write_text(json.dumps(manifest, indent=2) + '\n')
    return exported, manifest
