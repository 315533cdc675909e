"""Files of one part of a model, made by every quantizer on the same inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from torch import Tensor

import mmdet3d_quant as mq
from mmdet3d_quant.check.nncf import Nncf
from mmdet3d_quant.check.peer import Peer
from mmdet3d_quant.engines import Arrays
from mmdet3d_quant.export import Cut, export_onnx
from mmdet3d_quant.export.targets import TARGETS
from mmdet3d_quant.files.metadata import STRONG, TYPING_KEY
from peer_files.table import AUTOCAST, OPENVINO

ROOT = Path(__file__).resolve().parents[2]
#: A target whose files are typed FP16, where this version has it; its boxes are coded as in the
#: files for ``tensorrt``.
TYPED = 'tensorrt10'


@dataclass
class Frames:
    """Inputs of all parts by name, frame by frame.

    Attributes:
        seen: That quantizers calibrate on.
        judged: That files are measured on.
    """

    seen: list[dict[str, Tensor]]
    judged: list[dict[str, Tensor]]

    def calibration_of(self, cut: Cut) -> Arrays:
        """Stacks what quantizers see of a part."""
        return _stacked(self.seen, cut)

    def judged_of(self, cut: Cut) -> Arrays:
        """Stacks what files of a part are measured on."""
        return _stacked(self.judged, cut)


def _stacked(frames: list[dict[str, Tensor]], cut: Cut) -> Arrays:
    return {name: np.stack([frame[name].numpy() for frame in frames]) for name in cut.inputs}


class Peers:
    """The other quantizers, as far as they are there.

    Args:
        modelopt: Python with Model-Optimizer, or None.
        nncf: Python with NNCF, or None.

    Raises:
        EngineError: If a Python lacks its quantizer.
    """

    def __init__(self, modelopt: str | None, nncf: str | None) -> None:
        script = ROOT / 'benchmarks/peer_files/model_optimizer.py'
        remedy = 'give --modelopt-python one with nvidia-modelopt[onnx], or --setup DIR'
        modules = ('modelopt.onnx.quantization', 'modelopt.onnx.autocast')
        self.modelopt = modelopt and Peer('Model-Optimizer', modelopt, script, modules, remedy)
        self.nncf = nncf and Nncf(nncf, ROOT / 'tools/nncf_peer.py')


def int8_files(
    cut: Cut, frames: Frames, peers: Peers, folder: Path, methods: Sequence[str]
) -> dict[str, Path]:
    """Quantizes a part by ours, method by method, and by the peers.

    The part is left calibrated by the first method.

    Returns:
        dict of files by name, float first, ours then.
    """
    files = {'float': _export(cut, folder / 'float.onnx', quantized=False)}
    batches = [[frame[name] for name in cut.inputs] for frame in frames.seen]
    for method in (*methods[1:], methods[0]):
        mq.calibrate(cut.module, batches, method)
        files[f'ours, {method}'] = _export(cut, folder / f'ours-{method}.onnx')
    for method in methods:  # in the order that they were asked for
        files[f'ours, {method}'] = files.pop(f'ours, {method}')
    files[OPENVINO] = _export(cut, folder / 'ours-openvino.onnx', target='openvino')
    samples, given = frames.calibration_of(cut), files['float']
    if peers.modelopt:
        for method in ('entropy', 'max'):
            files[f'Model-Optimizer, {method}'] = out = folder / f'modelopt-{method}.onnx'
            peers.modelopt.quantize(given, samples, out, '--method', method)
    if peers.nncf:
        for name, out, options in (
            ('NNCF, INT8', 'nncf-int8.onnx', ['--signed']),
            ('NNCF', 'nncf.onnx', []),
            ('NNCF for OpenVINO', 'nncf.xml', []),
        ):
            files[name] = folder / out
            peers.nncf.quantize(given, samples, files[name], *options)
    return files


def typed_files(cut: Cut, frames: Frames, peers: Peers, folder: Path) -> dict[str, Path]:
    """Types a part's file FP16, by ours and by AutoCast; nothing without such a target.

    Returns:
        dict of files by name: float, the file that is typed, ours, the peer's.
    """
    if TYPED not in TARGETS:
        return {}
    quantized = bool(mq.quantizers(cut.module))
    files = {'float': _export(cut, folder / 'float.onnx', quantized=False)}
    given = _export(cut, folder / 'float32.onnx') if quantized else files['float']
    files['float32'] = given
    files[f'ours, --target {TYPED}'] = _export(cut, folder / 'ours-typed.onnx', target=TYPED)
    if peers.modelopt:
        samples = frames.calibration_of(cut)
        files[AUTOCAST] = out = folder / 'autocast.onnx'
        peers.modelopt.quantize(given, samples, out, '--autocast')
        mark_strong(out)
        if quantized:
            files['Model-Optimizer, fp16'] = out = folder / 'modelopt-fp16.onnx'
            peers.modelopt.quantize(files['float'], samples, out, '--precision', 'fp16')
            mark_strong(out)
    return files


def mark_strong(path: Path) -> None:
    """Lets a file say that it is strongly typed, so that its FP16 tensors are rounded as ours."""
    model = onnx.load(str(path))
    props = {p.key: p.value for p in model.metadata_props}
    onnx.helper.set_model_props(model, {**props, TYPING_KEY: STRONG})
    onnx.save(model, str(path))


def _export(cut: Cut, path: Path, quantized: bool = True, target: str = 'tensorrt') -> Path:
    names = tuple(cut.inputs), cut.output_names
    inputs = list(cut.inputs.values())
    export_onnx(cut.module, inputs, path, *names, quantized=quantized, target=target)
    return path
