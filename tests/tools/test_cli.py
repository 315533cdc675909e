"""The console command, and the wheel that carries tools and configs into another environment."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

import mmdet3d_quant_cli as cli
from tests.small import ROOT
from tests.sources import copied_to

CONFIG = 'configs/bevfusion_tiny/bevfusion_tiny_lidar-cam_int8_synthetic.py'
CHECKPOINT = 'checkpoints/bevfusion_tiny_lidar-cam_synthetic.pth'


def test_help_names_every_tool_with_what_it_does(capsys):
    cli.main([])
    shown = capsys.readouterr().out
    for name in ('calibrate', 'export_onnx', 'lint_onnx', 'test', 'train'):
        (line,) = (line for line in shown.splitlines() if line.split()[:1] == [name])
        assert len(line.split()) > 3
    assert 'terminal' not in cli.tools() and set(cli.tools()) <= {
        p.stem for p in (ROOT / 'tools').glob('*.py')
    }


def test_an_unknown_tool_is_told():
    with pytest.raises(SystemExit, match="no tool 'calibrat'.*calibrate"):
        cli.main(['calibrat'])


def test_a_tool_takes_the_place_of_the_command(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(os, 'execv', lambda program, words: calls.append((program, words)))
    monkeypatch.chdir(tmp_path)
    cli.main(['export-onnx', CONFIG, 'mine.pth', '--out-dir', 'configs/new'])
    ((program, words),) = calls
    script = str(ROOT / 'tools/export_onnx.py')
    assert program == sys.executable and words[:2] == [program, script]
    assert words[2:] == [str(ROOT / CONFIG), 'mine.pth', '--out-dir', 'configs/new']
    (tmp_path / CONFIG).parent.mkdir(parents=True)
    (tmp_path / CONFIG).write_text('model = dict()')
    assert cli.located(CONFIG) == CONFIG  # one's own comes first


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    """An environment that has mmdet3d, and this package from its wheel; an empty folder."""
    folder = tmp_path_factory.mktemp('wheel')
    pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check', '-q']
    options = ['--no-deps', '--no-build-isolation', '-w', str(folder)]
    source = copied_to(folder / 'source')
    subprocess.run([*pip, 'wheel', str(source), *options], check=True)
    (wheel,) = folder.glob('*.whl')
    venv.create(folder / 'env', with_pip=True)
    python = folder / 'env/bin/python'
    # The packages of this environment, but not its link to the checkout.
    where = subprocess.run(
        [python, '-c', 'import site; print(site.getsitepackages()[0])'],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    (Path(where) / 'mmdet3d_environment.pth').write_text(str(Path(torch.__file__).parents[1]))
    command = [python, '-m', 'pip', '-q', 'install', '--no-deps', '--no-index', str(wheel)]
    subprocess.run(command, check=True)
    empty = folder / 'elsewhere'
    empty.mkdir()
    return folder / 'env/bin/mmdet3d-quant', python, empty


@pytest.mark.slow
def test_the_wheel_works_from_another_folder(installed):
    command, python, folder = installed

    def run(*words):
        env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
        result = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
        return result.stdout

    there = run(python, '-c', 'import mmdet3d_quant; print(mmdet3d_quant.__file__)')
    assert str(folder.parent / 'env') in there
    scenes = ('--scene-names', 'scene-0061', 'scene-0103', '--samples', '2', '--workers', '1')
    run(command, 'make_synthetic_nuscenes', '--out', 'data/synthetic', *scenes)
    run(command, 'calibrate', CONFIG, CHECKPOINT, '--out', 'int8.pth', '--num-batches', '2')
    run(command, 'export-onnx', CONFIG, 'int8.pth', '--out-dir', 'onnx')
    manifest = json.loads((folder / 'onnx/manifest.json').read_text())
    assert set(manifest['files']) >= {'camera.backbone.onnx', 'fuser.onnx', 'head.bbox.onnx'}
    shown = run(command, 'lint_onnx', 'onnx/camera.backbone.onnx', 'onnx/fuser.onnx')
    assert 'camera.backbone.onnx' in shown
    run(command, 'test', CONFIG, 'int8.pth')
    # As OpenMMLab's `mim run` finds them.
    mim = Path(there.strip()).parent / '.mim'
    assert (mim / 'tools/calibrate.py').is_file() and (mim / CONFIG).is_file()
