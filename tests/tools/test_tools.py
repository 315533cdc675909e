"""The tools end to end on a small detector, and what they say to bad input."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import mmdet3d
import numpy as np
import onnx
import pytest
import torch
from mmengine.config import Config

from mmdet3d_quant import CalibrationError, UncalibratedError, quantizers, ties
from mmdet3d_quant.calibration.histogram import NonFiniteError
from mmdet3d_quant.core.unsigned import unsigned_ranges
from mmdet3d_quant.data.nuscenes import DatasetError
from mmdet3d_quant.data.samples import make_frame
from mmdet3d_quant.engines.openvino.floats import overflows
from mmdet3d_quant.engines.tensorrt_rtx import Compiled
from mmdet3d_quant.export.graph import stored_tensors
from mmdet3d_quant.files.checkpoint import CheckpointError, read_checkpoint
from mmdet3d_quant.runs import from_config as fc
from tests.small import ROOT, save_float, small_config

sys.path.insert(0, str(ROOT / 'tools'))
import calibrate  # noqa: E402
import compiler  # noqa: E402
import export_onnx  # noqa: E402


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    """Folder with a frame, a config, a float checkpoint and a calibrated one."""
    folder = tmp_path_factory.mktemp('tools')
    small_config(make_frame(folder / 'frame'), folder / 'int8.py')
    save_float(folder / 'int8.py', folder / 'float.pth')
    run_calibrate(folder, '--out', folder / 'int8.pth')
    return folder


def run_calibrate(folder, *args):
    config, checkpoint = folder / 'int8.py', folder / 'float.pth'
    calibrate.main([str(a) for a in (config, checkpoint, *args)])


def loaded(work):
    model = fc.build_model(fc.read_config(work / 'int8.py'))
    fc.load_weights(model, work / 'int8.pth', calibrated=True)
    return model


def test_the_calibrated_checkpoint_is_plain_and_tells_where_it_comes_from(work):
    checkpoint = torch.load(work / 'int8.pth', weights_only=True)
    meta = checkpoint['meta']
    assert meta['calibration'] == dict(method='mse', num_batches=1, loader='calib_dataloader')
    assert meta['source_checkpoint']['name'] == 'float.pth' and meta['epoch'] == 1
    assert meta['versions']['torch'] == version('torch') and 'QuantResNet' in meta['cfg']
    ranges = {k: v for k, v in checkpoint['state_dict'].items() if k.endswith('_amax')}
    model = loaded(work)
    assert len(ranges) == len(quantizers(model))
    finer = unsigned_ranges(model)
    assert finer == meta['unsigned_ranges'] and any(amax > own for own, amax in finer.values())
    assert all(torch.isfinite(v).all() for v in ranges.values())


def test_weights_pass_through_calibration_unchanged(work):
    before = read_checkpoint(work / 'float.pth')['state_dict']
    after = read_checkpoint(work / 'int8.pth')['state_dict']
    assert all(torch.equal(v, after[k]) for k, v in before.items())


def predict(model, config):
    batch = next(iter(fc.build_calibration_loader(fc.read_config(config))[1]))
    with torch.no_grad():
        return model.test_step(batch)[0].pred_instances_3d


def test_a_fresh_process_and_mmdet3d_alone_give_the_same_boxes(work):
    """mmdet3d's init_model, with no import of ours but the config's."""
    here = predict(loaded(work), work / 'int8.py')
    code = f"""
import torch
from mmengine.runner import Runner
from mmdet3d.apis import init_model
model = init_model({str(work / 'int8.py')!r}, {str(work / 'int8.pth')!r}, device='cpu')
batch = next(iter(Runner.build_dataloader(model.cfg.calib_dataloader)))
with torch.no_grad():
    p = model.test_step(batch)[0].pred_instances_3d
