"""The whole set of files of one detector."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from mmdet3d_quant.core.copies import uncompiled
from mmdet3d_quant.core.coverage import coverage
from mmdet3d_quant.core.formats import INT8
from mmdet3d_quant.core.macs import counting
from mmdet3d_quant.core.modes import evaluating, kept_float, quantizers, set_mode
from mmdet3d_quant.export.autoware import autoware_cuts, finish_autoware
from mmdet3d_quant.export.bev_pool import finish_openvino
from mmdet3d_quant.export.boxes import BOXES_KEY
from mmdet3d_quant.export.cuts import Cut
from mmdet3d_quant.export.deploy import (
    IO,
    README,
    SCRIPT,
    TITLE,
    build_script,
    is_scripted,
    readme,
)
from mmdet3d_quant.export.examples import sparse_encoder
from mmdet3d_quant.export.families import detector_cuts
from mmdet3d_quant.export.graph import custom_ops
from mmdet3d_quant.export.half_ranges import round_ranges
from mmdet3d_quant.export.manifest import (
    MANIFEST,
    describe_graph,
    describe_pairs,
    describe_scales,
)
from mmdet3d_quant.export.onnx import export_onnx, kept_batch_norms
from mmdet3d_quant.export.pairs import ExportError
from mmdet3d_quant.export.runtimes import DEFAULT_RUNTIME, Runtime, runtime_of, target_for
from mmdet3d_quant.export.sparse import export_lidar
from mmdet3d_quant.export.sparse.openvino import OUTPUT_BOUND, export_openvino
from mmdet3d_quant.export.targets import DEFAULT, Target, target_of
from mmdet3d_quant.export.typed import kept_float32
from mmdet3d_quant.export.unsigned import unsigned_names, with_unsigned
from mmdet3d_quant.files.outputs import sha256, whole_folder
from mmdet3d_quant.files.typed import is_strong

#: Stem of the LiDAR encoder's file, which ends in the order of its axes for libspconv.
LIDAR = 'lidar.backbone'


def export_suite(
    detector: nn.Module,
    inputs: dict[str, Tensor],
    out_dir: str | Path,
    provenance: dict[str, Any],
    quantized: bool = True,
    opset_version: int | None = None,
    tell: Callable[[str], None] = print,
    target: str = DEFAULT,
    only: Collection[str] = (),
    fp16: bool | None = None,
    runtime: str = DEFAULT_RUNTIME,
    int8_stages: Collection[str] | None = None,
    check: Callable[[list[Cut], dict[str, Any], Path], None] = lambda cuts, manifest, folder: None,
    **options: Any,
) -> tuple[list[Cut], dict[str, Any]]:
    """Writes one ONNX file per cut and ``manifest.json``; all of them or none.

    For TensorRT also the LiDAR encoder as libspconv reads it, ``build_engines.sh``, which builds
    the engines, and for every target a ``README.md``, unless one lies there that is not ours.

    Args:
        detector: A detector of any family, calibrated unless ``quantized`` is False.
        inputs: Example inputs by name; see ``export.examples``.
        out_dir: Folder to write to; files of the same names are replaced.
        provenance: Plain dict to put into the manifest.
        quantized: False exports float graphs.
        opset_version: ONNX opset; None: the target's.
        tell: Called with the name of each file before it is made.
        target: Engine that the files are for, as ``export_onnx`` takes it.
        only: Stems of the files to write, such as ``fuser`` or ``lidar.backbone``; none: all.
        fp16: Store the weights of float files in FP16; None: as the target has it.
        runtime: What runs the files, of ``export.runtimes``.
        int8_stages: Patterns of the layers of the sparse encoder to compute in INT8, of a runtime
            that leaves the choice; None: as it pays there.
        check: Called with the cuts, the manifest and the folder where the files lie before they are
            moved to ``out_dir``; if it raises, nothing is.
        **options: ``dynamic_batch``, ``weights``, ``layernorm`` and ``custom_ops``, as
            ``export_onnx`` takes them.

    Returns:
        The cuts, with modules that compute what the files do (unsigned activations for a target
        that takes them, scales as FP16 has them for a strongly typed one), and the manifest: per
        file its inputs, outputs, shapes, node counts and SHA-256, ``batch_norm`` that could not be
        folded, with reasons, ``custom_ops`` that ONNX lacks, and for a strongly typed target the
        nodes that stay ``float32``, with reasons; ``scales`` by group; ``kept_float`` with reasons;
        ``coverage``, the layers of the detector that are quantized, unless the graphs are float.

    Raises:
        ExportError: If the detector has nothing to export, or as ``export_onnx``.
        ScnError: If the runtime would compute the LiDAR encoder wrongly.
        UncalibratedError: If a quantizer of a cut has no range.
        ValueError: If ``only`` names what the detector does not have, or as ``export_onnx``.
    """
    target_for(runtime, target)
    detector, wants, runs = uncompiled(detector), target_of(target), runtime_of(runtime)
    half = wants.strong and fp16 is not False
    if half:
        detector = copy.deepcopy(detector)  # for the files, ranges as they hold them
    cuts = runtime_cuts(detector, inputs, target, runtime)
    for cut in cuts if half else ():
        round_ranges(cut.module)
    encoder = sparse_encoder(detector) if _writes_lidar(runs, wants) else None
    stems = [cut.name for cut in cuts] + ([LIDAR] if encoder is not None else [])
    if not stems:
        raise ExportError(f'{type(detector).__name__} has no part that can be exported')
    unknown = sorted(set(only) - set(stems))
    if unknown:
        raise ValueError(f'there is no {unknown[0]} to export for {target}; {", ".join(stems)}')
    files = {}
    ran: list[Cut] = []
    exported: list[Cut] = []
    formats: set[str] = set()
    unsigned: set[int] = set()  # ids of quantizers of the detector
    with whole_folder(out_dir) as folder:
        for cut in cuts:
            if only and cut.name not in only:
                continue
            tell(f'{cut.name}.onnx')
            path = folder / f'{cut.name}.onnx'
            ranged = [q for q in quantizers(cut.module).values() if quantized and q.calibrated]
            formats |= {q.spec.format.name for q in ranged}
            model = export_onnx(
                cut.module,
                tuple(cut.inputs.values()),
                path,
                tuple(cut.inputs),
                cut.output_names,
                opset_version,
                quantized,
                target,
                fp16=half or (fp16 and not wants.strong and not ranged),
                metadata={BOXES_KEY: cut.boxes.name} if cut.boxes else None,
                varying=cut.varying,
                **{**options, **(dict(custom_ops=True) if cut.plugins else {})},
            )
            ran.append(cut)
            names = unsigned_names(model)
            if names:
                known = quantizers(cut.module)
                unsigned |= {id(known[n]) for n in names}
                cut = replace(cut, module=with_unsigned(cut.module, names))
            exported.append(cut)
            files[path.name] = dict(describe_graph(model), sha256=sha256(path))
            if cut.io != IO:
                files[path.name]['io'] = cut.io
            if cut.boxes:
                files[path.name]['boxes'] = dict(coding=cut.boxes.name, text=cut.boxes.text)
            left = kept_batch_norms(model)
            if left:
                files[path.name]['batch_norm'] = left
            if is_strong(model):
                files[path.name]['float32'] = kept_float32(model)
            files[path.name].update(_plugins(model))
            if quantized:
                files[path.name].update(describe_pairs(model, cut.module))
        if encoder is not None and (not only or LIDAR in only):
            tell(f'{LIDAR}.onnx')
            path, entry = LIDAR_WRITERS[runtime](encoder, folder, quantized)
            files[path.name] = dict(entry, sha256=sha256(path))
        manifest = dict(
            provenance,
            precision='+'.join(sorted(formats or {INT8.name})) if quantized else 'float',
            target=target,
            runtime=runtime,
            files=files,
            scales=describe_scales(detector, unsigned) if quantized else [],
            kept_float=kept_float(detector),
            coverage=coverage(detector, _count_macs(detector, ran)).plain() if quantized else None,
        )
        if runtime in FINISHERS:
            finish = FINISHERS[runtime]
            more, exported = finish(detector, folder, quantized, int8_stages, exported, inputs)
            for name, entry in more.items():
                path = folder / name
                graph = onnx.load(str(path), load_external_data=False)
                files.setdefault(name, {}).update(
                    describe_graph(graph), **_plugins(graph), sha256=sha256(path), **entry
                )
        _write_companions(folder, out_dir, manifest)
        check(exported, manifest, folder)
    return exported, manifest


def _plugins(model: onnx.ModelProto) -> dict[str, Any]:
    """The entry of the manifest that counts operators that ONNX lacks, if there are any."""
    plugins = {kind: len(at) for kind, at in custom_ops(model).items()}
    return dict(custom_ops=plugins) if plugins else {}


def _write_companions(folder: Path, out_dir: str | Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest, the README and, for CUDA-BEVFusion, the script that builds engines."""
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + '\n')
    there = Path(out_dir) / README
    if not there.is_file() or there.read_text(errors='replace').startswith(TITLE):
        (folder / README).write_text(readme(manifest))
    if is_scripted(manifest):
        (folder / SCRIPT).write_text(build_script(manifest))
        (folder / SCRIPT).chmod(0o755)


