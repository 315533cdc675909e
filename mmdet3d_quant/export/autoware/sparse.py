"""The sparse LiDAR encoder as nodes that Autoware's plugins run, from voxels to a dense map.

Tensors between layers are FP16. A layer in INT8 rounds what it reads inside of the plugin, so no
Q/DQ pair stands around it: its scales are an attribute and two inputs.
"""

from __future__ import annotations

from typing import Any, Callable

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from mmdet3d_quant.export.runtimes import runtime_of
from mmdet3d_quant.export.sparse.check import check
from mmdet3d_quant.export.sparse.program import (
    Add,
    Axes,
    Program,
    Relu,
    Reshape,
    ScatterDense,
    SparseConv,
    Transpose,
)

DOMAIN = runtime_of('autoware').domain
#: Value of ``algo``: spconv's implicit GEMM with one mask, whose bits are the kernel's places.
MASK_IMPLICIT_GEMM = 1
#: Values of ``act_type`` and of ``precision``.
NONE, RELU, INT8 = 0, 1, 1
#: Largest integer of the grid.
_TOP = 127.0


class SparseNodes:
    """The nodes and stored tensors of a program.

    Args:
        program: The network.
        features: Name of the voxels' features, float16 (M, C).
        indices: Name of their places, int32 (M, 4): zero, and the program's axes.
        dtype: Type of the map, of ``onnx.TensorProto``.

    Attributes:
        nodes: In the order of execution.
        stored: Weights, biases and scales.
        output: Name of the map, (1, C, H, W).

    Raises:
        ScnError: If Autoware's plugins do not compute the program; names the layer.
    """

    def __init__(
        self, program: Program, features: str, indices: str, dtype: int = TensorProto.FLOAT
    ) -> None:
        check(program)
        self.dtype = dtype
        self.nodes: list[NodeProto] = []
        self.stored: list[TensorProto] = []
        self._tensors = {program.input: features}
        self._indices = {program.input: indices}
        self._pairs: dict[str, list[str]] = {}
        for op in program.ops:
            _WRITERS[type(op)](self, op)
        self.output = self._tensors[program.output]

    def store(self, name: str, value: np.ndarray) -> str:
        """Adds a stored tensor; returns its name."""
        self.stored.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(self, kind: str, inputs: list[str], output: str, domain: str = '', **fields: Any):
        """Adds a node with one output, of its name; returns that."""
        self.nodes.append(
            helper.make_node(kind, inputs, [output], output, domain=domain or None, **fields)
        )
        return output

    def _named(self, op: Any) -> str:
        return f'lidar/{getattr(op, "layer", "") or op.name}'

    def _rules(self, op: SparseConv) -> list[str]:
        """Outputs of the search for neighbours, which layers of one rulebook share."""
        if op.rulebook not in self._pairs:
            stem = f'lidar/{op.rulebook}'
            outputs = [f'{stem}/{name}' for name in PAIRS]
            self.nodes.append(
                helper.make_node(
                    'GetIndicePairsImplicitGemm',
                    [self._indices[op.inputs[0]]],
                    outputs,
                    stem,
                    domain=DOMAIN,
                    batch_size=1,
                    spatial_shape=op.grid,
                    algo=MASK_IMPLICIT_GEMM,
                    ksize=op.kernel,
                    stride=op.stride,
                    padding=op.padding,
                    dilation=op.dilation,
                    out_padding=(0, 0, 0),
                    subm=int(op.subm),
                    transpose=0,
                    is_train=int(not op.subm),  # as Autoware's own files have it
                    do_sort=1,
                )
            )
            self._pairs[op.rulebook] = outputs
        return self._pairs[op.rulebook]

    def conv(self, op: SparseConv) -> None:
        """Adds a convolution with its bias and its ReLU."""
        found, *pairs, _ = self._rules(op)
        name = self._named(op)
        inputs = [self._tensors[op.inputs[0]], f'{name}.weight', *pairs]
        self.store(f'{name}.weight', op.weight.cpu().numpy().astype(np.float16))
        bias = op.bias.cpu().numpy()
        fields: dict[str, Any] = {}
        if op.precision == 'int8':
            assert op.input_range is not None and op.weight_ranges is not None
            fields = dict(precision=INT8, input_scale=op.input_range / _TOP)
            steps = np.asarray(op.weight_ranges, np.float64) / _TOP
            scale = (op.input_range / _TOP * steps).astype(np.float32)
            inputs.append(self.store(f'{name}.channel_scale', scale))
            inputs.append(self.store(f'{name}.bias_scaled', bias.astype(np.float32)))
        elif bias.any():
            inputs.append(self.store(f'{name}.bias', bias.astype(np.float16)))
        self._tensors[op.output] = self.node(
            'ImplicitGemm',
            inputs,
            name,
            DOMAIN,
            act_alpha=0.0,
            act_beta=0.0,
            act_type=RELU if op.relu else NONE,
            fp32_accum=1,
            is_subm=int(op.subm),
            is_train=0,
            output_add_scale=0.0,
            output_scale=1.0,
            **fields,
        )
        self._indices[op.output] = self._indices[op.inputs[0]] if op.subm else found

    def add(self, op: Add) -> None:
        """Adds a residual addition."""
        self._tensors[op.output] = self.node(
            'Add', [self._tensors[i] for i in op.inputs], self._named(op)
        )
        self._indices[op.output] = self._indices[op.inputs[0]]

    def relu(self, op: Relu) -> None:
        """Adds a ReLU behind an addition."""
        source = self._tensors[op.inputs[0]]
        self._tensors[op.output] = self.node('Relu', [source], f'{source}.relu')
        self._indices[op.output] = self._indices[op.inputs[0]]

    def scatter(self, op: ScatterDense) -> None:
        """Adds the way to a dense tensor, zero where no voxel is."""
        features = self._tensors[op.inputs[0]]
        if self.dtype != TensorProto.FLOAT16:
            features = self.node('Cast', [features], 'lidar/features', to=self.dtype)
        places = self.node(
            'Cast', [self._indices[op.inputs[0]]], 'lidar/places', to=TensorProto.INT64
        )
        zero = helper.make_tensor('value', self.dtype, [1], [0.0])
        sizes = self.store('lidar/sizes', np.array([1, *op.grid, op.shape[1]], np.int64))
        empty = self.node('ConstantOfShape', [sizes], 'lidar/empty', value=zero)
        cells = self.node('ScatterND', [empty, places, features], 'lidar/cells')
        self._tensors[op.output] = self.node(
            'Transpose', [cells], 'lidar/dense', perm=(0, 4, 1, 2, 3)
        )

    def transpose(self, op: Transpose) -> None:
        """Adds a transposition, joined with that behind the scattering."""
        last = self.nodes[-1]
        perm: Axes = tuple(last.attribute[0].ints)
        joined = helper.make_attribute('perm', [perm[d] for d in op.dims])
        last.attribute[0].CopyFrom(joined)
        self._tensors[op.output] = self._tensors[op.inputs[0]]

    def reshape(self, op: Reshape) -> None:
        """Adds a reshape."""
        sizes = self.store('lidar/shape', np.array(op.dims, np.int64))
        self._tensors[op.output] = self.node(
            'Reshape', [self._tensors[op.inputs[0]], sizes], 'lidar'
        )


#: Outputs of GetIndicePairsImplicitGemm, in order.
PAIRS = ('out_inds', 'pair_fwd', 'pair_mask', 'mask_argsort', 'num_act_out')
_WRITERS: dict[type, Callable[[SparseNodes, Any], None]] = {
    SparseConv: SparseNodes.conv,
    Add: SparseNodes.add,
    Relu: SparseNodes.relu,
    ScatterDense: SparseNodes.scatter,
    Transpose: SparseNodes.transpose,
    Reshape: SparseNodes.reshape,
}