torch.save(dict(b=p.bboxes_3d.tensor, s=p.scores_3d, l=p.labels_3d), {str(work / 'p.pth')!r})
"""
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    there = torch.load(work / 'p.pth')
    assert torch.equal(here.bboxes_3d.tensor, there['b']) and len(there['b']) > 0
    assert torch.equal(here.scores_3d, there['s']) and torch.equal(here.labels_3d, there['l'])


@pytest.mark.slow
def test_mmdet3d_test_tool_gives_the_same_boxes(work):
    tool = Path(mmdet3d.__file__).parent / '.mim/tools/test.py'
    cfg = Config.fromfile(work / 'int8.py')
    cfg.test_evaluator = dict(type='DumpResults', out_file_path=str(work / 'results.pkl'))
    cfg.dump(work / 'dump.py')
    command = [sys.executable, tool, work / 'dump.py', work / 'int8.pth', '--work-dir', work]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-2000:]
    (found,) = np.load(work / 'results.pkl', allow_pickle=True)
    here = predict(loaded(work), work / 'int8.py')
    there = found['pred_instances_3d']
    assert torch.equal(here.scores_3d, there['scores_3d'])
    assert torch.equal(here.bboxes_3d.tensor, there['bboxes_3d'].tensor)


def test_quantized_boxes_are_not_the_float_ones(work):
    model = loaded(work)
    quantized = predict(model, work / 'int8.py').scores_3d
    import mmdet3d_quant as mq

    with mq.set_mode(model, 'float'):
        assert not torch.equal(quantized, predict(model, work / 'int8.py').scores_3d)


@pytest.fixture(scope='module')
def exported(work):
    args = [str(work / 'int8.py'), str(work / 'int8.pth'), '--out-dir', str(work / 'onnx')]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, 'is_installed', lambda: True)
        patch.setattr(
            compiler, 'compile_onnx', lambda path, sms: {sm: Compiled(sm, True) for sm in sms}
        )
        return export_onnx.main(args), work / 'onnx'


#: File -> inputs and outputs, as CUDA-BEVFusion's runtime binds them, for the small model.
CONTRACT = {
    'camera.backbone.onnx': (
        {'img': [1, 6, 3, 64, 192], 'depth': [1, 6, 1, 64, 192]},
        {'camera_feature': [6, 8, 24, 16], 'camera_depth_weights': [6, 39, 8, 24]},
    ),
    'camera.vtransform.onnx': (
        {'feat_in': [1, 16, 64, 64]},
        {'feat_out': [1, 16, 32, 32]},
    ),
    'fuser.onnx': (
        {'camera': [1, 16, 32, 32], 'lidar': [1, 32, 32, 32]},
        {'middle': [1, 64, 32, 32]},
    ),
    'head.bbox.onnx': (
        {'middle': [1, 64, 32, 32]},
        {
            'score': [1, 10, 20],
            'rot': [1, 2, 20],
            'dim': [1, 3, 20],
            'reg': [1, 2, 20],
            'height': [1, 1, 20],
            'vel': [1, 2, 20],
        },
    ),
}


def test_files_names_and_shapes(exported):
    manifest = json.loads((exported[1] / 'manifest.json').read_text())
    assert set(manifest['files']) == {*CONTRACT, 'lidar.backbone.xyz.onnx'}
    for name, (inputs, outputs) in CONTRACT.items():
        told = manifest['files'][name]
        assert {k: v['shape'] for k, v in told['inputs'].items()} == inputs
        assert {k: v['shape'] for k, v in told['outputs'].items()} == outputs
        graph = onnx.load(exported[1] / name).graph
        assert [i.name for i in graph.input] == list(inputs)
        assert [o.name for o in graph.output] == list(outputs)
        assert 'BatchNormalization' not in told['nodes'] and 'Identity' not in told['nodes']
        assert ('QuantizeLinear' in told['nodes']) == (name != 'camera.vtransform.onnx')
    assert set(manifest['compiled']['files']) == set(CONTRACT)


def test_one_scale_per_tie_group_in_the_files(work, exported):
    """The Q/DQ nodes of a group's quantizers, found by their path, have one scale."""
    model = loaded(work)
    manifest = json.loads((exported[1] / 'manifest.json').read_text())
    state = read_checkpoint(work / 'int8.pth')['state_dict']
    groups = [e['quantizers'] for e in manifest['scales']]
    assert [tuple(g) for g in groups if len(g) > 1] == ties(model)
    in_files = set()
    for name in CONTRACT:
        graph = onnx.load(exported[1] / name).graph
        stored = stored_tensors(graph).items()
        values = {name: onnx.numpy_helper.to_array(tensor) for name, tensor in stored}
        for node in graph.node:
            if node.op_type == 'QuantizeLinear' and values[node.input[1]].ndim == 0:
                in_files.add(float(values[node.input[1]]))
    told = {e['scale'] for e in manifest['scales']}
    buffers = {float(np.float32(state[f'{g[0]}._amax'] / 127)) for g in groups}
    assert in_files == told == buffers