def runtime_cuts(
    detector: nn.Module,
    inputs: dict[str, Tensor],
    target: str = DEFAULT,
    runtime: str = DEFAULT_RUNTIME,
) -> list[Cut]:
    """Cuts a detector as a runtime has its files: what is exported by tracing, under their names.

    Args:
        detector: A detector.
        inputs: Example inputs by name.
        target: Name of the engine that the files are for.
        runtime: Name of what runs them.

    Returns:
        The cuts, each with its share of ``inputs``.

    Raises:
        ExportError: If the runtime has no place for the detector.
        QuantError: As ``detector_cuts``.
    """
    return CUTS.get(runtime, detector_cuts)(detector, inputs, target)


@torch.no_grad()
def _count_macs(detector: nn.Module, cuts: Sequence[Cut]) -> dict[str, int]:
    """Counts multiply-accumulates by layer; not of the LiDAR encoder, which has no inputs here."""
    with evaluating(detector), set_mode(detector, 'float'), counting(detector) as counted:
        for cut in cuts:
            cut.module(*cut.inputs.values())
    return counted.macs


def _writes_lidar(runtime: Runtime, target: Target) -> bool:
    """Whether the set of a runtime has a file of its own for the sparse LiDAR encoder."""
    return runtime.name in LIDAR_WRITERS and (
        runtime.name != DEFAULT_RUNTIME or target.libspconv  # others run it in their own way
    )


