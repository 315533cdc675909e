"""Writing of a program for the sparse operators of OpenVINO's plugin for Intel GPUs.

The operators are those of the patch for OpenVINO 2026.1 in open-edge-platform/edge-ai-suites
(metro-ai-suite, sensor-fusion-for-traffic-management, intermediate-fusion), whose ONNX frontend
reads them in the domain ``org.openvinotoolkit``. A sparse tensor is two: values (M, C) and cells
(M, 4), frame first. What is neither a convolution nor the scattering is plain ONNX.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from mmdet3d_quant.export.manifest import describe_graph
from mmdet3d_quant.export.runtimes import runtime_of
from mmdet3d_quant.export.sparse.arithmetic import OPENVINO
from mmdet3d_quant.export.sparse.check import check
from mmdet3d_quant.export.sparse.program import (
    Add,
    Op,
    Program,
    Relu,
    Reshape,
    ScatterDense,
    SparseConv,
    Transpose,
)
from mmdet3d_quant.export.sparse.trace import trace
from mmdet3d_quant.export.targets import TARGET_KEY
from mmdet3d_quant.files.outputs import whole
from mmdet3d_quant.version import __version__

DOMAIN, VERSION = runtime_of('openvino').domain, runtime_of('openvino').version
OPSET, IR_VERSION = 17, 8
#: Inputs and output, as the runtime's example and the set's other files call them.
FEATURES, INDICES, MAP = 'voxel_features', 'voxel_indices', 'lidar'
#: Key of the order of the axes in ``metadata_props``.
ORDER_KEY = 'mmdet3d_quant.order'
#: Most voxels of a strided convolution, for which the plugin has memory; 80,000 in its example.
OUTPUT_BOUND = 200_000
#: The transposition that joins the last axis of the grid to the channels: an attribute of the node.
_FUSED = (0, 1, 4, 2, 3)


def export_openvino(
    encoder: nn.Module,
    path: str | Path,
    order: str | None = 'zyx',
    output_bound: int = OUTPUT_BOUND,
) -> dict[str, Any]:
    """Writes a sparse encoder for OpenVINO's plugin for Intel GPUs, in floating point.

    Args:
        encoder: As :func:`~mmdet3d_quant.export.sparse.export_lidar` takes it. It is not changed.
        path: File to write; it appears whole or not at all.
        order: Columns of ``voxel_indices`` behind the frame: ``'zyx'`` as the runtime's documents
            say, or ``'xyz'``, with which BEVFusion's map is one node. None: the encoder's own.
        output_bound: Most voxels that a strided layer may make.

    Returns:
        Entry of the manifest: inputs, outputs, opset, node counts, ``order``, ``grid``.

    Raises:
        ExportError: If the encoder has what a program does not have.
        ScnError: If the program is wrong; names the layer.
        OSError: If the file cannot be written.
    """
    program = trace(encoder, order, quantized=False, output_bound=output_bound, arithmetic=OPENVINO)
    model = as_openvino(program)
    with whole(path) as tmp:
        onnx.save(model, str(tmp))
    return dict(describe_graph(model), order=program.order, grid=list(program.grid))


def as_openvino(program: Program) -> onnx.ModelProto:
    """Makes the model: voxels float32 (M, C) and cells int32 (M, 4) to a map, weights float32.

    The weights are the program's FP16 numbers, since the plugin computes in FP16.

    Raises:
        ScnError: If the program is wrong.
    """
    check(program)
    writer = _Writer(program)
    for op in program.ops:
        writer.add(op)
    graph = helper.make_graph(
        writer.nodes,
        'sparse_encoder',
        [
            helper.make_tensor_value_info(
                FEATURES, TensorProto.FLOAT, ['voxels', program.channels]
            ),
            helper.make_tensor_value_info(INDICES, TensorProto.INT32, ['voxels', 4]),
        ],
        [helper.make_tensor_value_info(MAP, TensorProto.FLOAT, list(program.output_shape))],
        writer.weights,
    )
    return as_model(graph, {ORDER_KEY: program.order})


def as_model(graph: onnx.GraphProto, props: Mapping[str, str]) -> onnx.ModelProto:
    """Makes the model of a graph with the plugin's operators, for the engine that has them.

    Args:
        graph: The graph.
        props: More entries of the model's ``metadata_props``.
    """
    model = helper.make_model(
        graph,
        opset_imports=[
            helper.make_operatorsetid('', OPSET),
            helper.make_operatorsetid(DOMAIN, VERSION),
        ],
        ir_version=IR_VERSION,
        producer_name='mmdet3d_quant',
        producer_version=__version__,
    )
    helper.set_model_props(model, {TARGET_KEY: 'openvino', **props})
    return model


class _Writer:
    """Nodes and weights so far, and the names of each tensor's values and cells."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.values = {program.input: FEATURES, program.output: MAP}
        self.cells: dict[str, str | None] = {program.input: INDICES}
        self.fused: set[str] = set()  # tensors that the scattering makes already

    def add(self, op: Op) -> None:
        """Writes an operator."""
        if op.output in self.fused:
            return
        inputs = [self._values(name) for name in op.inputs]
        cells = self.cells.get(op.inputs[0])
        if isinstance(op, SparseConv):
            self.cells[op.output] = f'{op.output}.cells'
            self._convolve(op, inputs[0], cells)
        elif isinstance(op, ScatterDense):
            self._scatter(op, inputs[0], cells)
        elif isinstance(op, Transpose):
            self._node('Transpose', op, inputs, perm=list(op.dims))
        elif isinstance(op, Reshape):
            shape = self._weight(f'{op.name}.shape', np.array(op.dims, np.int64))
            self._node('Reshape', op, [*inputs, shape])
        else:
            assert isinstance(op, (Add, Relu))
            self.cells[op.output] = cells
            self._node(type(op).__name__, op, inputs)

    def _convolve(self, op: SparseConv, values: str, cells: str | None) -> None:
        weight = op.weight.float().permute(1, 2, 3, 4, 0).flatten(0, 2).numpy()
        inputs = [
            values,
            str(cells),
            self._weight(f'{op.name}.weight', weight),
            self._weight(f'{op.name}.bias', op.bias.float().numpy()),
        ]
        self._node(
            'SparseConvolution',
            op,
            inputs,
            [str(self.cells[op.output])],
            DOMAIN,
            kernel_size=list(op.kernel),
            stride=list(op.stride),
            padding=list(op.padding),
            dilation=list(op.dilation),
            submanifold=int(op.subm),
            in_channels=op.weight.shape[-1],
            out_channels=op.weight.shape[0],
            input_spatial_shape=list(op.grid),
            output_spatial_shape=list(op.output_grid),
            activation='ReLU' if op.relu else 'None',
            output_bound=op.output_bound,
            rulebook=op.rulebook,
        )

    def _scatter(self, op: ScatterDense, values: str, cells: str | None) -> None:
        after = self.program.readers(op.output)
        fuse = len(after) == 1 and isinstance(after[0], Transpose) and after[0].dims == _FUSED
        if fuse:  # the node makes the map: what follows in the program is part of it
            self.fused.update((after[0].output, self.program.output))
            self.values[op.output] = MAP
        self._node(
            'SparseToDense',
            op,
            [values, str(cells)],
            [],
            DOMAIN,
            spatial_shape=list(op.grid),
            batch_size=1,
            channels_first=1,
            fuse_permute_reshape=int(fuse),
        )

    def _node(
        self,
        kind: str,
        op: Op,
        inputs: list[str],
        more: list[str] | None = None,
        domain: str = '',
        **attributes: Any,
    ) -> None:
        outputs = [self._values(op.output), *(more or [])]
        doc = getattr(op, 'layer', '') or None
        self.nodes.append(
            helper.make_node(kind, inputs, outputs, op.name, doc, domain, **attributes)
        )

    def _values(self, tensor: str) -> str:
        return self.values.setdefault(tensor, f'{tensor}.values')

    def _weight(self, name: str, values: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name