def test_engines_agree_better_than_quantization_costs(exported):
    for r in exported[0]:
        if r.fake_quant != float('inf'):
            # Images have signs, and nothing in the file says that depths have none; without VNNI
            # the convolutions that read them are float.
            signed = 2 if overflows() and r.cut == 'camera.backbone' else 0
            # Of the head, the last of the heatmap and those of queries are float, too.
            floats = 18 if r.cut == 'head.bbox' else signed
            assert r.int8_convs == r.all_convs - floats
            # Boxes of equal queries hardly depend on the map here, which is near zero.
            assert min(r.openvino, r.onnxruntime) > min(r.fake_quant + 3, 110), r
        elif r.libspconv is not None:
            assert r.libspconv > 60 and r.onnxruntime is r.openvino is None
        else:
            assert r.openvino > 80


def test_float_export_of_a_float_checkpoint(work):
    args = [str(work / 'int8.py'), str(work / 'float.pth'), '--out-dir', str(work / 'f'), '--float']
    args += ['--no-compile']
    for r in export_onnx.main([*args, '--inputs', 'generated']):
        assert r.onnxruntime > 80 and r.int8_convs == 0


def test_a_float_checkpoint_cannot_be_exported_as_int8(work, tmp_path):
    args = [str(work / 'int8.py'), str(work / 'float.pth'), '--out-dir', str(tmp_path / 'out')]
    with pytest.raises(UncalibratedError, match='tools/calibrate.py'):
        export_onnx.main(args)
    assert not (tmp_path / 'out').exists()


def test_bad_input_is_a_clear_error_and_writes_nothing(work, tmp_path):
    out = tmp_path / 'out.pth'

    def refused(error, match, *args, config=None, checkpoint=None):
        paths = [config or work / 'int8.py', checkpoint or work / 'float.pth', '--out', out]
        with pytest.raises(error, match=match):
            calibrate.main([str(a) for a in (*paths, *args)])
        assert list(tmp_path.glob('out*')) == [], 'something was written'

    options = ('--cfg-options',)
    refused(CheckpointError, 'does not exist', checkpoint=tmp_path / 'no.pth')
    truncated = tmp_path / 'truncated.pth'
    truncated.write_bytes((work / 'float.pth').read_bytes()[:5000])
    refused(CheckpointError, 'truncated', checkpoint=truncated)
    torch.save(dict(state_dict=torch.nn.Linear(2, 2).state_dict()), tmp_path / 'other.pth')
    refused(CheckpointError, 'another architecture.*lacks', checkpoint=tmp_path / 'other.pth')
    refused(
        CheckpointError,
        r'architecture: 267 entries do not fit in shape:\n  img_backbone.conv1.weight: \(8, 3',
        *options,
        'model.img_backbone.base_channels=4',
        'model.img_neck.in_channels=[32,64,128]',
    )
    refused(ValueError, "unknown calibration method 'no_such_method'", '--method', 'no_such_method')
    refused(ValueError, 'num-batches', '--num-batches', '0')
    refused(fc.ConfigError, 'config .* does not exist', config=tmp_path / 'no.py')
    refused(fc.ConfigError, 'QuantResNot', *options, 'model.img_backbone.type=QuantResNot')
    refused(fc.ConfigError, "'conv9' matches no", *options, 'model.img_backbone.skip=conv9')
    refused(
        DatasetError,
        'info file .*no_such.pkl is missing; set its data_root and ann_file',
        *options,
        'calib_dataloader.dataset.ann_file=no_such.pkl',
    )
    refused(fc.ConfigError, 'is empty', *options, 'calib_dataloader.dataset.indices=[]')
    with pytest.raises(OSError, match='cannot write'):
        run_calibrate(work, '--out', '/dev/null/out.pth')