def _export_libspconv(
    encoder: nn.Module, folder: Path, quantized: bool
) -> tuple[Path, dict[str, Any]]:
    draft = folder / f'{LIDAR}.onnx'
    entry = export_lidar(encoder, draft, quantized=quantized)
    path = folder / f'{LIDAR}.{entry["order"]}.onnx'
    return draft.rename(path), entry


def _export_openvino(
    encoder: nn.Module, folder: Path, quantized: bool
) -> tuple[Path, dict[str, Any]]:
    path = folder / f'{LIDAR}.onnx'
    entry = export_openvino(encoder, path)
    return path, dict(entry, voxels=dict(max=OUTPUT_BOUND, **runtime_of('openvino').clouds))


#: What cuts detectors for a runtime that has files of its own.
CUTS: dict[str, Callable[[nn.Module, Any, str], list[Cut]]] = {'autoware': autoware_cuts}
#: What completes the files of a runtime in a folder: from the detector, the folder, whether they
#: are quantized, the choice of sparse layers in INT8, the cuts, and example inputs, to more entries
#: of the manifest by name of the file, and the cuts as the files are now.
FINISHERS: dict[str, Callable[..., tuple[dict[str, dict[str, Any]], list[Cut]]]] = {
    'autoware': finish_autoware,
    'openvino': finish_openvino,
}
#: What writes the LiDAR encoder's own file, by runtime: from the encoder, the folder, and whether
#: it is quantized, to the file and its entry of the manifest.
LIDAR_WRITERS: dict[str, Callable[[nn.Module, Path, bool], tuple[Path, dict[str, Any]]]] = {
    DEFAULT_RUNTIME: _export_libspconv,
    'openvino': _export_openvino,
}
