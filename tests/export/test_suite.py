"""The set of files of detectors that are not the ResNet-50 one with both sensors."""

import copy

import onnx
import pytest
import torch
from torch import nn

from mmdet3d_quant import calibrate, quantizers, set_mode, ties
from mmdet3d_quant.check.detector import as_exported, engine_detector
from mmdet3d_quant.check.verify import run_torch, sqnr
from mmdet3d_quant.core.compat import removesuffix
from mmdet3d_quant.engines import ONNXRuntime
from mmdet3d_quant.export import ExportError, capture_inputs, export_suite, generate_inputs
from mmdet3d_quant.export.cuts import bevfusion_cuts
from mmdet3d_quant.models.view_transform import QuantLSSTransform
from mmdet3d_quant.runs import from_config as fc
from tests.export.detectors import exported, files_with_swin, small_detector
from tests.export.sparse.encoders import build, cloud
from tests.small import ROOT


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """Config of the small detector and a batch."""
    return small_detector(tmp_path_factory.mktemp('small'))


def files(manifest):
    return {removesuffix(name, '.onnx'): list(f['inputs']) for name, f in manifest['files'].items()}


def without(cfg, *parts, channels):
    """A model's config without some parts, and with what the BEV backbone then reads."""
    cfg = copy.deepcopy(cfg)
    for part in parts:
        cfg.pop(part)
    cfg['pts_backbone']['in_channels'] = channels
    return cfg


CAMERA = ('img_backbone', 'img_neck', 'view_transform', 'fusion_layer')
LIDAR = ('pts_voxel_encoder', 'pts_middle_encoder', 'fusion_layer')


def test_a_swin_backbone_stays_float_and_only_has_fewer_ties(small, tmp_path):
    assert len(files_with_swin(small, tmp_path)) == 5


def test_a_camera_only_detector_exports_the_files_it_has(small, tmp_path):
    cfg = without(small[0].model.to_dict(), *LIDAR, channels=16)
    model, manifest = exported(cfg, small[1], tmp_path)
    assert files(manifest) == {
        'camera.backbone': ['img', 'depth'],
        'camera.vtransform': ['feat_in'],
        'fuser': ['camera'],
        'head.bbox': ['middle'],
    }
    agrees_as_a_whole(model, small[1], tmp_path)


def test_a_lidar_only_detector_exports_the_files_it_has(small, tmp_path):
    cfg = without(small[0].model.to_dict(), *CAMERA, channels=32)
    model, manifest = exported(cfg, small[1], tmp_path)
    assert list(files(manifest)) == ['fuser', 'head.bbox', 'lidar.backbone.xyz']
    assert files(manifest)['fuser'] == ['lidar']
    assert 'camera' not in (tmp_path / 'build_engines.sh').read_text()
    agrees_as_a_whole(model, small[1], tmp_path)


def agrees_as_a_whole(model, batch, folder):
    """What enters the head, from files, against torch."""
    made = engine_detector(model, folder, ONNXRuntime)
    made.bbox_head = model.bbox_head  # its weights are random: the last bit picks the peaks
    seen = []
    hook = model.bbox_head.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        model.test_step(batch)
        made.test_step(batch)
        with set_mode(model, 'float'):
            model.test_step(batch)
    hook.remove()
    quant, engine, real = (x if isinstance(x, torch.Tensor) else x[0] for x in seen)
    assert sqnr(quant, engine) > sqnr(real, quant) + 1