def test_nan_in_the_points_is_found(work, tmp_path):
    frame = make_frame(tmp_path / 'frame')
    points = np.fromfile(frame / 'LIDAR_TOP.bin', np.float32).reshape(-1, 5)
    points[::7, 3] = np.nan
    points.tofile(frame / 'LIDAR_TOP.bin')
    config = small_config(frame, tmp_path / 'nan.py')
    with pytest.raises((NonFiniteError, ValueError), match='NaN|finite'):
        calibrate.main([str(config), str(work / 'float.pth'), '--out', str(tmp_path / 'out.pth')])
    assert not (tmp_path / 'out.pth').exists()


def test_errors_are_one_line_on_the_command_line(tmp_path):
    command = [sys.executable, 'tools/calibrate.py', 'no.py', 'no.pth', '--out', tmp_path / 'o.pth']
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1 and 'Traceback' not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith('error: config no.py does not exist')


def test_skip_from_the_command_line_survives_to_the_files(work, tmp_path):
    out = tmp_path / 'skip.pth'
    run_calibrate(work, '--out', out, '--cfg-options', "model.img_backbone.skip=['conv1']")
    keys = read_checkpoint(out)['state_dict']
    assert 'img_backbone.conv1._input_quantizer._amax' not in keys
    assert 'img_backbone.layer1.0.conv1._input_quantizer._amax' in keys


def test_what_stays_float_is_told_everywhere_and_a_config_says_that_it_is_meant(
    work, tmp_path, capsys
):
    """In the config of a detector whose types take no ``skip``; by the tools that build it."""
    with pytest.raises(CalibrationError, match=r'pts_middle_encoder stays float.*--strict') as err:
        other = [f'{n}_dataloader.dataset.ann_file=other.pkl' for n in ('val', 'test')]
        run_calibrate(work, '--out', tmp_path / 'no.pth', '--strict', '--cfg-options', *other)
    assert "pts_middle_encoder=dict(type='QuantBEVFusionSparseEncoder')" in str(err.value)
    assert "of='BEVFusion', skip={'pts_middle_encoder': 'why'}" in str(err.value)
    out, files = tmp_path / 'int8.pth', tmp_path / 'onnx'
    skip = "model.skip=['img_backbone.conv1','pts_middle_encoder']"
    options = ['--cfg-options', 'model.type=Quantized', 'model.of=BEVFusion', skip]
    capsys.readouterr()
    run_calibrate(work, '--out', out, *options)
    told = ' '.join(capsys.readouterr().out.split())
    assert 'stays float' not in told and 'layers quantized,' in told
    facts = json.loads(out.with_suffix('.json').read_text())['coverage']
    assert facts['text'] in told and facts['text'] in out.with_suffix('.html').read_text()
    cfg = fc.read_config(work / 'int8.py')
    cfg.model.update(type='Quantized', of='BEVFusion', skip=['img_backbone.conv1'])
    model = fc.build_model(cfg)
    kept = fc.load_weights(model, out, calibrated=True)['kept_float']
    assert {n.rpartition('.')[0] for n in kept} == {'img_backbone.conv1'}
    args = [str(a) for a in (work / 'int8.py', out, '--out-dir', files, '--no-verify')]
    with pytest.raises(UncalibratedError, match='kept float') as err:
        export_onnx.main(args)
    assert "skip={'img_backbone.conv1': 'why'}" in str(err.value)
    export_onnx.main([*args, '--only', 'camera.backbone', *options])
    manifest = json.loads((files / 'manifest.json').read_text())
    groups = {g['module']: g for g in manifest['coverage']['float']}
    conv1 = groups['img_backbone.conv1']
    assert conv1['layers'] == ['img_backbone.conv1'] and conv1['share'] > 0
    assert groups['bbox_head.decoder']['reason'].startswith('it works on queries')
    assert groups['pts_middle_encoder']['share'] is None
    assert manifest['coverage']['quantized'] == facts['quantized']
