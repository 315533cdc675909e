"""The file for OpenVINO's sparse operators: nodes by the contract, numbers by convolutions."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from mmdet3d_quant import set_mode
from mmdet3d_quant.check.sparse import judge_lidar
from mmdet3d_quant.check.verify import sqnr
from mmdet3d_quant.engines import ONNXRuntime
from mmdet3d_quant.engines.files import EngineError
from mmdet3d_quant.export.pairs import ExportError
from mmdet3d_quant.export.sparse import trace
from mmdet3d_quant.export.sparse.openvino import DOMAIN, as_openvino, export_openvino
from mmdet3d_quant.export.sparse.program import ScnError
from tests.export.sparse.encoders import (
    attributes,
    build,
    calibrated,
    cloud,
    convolve_densely,
    turned,
)

CASES = [('bevfusion', 'xyz'), ('bevfusion', 'zyx'), ('second', 'zyx')]
NATIVE = {'bevfusion': 'xyz', 'second': 'zyx'}
cases = pytest.mark.parametrize(('kind', 'order'), CASES)
#: Attributes of the convolution in the ONNX frontend of the patch, and their types.
CONVOLUTION = dict(
    kernel_size='INTS',
    stride='INTS',
    padding='INTS',
    dilation='INTS',
    submanifold='INT',
    in_channels='INT',
    out_channels='INT',
    input_spatial_shape='INTS',
    output_spatial_shape='INTS',
    activation='STRING',
    output_bound='INT',
    rulebook='STRING',
)
TO_DENSE = dict(
    spatial_shape='INTS', batch_size='INT', channels_first='INT', fuse_permute_reshape='INT'
)


def types(node):
    return {a.name: onnx.AttributeProto.AttributeType.Name(a.type) for a in node.attribute}


def interpret(model, feats, coors):
    """Computes a file with dense convolutions in float64; see ``encoders.interpret``."""
    graph = model.graph
    known = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    tensors, cells = {}, {}
    grid = attributes(graph.node[0])['input_spatial_shape']
    values = torch.zeros(1, feats.shape[1], *grid, dtype=torch.float64)
    mask = torch.zeros(1, 1, *grid, dtype=torch.float64)
    at = tuple(coors[:, 1:].long().T)
    values[(0, slice(None), *at)] = feats.double().T
    mask[(0, 0, *at)] = 1
    tensors['voxel_features'], cells['voxel_indices'] = values, mask
    for node in graph.node:
        a = attributes(node)
        x = tensors[node.input[0]]
        if node.op_type == 'SparseConvolution':
            weight = known[node.input[2]].double()
            weight = weight.reshape(*a['kernel_size'], a['in_channels'], a['out_channels'])
            geometry = dict(a, precision=b'fp16', subm=a['submanifold'])
            tensors[node.output[0]], cells[node.output[1]] = convolve_densely(
                geometry,
                (x, cells[node.input[1]]),
                weight.permute(4, 0, 1, 2, 3),
                known[node.input[3]].double(),
            )
        elif node.op_type == 'SparseToDense':
            assert list(x.shape[2:]) == a['spatial_shape']
            assert cells[node.input[1]].shape[2:] == x.shape[2:]
            fused = x.permute(0, 1, 4, 2, 3).flatten(1, 2)
            tensors[node.output[0]] = fused if a['fuse_permute_reshape'] else x
        elif node.op_type == 'Add':
            tensors[node.output[0]] = x + tensors[node.input[1]]
        elif node.op_type == 'Relu':
            tensors[node.output[0]] = x.clamp(min=0)
        elif node.op_type == 'Transpose':
            tensors[node.output[0]] = x.permute(a['perm'])
        else:
            tensors[node.output[0]] = x.reshape(known[node.input[1]].tolist())
    return tensors[graph.output[0].name]


@cases
def test_nodes_by_the_contract(kind, order, tmp_path):
    path = tmp_path / 'lidar.onnx'
    model = calibrated(kind)
    entry = export_openvino(model, path, order)
    file = onnx.load(str(path))
    assert entry['order'] == order
    assert {o.domain: o.version for o in file.opset_import} == {'': 17, DOMAIN: 1}
    assert DOMAIN == 'org.openvinotoolkit'
    ports = [
        (v.name, v.type.tensor_type.elem_type, [d.dim_value for d in v.type.tensor_type.shape.dim])
        for v in file.graph.input
    ]
    channels = model.conv_input[0].in_channels
    assert ports == [
        ('voxel_features', TensorProto.FLOAT, [0, channels]),
        ('voxel_indices', TensorProto.INT32, [0, 4]),
    ]
    known = {i.name: numpy_helper.to_array(i) for i in file.graph.initializer}
    by_kind = {}
    for node in file.graph.node:
        by_kind.setdefault(node.op_type, []).append(node)
        assert node.domain == (DOMAIN if node.op_type.startswith('Sparse') else '')
    for node in by_kind['SparseConvolution']:
        assert types(node) == CONVOLUTION
        a = attributes(node)
        weight, bias = (known[name] for name in node.input[2:])
        assert weight.shape == (np.prod(a['kernel_size']), a['in_channels'], a['out_channels'])
        assert bias.shape == (a['out_channels'],)
        assert weight.dtype == bias.dtype == np.float32
        assert len(node.output) == 2 and a['activation'] in (b'ReLU', b'None')
        assert not a['submanifold'] or a['stride'] == [1, 1, 1]
    dense = by_kind['SparseToDense']
    assert len(dense) == 1 and types(dense[0]) == TO_DENSE and len(dense[0].input) == 2
    fused = (kind, order) == ('bevfusion', 'xyz')
    assert attributes(dense[0])['fuse_permute_reshape'] == fused
    assert ('Transpose' in by_kind) == (order != NATIVE[kind]) and ('Reshape' in by_kind) != fused
    assert not {'QuantizeLinear', 'DequantizeLinear'} & by_kind.keys()
    made = [name for node in file.graph.node for name in node.output]
    assert len(made) == len(set(made))
    onnx.checker.check_model(file)


@cases
def test_file_computes_the_float_encoder(kind, order, tmp_path):
    path = tmp_path / 'lidar.onnx'
    model = calibrated(kind)
    export_openvino(model, path, order)
    feats, coors = cloud(model)
    with set_mode(model, 'float'), torch.no_grad():
        wanted = model(feats, coors, 1)
    places = coors if order == NATIVE[kind] else turned(coors)
    assert sqnr(wanted, interpret(onnx.load(str(path)), feats, places)) > 60


@cases
def test_file_run_by_onnx_runtime_equals_the_encoder(kind, order, tmp_path):
    """With the plugin's operators in numpy: of a cloud, of one voxel, and of none."""
    path = tmp_path / 'lidar.onnx'
    model = calibrated(kind)
    export_openvino(model, path, order)
    found = judge_lidar(model, path, *cloud(model), runtime='openvino')
    assert found.fault == '' and found.onnxruntime > 60 and found.libspconv is None
    assert (found.int8_convs, found.all_convs) == (0, len(trace(model).convs))
    engine = ONNXRuntime(path)
    for count in (1, 0):
        feats, coors = cloud(model)
        feats, coors = feats[:count], coors[:count]
        places = coors if order == NATIVE[kind] else turned(coors)
        arrays = dict(voxel_features=feats.numpy(), voxel_indices=places.int().numpy())
        with set_mode(model, 'float'), torch.no_grad():
            wanted = model(feats, coors, 1)
        out = engine(arrays)['lidar']
        assert out.shape == tuple(wanted.shape)
        assert sqnr(wanted, out) > 55 if count else not out.any()