@pytest.mark.parametrize(
    'sensor, expected',
    [
        ('cam', {'camera.backbone': ['img'], 'camera.vtransform': ['feat_in'],
                 'fuser': ['camera'], 'head.bbox': ['middle']}),
        ('lidar', {'fuser': ['lidar'], 'head.bbox': ['middle'],
                   'lidar.backbone.xyz': ['0']}),
    ],
)  # fmt: skip
def test_configs_of_one_sensor_export_on_generated_inputs(sensor, expected, tmp_path):
    cfg = fc.read_config(ROOT / f'configs/bevfusion_tiny/bevfusion_tiny_{sensor}_synthetic.py')
    model = fc.build_model(cfg).eval()
    inputs = generate_inputs(model, num_cams=2)
    cuts, manifest = export_suite(
        model, inputs, tmp_path, {}, quantized=False, tell=lambda name: None
    )
    assert files(manifest) == expected
    for cut in cuts:
        if cut.name != 'head.bbox':  # random weights: see agrees_as_a_whole
            found = ONNXRuntime(tmp_path / f'{cut.name}.onnx')(
                {n: t.numpy() for n, t in cut.inputs.items()}
            )
            for name, value in run_torch(cut, 'float').items():
                assert sqnr(value, found[name]) > 90


def test_only_some_files(small, tmp_path):
    model = fc.build_model(small[0]).eval()
    calibrate(model, [small[1]], 'max')
    inputs = generate_inputs(model)
    options = dict(tell=lambda name: None)
    (tmp_path / 'README.md').write_text('mine')
    _, manifest = export_suite(model, inputs, tmp_path, {}, only=['fuser'], **options)
    assert list(manifest['files']) == ['fuser.onnx']
    assert (tmp_path / 'README.md').read_text() == 'mine'
    with pytest.raises(ValueError, match='no fusor to export for tensorrt; camera.backbone'):
        export_suite(model, inputs, tmp_path, {}, only=['fusor'], **options)
    # libspconv is NVIDIA's: nothing for OpenVINO, and no engines to build.
    with pytest.raises(ValueError, match='no lidar.backbone to export for openvino'):
        export_suite(
            model, inputs, tmp_path, {}, only=['lidar.backbone'], target='openvino', **options
        )
    out = tmp_path / 'openvino'
    cuts, manifest = export_suite(
        model, inputs, out, {}, only=['fuser'], target='openvino', **options
    )
    assert {p.name for p in out.iterdir()} == {'fuser.onnx', 'manifest.json', 'README.md'}
    # The module of the cut computes what the file does, and the manifest has its scales.
    found = ONNXRuntime(out / 'fuser.onnx')({n: t.numpy() for n, t in cuts[0].inputs.items()})
    assert sqnr(run_torch(cuts[0], 'quant')['middle'], found['middle']) > 40
    unsigned = [s for s in manifest['scales'] if s['dtype'] == 'uint8']
    assert unsigned and all(s['scale'] == pytest.approx(s['amax'] / 255) for s in unsigned)


def test_strongly_typed_files_hold_the_scales_that_their_modules_and_the_manifest_have(
    small, tmp_path
):
    model = fc.build_model(small[0]).eval()
    calibrate(model, [small[1]], 'max')
    inputs = capture_inputs(model, small[1])
    before = {n: float(q.amax) for n, q in quantizers(model).items() if q.spec.axis is None}
    cuts, manifest = export_suite(
        model, inputs, tmp_path, {}, only=['fuser'], target='tensorrt11', tell=lambda name: None
    )
    told = as_exported(model, tmp_path)
    (again,) = (c for c in bevfusion_cuts(told, inputs, 'tensorrt11') if c.name == 'fuser')
    assert before == {n: float(q.amax) for n, q in quantizers(model).items() if n in before}
    graph = onnx.load(tmp_path / 'fuser.onnx').graph
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    in_file = {
        float(stored[n.input[1]]) for n in graph.node
        if n.op_type == 'QuantizeLinear' and stored[n.input[1]].size == 1
    }  # fmt: skip
    for module in (cuts[0].module, again.module):
        ranges = [q.amax for q in quantizers(module).values() if q.spec.axis is None]
        assert in_file == {float(a / 127) for a in ranges}
    assert in_file <= {s['scale'] for s in manifest['scales'] if s['dtype'] == 'int8'}


