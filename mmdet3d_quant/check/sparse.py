"""Comparison of the sparse encoder's file with its encoder, as the runtime computes it, by SQNR."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx.utils import Extractor
from torch import Tensor, nn

from mmdet3d_quant.check.fit import range_fits
from mmdet3d_quant.check.runs import run_torch, sqnr
from mmdet3d_quant.check.verify import Agreement, cost_fault, nonfinite, output_fault
from mmdet3d_quant.engines import ONNXRuntime
from mmdet3d_quant.export.autoware.voxels import voxel_inputs
from mmdet3d_quant.export.cuts import Cut
from mmdet3d_quant.export.runtimes import DEFAULT_RUNTIME, runtime_of
from mmdet3d_quant.export.sparse.arithmetic import ARITHMETICS, computed_as, with_int8
from mmdet3d_quant.export.sparse.openvino import FEATURES, INDICES, MAP, ORDER_KEY
from mmdet3d_quant.export.sparse.read import read_program
from mmdet3d_quant.export.sparse.run import ScnNetwork
from mmdet3d_quant.export.sparse.trace import order_of

#: Least SQNR of a file against its encoder, and how far it may be below what quantization costs:
#: FP16 weights and tensors move some values by a step of INT8.
FILE_DB, MARGIN_DB = 40.0, -3.0


class _Encoder(nn.Module):
    """The map of an encoder for one frame."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.pts_middle_encoder = encoder

    def forward(self, voxels: Tensor, coors: Tensor) -> Tensor:
        out = self.pts_middle_encoder(voxels, coors, 1)
        return out if isinstance(out, Tensor) else out[0]


@torch.no_grad()
def judge_lidar(
    encoder: nn.Module,
    path: str | Path,
    features: Tensor,
    coors: Tensor,
    quantized: bool = True,
    real: bool = True,
    runtime: str = DEFAULT_RUNTIME,
    int8: tuple[str, ...] | None = None,
) -> Agreement:
    """Compares a file with its encoder, both as the runtime computes them.

    A file for libspconv is run in torch with FP16 tensors as libspconv keeps them, one for OpenVINO
    and the map inside of Autoware's body by ONNX Runtime with the plugin's operators.

    Args:
        encoder: The encoder that was exported, in eval mode.
        path: Its file.
        features: Voxels of one frame, (N, C).
        coors: (N, 4), in the order of the encoder.
        quantized: Whether the file is.
        real: Whether the voxels are data; else ranges, which are of data, are not judged by them.
        runtime: Name of what the file is for, one of ``RUNNERS``.
        int8: Patterns of the layers in INT8, of a runtime that leaves the choice; None: its own.

    Returns:
        :class:`Agreement` of the map, with a fault if it is not finite or not close enough, ranges
        do not fit, or a layer has more voxels than the file has room for. Fake quantization on FP16
        weights moves some of them by a step, so it is about as close to the encoder as that is to
        itself in float.

    Raises:
        ScnError: If the file cannot be read or the voxels do not fit it.
        EngineError: If ONNX Runtime cannot run it.
    """
    path, name = Path(path), 'lidar'
    arithmetic = ARITHMETICS[runtime_of(runtime).arithmetic]
    arithmetic = arithmetic if int8 is None else with_int8(arithmetic, int8)
    followed = computed_as(encoder, arithmetic) if quantized else encoder
    cut = Cut(path.stem, _Encoder(followed), {'voxels': features, 'coors': coors}, (name,))
    plain = run_torch(cut, 'float')[name]
    wanted = run_torch(cut, 'quant' if quantized else 'float')[name]
    run = RUNNERS[runtime](path, features.cpu(), coors.cpu(), order_of(encoder))
    cost, closeness = sqnr(plain, wanted), sqnr(wanted, run.map)
    fault = nonfinite('torch', name, wanted)
    fault = fault or output_fault(arithmetic.name, name, closeness, _least(cost), run.map)
    fault = fault or run.fault
    judged = quantized and real and arithmetic.int8
    fault = fault or cost_fault(name, cost, range_fits(cut) if judged else {})
    libspconv = closeness if runtime == DEFAULT_RUNTIME else None
    other = closeness if libspconv is None else None
    return Agreement(path.stem, name, cost, other, None, *run.convs, fault, libspconv)