def test_fewer_voxels_than_the_bound_or_an_error(tmp_path):
    model = build('bevfusion')
    export_openvino(model, tmp_path / 'lidar.onnx', output_bound=100)
    with pytest.raises(EngineError, match='output_bound is 100: export with a larger one'):
        judge_lidar(model, tmp_path / 'lidar.onnx', *cloud(model), False, runtime='openvino')


def test_order_that_cannot_be_is_refused(tmp_path):
    with pytest.raises(ExportError, match="'xyz'"):
        export_openvino(build('second'), tmp_path / 'lidar.onnx', 'xyz')
    assert not list(tmp_path.iterdir())


def test_weights_beyond_fp16_are_refused_by_layer(tmp_path):
    model = build('bevfusion')
    model.conv_out[0].weight.data.mul_(1e9)
    with pytest.raises(ExportError, match=r'conv_out.*weight.*65504.*train on with weight decay'):
        export_openvino(model, tmp_path / 'lidar.onnx')


def test_programs_are_checked(tmp_path):
    program = trace(build('bevfusion'))
    wrong = replace(program.ops[1], grid=(1, 2, 3))
    with pytest.raises(ScnError, match=r'conv1 \(encoder_layers'):
        as_openvino(replace(program, ops=(program.ops[0], wrong, *program.ops[2:])))
