"""tools/test_onnx.py and tools/parity.py: exported files of the trained tiny BEVFusion."""

import contextlib
import importlib.util
import io
import json
import re
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from mmdet3d_quant.check.detector import manifest_problems
from mmdet3d_quant.check.probes import module_name
from mmdet3d_quant.engines.tensorrt_rtx import compile_onnx, is_installed
from mmdet3d_quant.export import ExportError
from mmdet3d_quant.export.manifest import read_manifest
from mmdet3d_quant.files.checkpoint import CheckpointError
from tests.small import ROOT
from tests.tools.tiny import write_config

sys.path.insert(0, str(ROOT / 'tools'))
import calibrate  # noqa: E402
import export_onnx  # noqa: E402
import parity  # noqa: E402

TRAINED = ROOT / 'checkpoints/bevfusion_tiny_lidar-cam_synthetic.pth'
KEY = 'NuScenes metric/pred_instances_3d_NuScenes/'


def tool():
    spec = importlib.util.spec_from_file_location('tool_test_onnx', ROOT / 'tools/test_onnx.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TEST_ONNX = tool()


@pytest.fixture(scope='module')
def work(tmp_path_factory, tiny_nuscenes):
    """The trained tiny model, calibrated on a frame, and its INT8 files in ``int8``."""
    folder = tmp_path_factory.mktemp('deployed')
    base = 'bevfusion_tiny_lidar-cam_int8_synthetic'
    config, int8 = write_config(folder / 'int8.py', base, tiny_nuscenes), folder / 'int8.pth'
    calibrate.main([str(a) for a in (config, TRAINED, '--out', int8, '--num-batches', 2)])
    options = ('--out-dir', folder / 'int8', '--no-verify', '--no-compile')
    export_onnx.main([str(a) for a in (config, int8, *options)])
    return folder


def run(work, *args):
    command = [
        work / 'int8.py',
        work / 'int8.pth',
        work / 'int8',
        '--work-dir',
        work / 'run',
        *args,
    ]
    return TEST_ONNX.main([str(a) for a in command])


def scores(found):
    return {name: found[KEY + name] for name in ('mAP', 'NDS')}


@pytest.fixture(scope='module')
def whole(work):
    """Scores of the files, and what the tool prints beside the fake-quantized model."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        found = scores(run(work, '--fake-quant'))
    return found, out.getvalue()


def test_files_score_what_the_fake_quantized_model_scores(whole):
    found, shown = whole
    assert found['mAP'] > 0.1  # it does find things
    row = next(line for line in shown.splitlines() if ' mAP ' in line).replace('│', ' ').split()
    assert float(row[1]) == pytest.approx(found['mAP'], abs=1e-4)
    assert abs(float(row[3])) < 0.03  # two frames: a box more or less counts


@pytest.mark.slow
def test_broken_scales_cost_score(work, whole):
    """The scores are those of the files, not of the model beside them."""
    kept = (work / 'int8/fuser.onnx').read_bytes()
    model = onnx.load_from_string(kept)
    scales = {
        node.input[1]
        for node in model.graph.node
        if node.op_type == 'QuantizeLinear' and re.search('neck.*_input_quantizer', node.name)
    }
    for node in model.graph.node:
        if node.op_type == 'Constant' and node.output[0] in scales:
            value = numpy_helper.to_array(node.attribute[0].t)
            node.attribute[0].t.CopyFrom(numpy_helper.from_array(value * np.float32(300)))
    try:
        onnx.save(model, work / 'int8/fuser.onnx')
        with pytest.raises(ExportError, match='fuser.onnx was changed after it was exported'):
            run(work)
        assert scores(run(work, '--force'))['mAP'] < whole[0]['mAP'] / 2
    finally:
        (work / 'int8/fuser.onnx').write_bytes(kept)


@pytest.mark.slow
def test_the_lidar_file_runs_too(work, whole):
    assert scores(run(work, '--scn'))['mAP'] == pytest.approx(whole[0]['mAP'], abs=0.05)


@pytest.mark.slow
@pytest.mark.skipif(not is_installed(), reason='TensorRT for RTX is not installed')
def test_the_compiler_runs_every_convolution_of_the_files_in_int8(work):
    for name in ('camera.backbone.onnx', 'fuser.onnx'):
        for verdict in compile_onnx(work / 'int8' / name).values():
            nodes = onnx.load(work / 'int8' / name).graph.node
            count = sum(node.op_type.startswith('Conv') for node in nodes)
            assert (verdict.int8, len(verdict.products)) == (count, count) and count > 10


def test_files_of_another_checkpoint_are_refused(work, tmp_path):
    with pytest.raises(ExportError, match='another checkpoint .*int8.pth.*--force'):
        TEST_ONNX.main([str(a) for a in (work / 'int8.py', TRAINED, work / 'int8')])
    manifest = read_manifest(work / 'int8')
    assert manifest_problems(manifest, work / 'int8', work / 'int8.pth') == []
    assert len(manifest_problems(manifest, tmp_path, work / 'int8.pth')) == len(manifest['files'])


def test_folders_and_checkpoints_that_are_none_are_errors(work, tmp_path):
    def main(checkpoint, folder):
        TEST_ONNX.main([str(a) for a in (work / 'int8.py', checkpoint, folder)])

    with pytest.raises(ExportError, match='manifest.json does not exist; make the folder with'):
        main(work / 'int8.pth', tmp_path)
    (tmp_path / 'manifest.json').write_text(json.dumps(dict(files=3)))
    with pytest.raises(ExportError, match='damaged'):
        main(work / 'int8.pth', tmp_path)
    with pytest.raises(CheckpointError, match='does not exist'):
        main(tmp_path / 'none.pth', work / 'int8')


def test_parity_finds_nothing_and_then_what_was_broken(work, tmp_path, capsys):
    args = [work / 'int8.py', work / 'int8.pth', work / 'int8', '--files', 'fuser']
    assert parity.main([str(a) for a in (*args, '--json', tmp_path / 'p.json')]) == 0
    assert 'All steps agree' in capsys.readouterr().out
    rungs = json.loads((tmp_path / 'p.json').read_text())
    assert [r['stage'] for r in rungs][-3:] == ['onnxruntime', 'openvino', 'FP16']
    for name in ('manifest.json', 'fuser.onnx'):
        (tmp_path / name).write_bytes((work / 'int8' / name).read_bytes())
    model = onnx.load(tmp_path / 'fuser.onnx')
    conv = [n for n in model.graph.node if n.op_type == 'Conv'][2]
    bias = next(i for i in model.graph.initializer if i.name == conv.input[2])
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + 0.2, bias.name))
    onnx.save(model, tmp_path / 'fuser.onnx')
    args[2] = tmp_path
    assert parity.main([str(a) for a in args]) == 1
    shown = ' '.join(capsys.readouterr().out.split())
    named = module_name(conv.name)
    assert f'Numbers part at onnxruntime, fuser: {named}' in shown, shown[-500:]


def test_parity_finds_nothing_in_any_file(work, capsys):
    args = [work / 'int8.py', work / 'int8.pth', work / 'int8', '--engines', 'onnxruntime']
    assert parity.main([str(a) for a in args]) == 0
    shown = capsys.readouterr().out
    assert 'All steps agree.' in shown and shown.count('apart') == 0
    names = ('camera.backbone', 'camera.vtransform', 'fuser', 'head.bbox')
    assert all(f'│ {name} ' in shown for name in names), shown
    assert '83 of 83' in shown and '11 of 11' in shown


def scaled(model, kind, part):
    """Makes a scale 5 % larger; returns the layer."""
    name, target = next(
        (n.name, n) for n in model.graph.node if n.op_type == kind and part in n.name
    )
    for made in model.graph.node:
        if made.output[0] == target.input[1]:
            value = numpy_helper.to_array(made.attribute[0].t)
            made.attribute[0].t.CopyFrom(numpy_helper.from_array(value * np.float32(1.05)))
    return module_name(name).rpartition('.')[0]


def crossed(model, kind, part):
    """Lets two convolutions read the biases of each other."""
    convs = [n for n in model.graph.node if n.op_type == 'Conv' and part in n.name]
    shapes = {i.name: tuple(i.dims) for i in model.graph.initializer}
    a = convs[0]
    b = next(n for n in convs[1:] if shapes[n.input[2]] == shapes[a.input[2]])
    a.input[2], b.input[2] = b.input[2], a.input[2]
    return module_name(a.name)


@pytest.mark.parametrize(
    ('file', 'plant', 'kind', 'part'),
    [
        ('camera.backbone', scaled, 'DequantizeLinear', '/layer2.0/conv2/_input_quantizer'),
        ('camera.backbone', crossed, 'Conv', '/layer1'),
        ('camera.vtransform', crossed, 'Conv', ''),
        ('fuser', scaled, 'QuantizeLinear', '/blocks.0.3/_input_quantizer'),
        ('fuser', crossed, 'Conv', 'blocks.0'),
        ('head.bbox', crossed, 'Conv', 'prediction_heads'),
    ],
)
def test_parity_names_what_was_planted_in_a_file(work, tmp_path, capsys, file, plant, kind, part):
    (tmp_path / 'manifest.json').write_bytes((work / 'int8/manifest.json').read_bytes())
    model = onnx.load(work / f'int8/{file}.onnx')
    layer = plant(model, kind, part)
    onnx.save(model, tmp_path / f'{file}.onnx')
    args = [work / 'int8.py', work / 'int8.pth', tmp_path, '--engines', 'onnxruntime']
    assert parity.main([str(a) for a in (*args, '--files', file)]) == 1
    shown = ' '.join(capsys.readouterr().out.split())
    where = 'somewhere in the graph' if file == 'camera.vtransform' else layer
    named = re.search(rf'Numbers part at onnxruntime, {file}: (.*): [-.\d]+ dB in', shown)[1]
    names = named.split(', ')  # of a head all layers behind its last quantizer
    assert where in (names if file == 'head.bbox' else names[:1]), (layer, shown[-300:])


def test_files_of_a_range_that_does_not_fit_are_not_written(work, tmp_path):
    data = torch.load(work / 'int8.pth', weights_only=False)
    data['state_dict']['pts_backbone.blocks.0.3._input_quantizer._amax'] *= 100
    torch.save(data, tmp_path / 'wide.pth')
    args = [work / 'int8.py', tmp_path / 'wide.pth', '--out-dir', tmp_path / 'out', '--only']
    with pytest.raises(ExportError, match='1 range.s. do not fit .*blocks.0.3.*of 8 bits'):
        export_onnx.main([str(a) for a in (*args, 'fuser')])
    assert list((tmp_path / 'out').iterdir()) == []
    export_onnx.main([str(a) for a in (*args, 'fuser', '--no-verify')])
    parity_args = [work / 'int8.py', tmp_path / 'wide.pth', tmp_path / 'out', '--files', 'fuser']
    assert parity.main([str(a) for a in parity_args]) == 1


def test_the_file_of_the_lidar_encoder_is_verified(work, tmp_path, capsys):
    args = [work / 'int8.py', work / 'int8.pth', '--only', 'lidar.backbone', '--out-dir']
    (found,) = export_onnx.main([str(a) for a in (*args, tmp_path / 'out')])
    assert (found.cut, found.fault) == ('lidar.backbone.xyz', '') and found.libspconv > 50
    shown = capsys.readouterr().out
    assert 'lidar.backbone.xyz.onnx' in shown and f'{found.libspconv:.1f}' in shown
    export_onnx.main([str(a) for a in (*args, tmp_path / 'out', '--inputs', 'generated')])
    assert 'lidar.backbone.xyz.onnx: not run' in capsys.readouterr().out


def test_files_of_a_lidar_encoder_that_leaves_fp16_are_not_written(work, tmp_path):
    data = torch.load(work / 'int8.pth', weights_only=False)
    for name in ('weight', 'bias'):
        data['state_dict'][f'pts_middle_encoder.conv_out.1.{name}'] *= 1e4
    torch.save(data, tmp_path / 'hot.pth')
    args = [work / 'int8.py', tmp_path / 'hot.pth', '--only', 'lidar.backbone', '--out-dir']
    with pytest.raises(ExportError, match=r'lidar.backbone.xyz.onnx: libspconv: .*NaN or infinite'):
        export_onnx.main([str(a) for a in (*args, tmp_path / 'out')])
    assert list((tmp_path / 'out').iterdir()) == []


def test_parity_of_no_file_is_an_error(work):
    args = [work / 'int8.py', work / 'int8.pth', work / 'int8', '--files', 'fuser', 'nothing']
    with pytest.raises(ExportError, match='no file of the detector is among nothing'):
        parity.main([str(a) for a in args])