@dataclass(frozen=True)
class _Run:
    """A map, INT8 and all convolutions of the file, and what is wrong with the run."""

    map: np.ndarray
    convs: tuple[int, int]
    fault: str = ''


def _run_libspconv(path: Path, features: Tensor, coors: Tensor, order: str) -> _Run:
    program = read_program(path)
    network = ScnNetwork(program, fp16_tensors=True)
    found = network(features, _in_order(coors, order, program.order)).numpy()
    int8 = sum(op.precision == 'int8' for op in program.convs)
    return _Run(found, (int8, len(program.convs)), '; '.join(network.crowded()))


class OpenVINONetwork:
    """A file for OpenVINO as a function of the voxels of one frame, by ONNX Runtime.

    Args:
        path: The file.
        order: Axes of the coordinates that it is called with, of :func:`order_of`.

    Raises:
        EngineError: If ONNX Runtime cannot run it.
    """

    def __init__(self, path: Path, order: str) -> None:
        model = onnx.load(str(path))
        self.wanted = {p.key: p.value for p in model.metadata_props}.get(ORDER_KEY, order)
        self.convs = sum(node.op_type == 'SparseConvolution' for node in model.graph.node)
        self.order, self.engine = order, ONNXRuntime(path)

    def __call__(self, features: Tensor, coors: Tensor) -> Tensor:
        """Computes the map; features (N, C), coordinates (N, 4) with the frame 0."""
        places = _in_order(coors.cpu(), self.order, self.wanted).int().numpy()
        found = self.engine({FEATURES: features.float().cpu().numpy(), INDICES: places})
        return torch.from_numpy(found[MAP]).to(features)


def _run_openvino(path: Path, features: Tensor, coors: Tensor, order: str) -> _Run:
    network = OpenVINONetwork(path, order)
    return _Run(network(features, coors).numpy(), (0, network.convs))


def _run_autoware(path: Path, features: Tensor, coors: Tensor, order: str) -> _Run:
    graph = onnx.load(str(path))
    made = [node for node in graph.graph.node if node.op_type == 'ImplicitGemm']
    points = graph.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    inputs = voxel_inputs(dict(voxels=features, coors=coors), order, points)
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / path.name
        onnx.save(Extractor(graph).extract_model(list(inputs), [MAP]), str(part))
        found = ONNXRuntime(part)({name: tensor.numpy() for name, tensor in inputs.items()})
    int8 = sum(any(a.name == 'precision' and a.i for a in node.attribute) for node in made)
    return _Run(found[MAP], (int8, len(made)))


def int8_layers(manifest: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Reads which sparse layers are INT8 in a folder; None where the runtime leaves no choice."""
    chosen = [entry['sparse'] for entry in manifest['files'].values() if 'sparse' in entry]
    return tuple(e['layer'] for e in chosen[0] if e['precision'] == 'int8') if chosen else None


def _in_order(coors: Tensor, have: str, want: str) -> Tensor:
    return coors if have == want else coors[:, [0, 3, 2, 1]]


#: What runs the file of a runtime, by its name: from the file, voxels, and cells in an order.
RUNNERS: dict[str, Callable[[Path, Tensor, Tensor, str], _Run]] = {
    DEFAULT_RUNTIME: _run_libspconv,
    'openvino': _run_openvino,
    'autoware': _run_autoware,
}


def verify_lidar(
    encoder: nn.Module,
    path: str | Path,
    features: Tensor,
    coors: Tensor,
    quantized: bool = True,
) -> tuple[float, float]:
    """Measures a file as :func:`judge_lidar` does, without a judgement.

    Returns:
        Two floats, SQNR in dB: of the fake-quantized encoder against itself in float (infinite if
        not quantized), and of the file against the encoder that was exported.

    Raises:
        ScnError: If the file cannot be read or the voxels do not fit it.
    """
    found = judge_lidar(encoder, path, features, coors, quantized, real=False)
    assert found.libspconv is not None
    return found.fake_quant, found.libspconv


def _least(cost: float) -> float:
    """Computes the least SQNR of a file; NaN as a cost counts as nothing."""
    return min(FILE_DB, cost + MARGIN_DB) if cost == cost else FILE_DB
