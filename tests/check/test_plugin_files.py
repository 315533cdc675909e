"""Files of runtimes with plugins in the place of a detector's layers."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from mmdet3d_quant import set_mode
from mmdet3d_quant.check.detector import as_exported, engine_detector
from mmdet3d_quant.check.runs import sqnr
from mmdet3d_quant.check.sparse import int8_layers, judge_lidar
from mmdet3d_quant.check.verify import verify
from mmdet3d_quant.engines import ONNXRuntime
from mmdet3d_quant.export import ExportError, export_suite
from mmdet3d_quant.export.examples import capture_inputs
from mmdet3d_quant.layers.sparse import SPARSE_CONVS
from tests.export.autoware.detectors import detector, files
from tests.export.detectors import small_detector


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    return small_detector(tmp_path_factory.mktemp('small'))


@pytest.mark.parametrize('camera', [False, True])
@torch.no_grad()
def test_boxes_are_those_of_the_model(camera, small, tmp_path):
    """Float files, of which the sparse part is FP16: boxes move by less than a tenth of a cell."""
    cfg, batch = small
    model = detector(cfg.model.to_dict(), batch, camera)
    with set_mode(model, 'float'):
        inputs = capture_inputs(model, batch, 'autoware')
        files(model, batch, tmp_path, inputs, quantized=False, fp16=False)
        wanted = model.test_step(batch)[0].pred_instances_3d
        made = engine_detector(model, tmp_path, ONNXRuntime)
        found = made.test_step(batch)[0].pred_instances_3d
    assert len(found) == len(wanted) == 20
    apart = torch.cdist(found.bboxes_3d.tensor, wanted.bboxes_3d.tensor)
    near, which = apart.min(1)
    same = (near < 0.1) & (found.labels_3d == wanted.labels_3d[which])
    same &= (found.scores_3d - wanted.scores_3d[which]).abs() < 0.01
    assert same.float().mean() > 0.9


def test_a_missing_file_is_told(small, tmp_path):
    cfg, batch = small
    model = detector(cfg.model.to_dict(), batch, camera=False)
    files(model, batch, tmp_path, only=())
    (tmp_path / 'bevfusion_lidar.onnx').unlink()
    with pytest.raises(ExportError, match='bevfusion_lidar.onnx does not exist.*--runtime auto'):
        engine_detector(model, tmp_path, ONNXRuntime)


@torch.no_grad()
def test_openvinos_files_take_the_place_of_encoder_and_pooling(small, tmp_path):
    cfg, batch = small
    model = detector(cfg.model.to_dict(), batch, camera=True)
    with set_mode(model, 'float'):
        inputs, options = capture_inputs(model, batch), dict(runtime='openvino', target='openvino')
        _, manifest = export_suite(
            model, inputs, tmp_path, {}, False, tell=lambda name: None, **options
        )
        made, maps = engine_detector(model, tmp_path, ONNXRuntime, scn=True), []
        assert manifest['files']['camera.pool.onnx']['nodes'] == {'BevPoolV2': 1, 'Slice': 1}
        assert 'splat' in vars(made.view_transform.view)
        for net in (model, made):
            net.pts_middle_encoder.register_forward_hook(lambda m, a, out: maps.append(out))
            net.view_transform.register_forward_hook(lambda m, a, out: maps.append(out))
            net.test_step(batch)
    assert type(made.pts_middle_encoder) is not type(model.pts_middle_encoder)
    for own, there in zip(maps[:2], maps[2:]):  # in the order in which the sensors are called
        assert sqnr(own, there) > 60


def lidar_map(model, batch):
    seen = []
    hook = model.pts_middle_encoder.register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        model.test_step(batch)
    hook.remove()
    return seen[0]


def test_fake_quantization_follows_the_files(small, tmp_path):
    """The model is judged with the sparse layers in INT8 that its files have, and no others."""
    cfg, batch = small
    model = detector(cfg.model.to_dict(), batch, camera=False)
    own = lidar_map(model, batch)
    with set_mode(model, 'float'):
        plain = lidar_map(model, batch)
    assert sqnr(plain, own) < 45
    for stages, close in (((), True), (('*',), False)):
        files(model, batch, tmp_path, int8_stages=stages)
        followed = as_exported(model, tmp_path)
        file = onnx.load(str(tmp_path / 'bevfusion_lidar.onnx'))
        file.graph.output.append(onnx.helper.make_empty_tensor_value_info('lidar'))
        onnx.save(file, str(tmp_path / 'tapped.onnx'))
        voxels, coors, counts = model.pts_voxel_layer(batch['inputs']['points'][0].float())
        arrays = dict(voxels=voxels, coors=coors.int(), num_points_per_voxel=counts.int())
        found = ONNXRuntime(tmp_path / 'tapped.onnx')({n: t.numpy() for n, t in arrays.items()})
        made = lidar_map(followed, batch)
        assert sqnr(made, found['lidar']) > 60
        assert (sqnr(plain, made) > 55) is close
    export_suite(
        model, capture_inputs(model, batch), tmp_path / 'ov', {}, tell=lambda name: None,
        runtime='openvino', target='openvino',
    )  # fmt: skip
    assert sqnr(plain, lidar_map(as_exported(model, tmp_path / 'ov', scn=True), batch)) > 60
    assert torch.equal(lidar_map(as_exported(model, tmp_path / 'ov'), batch), own)


def turned(path):
    """A copy of a file whose sparse kernels have their first and last axis swapped."""
    file = onnx.load(str(path))
    filters = {n.input[1] for n in file.graph.node if n.op_type == 'ImplicitGemm'}
    for tensor in file.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if tensor.name in filters and value.shape[1] == value.shape[3]:
            value = np.ascontiguousarray(value.swapaxes(1, 3))
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    onnx.save(file, str(path.with_name('turned.onnx')))
    return path.with_name('turned.onnx')


@pytest.mark.parametrize('camera', [False, True])
def test_export_runs_the_body_from_its_voxels(camera, small, tmp_path):
    cfg, batch = small
    model, seen = detector(cfg.model.to_dict(), batch, camera), []
    with set_mode(model, 'float'):
        inputs = capture_inputs(model, batch, 'autoware')

    def check(cuts, manifest, folder):
        cut, path = cuts[-1], folder / f'{cuts[-1].name}.onnx'
        plugins = manifest['files'][path.name]['custom_ops']
        convs = [m for m in model.pts_middle_encoder.modules() if isinstance(m, SPARSE_CONVS)]
        assert plugins['autoware::ImplicitGemm'] == len(convs)
        assert ('autoware::QuickCumsumCuda' in plugins) is camera
        assert 'voxels' in cut.inputs and 'lidar' not in cut.inputs
        seen.extend(verify(cut, path))
        given = (inputs['voxels'], inputs['coors'], True, True, 'autoware', int8_layers(manifest))
        seen.extend(
            judge_lidar(model.pts_middle_encoder, file, *given) for file in (path, turned(path))
        )

    files(model, batch, tmp_path, inputs, check=check)
    *good, bad = seen
    assert not [r.fault for r in good if r.fault] and all(r.openvino is None for r in good)
    assert good[-1].output == 'lidar' and good[-1].onnxruntime > good[-1].fake_quant
    assert 0 < good[-1].int8_convs < good[-1].all_convs
    assert 'lidar agrees with torch' in bad.fault