def test_generated_inputs_have_the_shapes_of_real_ones(small):
    model = fc.build_model(small[0])
    calibrate(model, [small[1]], 'max')
    real, generated = capture_inputs(model, small[1]), generate_inputs(model)
    voxels, coors = real.pop('voxels'), real.pop('coors')  # which are not generated
    assert coors.shape == (len(voxels), 4) and voxels.shape[1] == 5
    assert {k: v.shape for k, v in real.items()} == {k: v.shape for k, v in generated.items()}


@pytest.mark.parametrize('cells', [(17, 22), (20, 15)])
@pytest.mark.parametrize('downsample', [1, 2])
def test_generated_maps_have_odd_sizes_where_the_model_has(cells, downsample):
    heights = 1 if downsample == 2 else 2
    view = QuantLSSTransform(
        8, 4, [33, 65], [5, 9], [0, cells[0], 1], [0, cells[1], 1], [0, heights, 1], [1, 5, 1],
        downsample=downsample,
    )  # fmt: skip
    detector = nn.Module()
    detector.view_transform = view
    training = view.training
    inputs = generate_inputs(detector, num_cams=2)
    assert view.training == training
    view.eval()
    with set_mode(view, 'float'), torch.no_grad():
        context, depth = view.lift(torch.zeros(1, 2, 8, 5, 9))
        pooled = view.splat(view.frustum.expand(1, 2, *view.frustum.shape), context, depth)
        made = view.downsample(inputs['feat_in'])
    assert inputs['feat_in'].shape == (1, 4 * heights, *cells)
    assert pooled.shape == inputs['feat_in'].shape
    assert inputs['camera'].shape == made.shape
    assert inputs['img'].shape == (1, 2, 3, 33, 65)


@pytest.mark.parametrize('grid', [[48, 40, 21], [49, 41, 22], [45, 43, 25]])
def test_generated_lidar_maps_have_odd_sizes_where_the_encoder_has(grid):
    encoder = build('bevfusion', sparse_shape=grid)
    detector = nn.Module()
    detector.pts_middle_encoder = encoder.train()  # as it is built; one voxel is no batch
    made = generate_inputs(detector)['lidar']
    assert all(m.training for m in encoder.modules())
    with torch.no_grad():
        assert made.shape == encoder.eval()(*cloud(encoder), 1).shape


def test_a_batch_of_two_is_refused(small):
    """Its images would pass for those of twice as many cameras."""
    model = fc.build_model(small[0])
    two = {
        k: {n: v * 2 for n, v in d.items()} if k == 'inputs' else d * 2 for k, d in small[1].items()
    }
    with set_mode(model, 'float'), pytest.raises(ValueError, match='one sample, got 2'):
        capture_inputs(model, two)


def test_nothing_to_export_is_an_error(tmp_path):
    with pytest.raises(ExportError, match='no part that can be exported'):
        export_suite(nn.Linear(2, 2), {}, tmp_path, {})


def test_the_parts_have_the_ties_of_the_whole(small):
    """A part is another module, whose children have the names that ties go by."""
    model = fc.build_model(small[0])
    calibrate(model, [small[1]])
    whole = quantizers(model)
    parts = {cut.name: cut.module for cut in bevfusion_cuts(model, capture_inputs(model, small[1]))}
    tied = [{id(whole[name]) for name in group} for group in ties(model)]
    count = 0
    for name, part in parts.items():
        own = quantizers(part)
        found = [{id(own[n]) for n in group} for group in ties(part)]
        inside = [group & {id(q) for q in own.values()} for group in tied]
        expected = [group for group in inside if len(group) > 1]
        assert sorted(map(sorted, found)) == sorted(map(sorted, expected)), name
        count += len(found)
    assert count > 10


def test_generated_inputs_need_a_camera(small):
    with pytest.raises(ValueError, match='num_cams must be at least 1, got 0'):
        generate_inputs(fc.build_model(small[0]), num_cams=0)
