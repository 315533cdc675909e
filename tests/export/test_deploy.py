"""The script beside the files, run with a trtexec that writes down what it is told."""

import json
import os
import shlex
import shutil
import subprocess
import time

import pytest

from mmdet3d_quant.core.compat import removeprefix, removesuffix
from mmdet3d_quant.export import ExportError
from mmdet3d_quant.export.deploy import build_script, engine_files, readme

FAKE = """#!/usr/bin/env bash
printf '%q ' "$@" >> "$CALLS"; echo >> "$CALLS"
for a in "$@"; do case $a in --saveEngine=*) echo engine > "${a#*=}" ;; esac; done
if [[ " $* " == *"--onnx=$FAIL.onnx "* ]]; then echo "no such layer"; exit 1; fi
"""


def tensors(*names, shape=(1, 8, 4, 4)):
    return {n: dict(shape=list(shape), dtype='float') for n in names}


def entry(inputs, outputs, *nodes, **more):
    return dict(inputs=inputs, outputs=outputs, nodes=dict.fromkeys(nodes, 1), **more)


INT8 = ('Conv', 'QuantizeLinear', 'DequantizeLinear')
FILES = {
    'camera.backbone.onnx': entry(tensors('img', 'depth'), tensors('f', 'w'), *INT8),
    'fuser.onnx': entry(tensors('camera', 'lidar'), tensors('middle'), *INT8),
    'head.bbox.onnx': entry(tensors('middle'), tensors('score', 'rot'), 'Conv'),
    'lidar.backbone.xyz.onnx': entry(
        tensors('0'), tensors('24'), 'SparseConvolution', order='xyz', grid=[8, 8, 4]
    ),
}


def manifest(**files):
    return dict(target='tensorrt', precision='int8', files=dict(FILES, **files))


@pytest.fixture
def folder(tmp_path):
    """An exported folder and a trtexec on the PATH of ``run``."""
    out = tmp_path / 'onnx of mine'
    out.mkdir()
    for name in FILES:
        (out / name).write_text('graph')
    fake = tmp_path / 'bin' / 'trtexec'
    fake.parent.mkdir()
    fake.write_text(FAKE)
    fake.chmod(0o755)
    write(out, manifest())
    return out


def write(folder, made):
    (folder / 'build_engines.sh').write_text(build_script(made))


def run(folder, *args, fail='none', path=True, **env):
    """Result of the script and the calls of trtexec."""
    calls = folder.parent / 'calls'
    calls.unlink(missing_ok=True)
    search = f'{folder.parent}/bin:' if path else ''
    result = subprocess.run(
        ['bash', str(folder / 'build_engines.sh'), *args],
        env=dict(os.environ, PATH=search + os.environ['PATH'], CALLS=str(calls), FAIL=fail, **env),
        capture_output=True,
        text=True,
        cwd='/',
    )
    lines = calls.read_text().splitlines() if calls.exists() else []
    return result, [shlex.split(line) for line in lines]


def test_every_file_is_built_with_its_flags_and_nothing_twice(folder):
    result, calls = run(folder)
    assert result.returncode == 0, result.stderr
    by_name = {removesuffix(removeprefix(c[0], '--onnx='), '.onnx'): c for c in calls}
    assert list(by_name) == ['camera.backbone', 'fuser', 'head.bbox']  # libspconv builds nothing
    assert by_name['camera.backbone'][1:5] == [
        '--fp16',
        '--int8',
        '--inputIOFormats=fp16:chw,fp16:chw',
        '--outputIOFormats=fp16:chw,fp16:chw',
    ]
    assert by_name['head.bbox'][1:4] == [
        '--fp16',
        '--inputIOFormats=fp16:chw',
        '--outputIOFormats=fp16:chw,fp16:chw',
    ]
    for name, call in by_name.items():
        assert '--timingCacheFile=build/timing.cache' in call
        assert '--memPoolSize=workspace:2048' in call
        assert (folder / f'build/{name}.plan').read_text() == 'engine\n'
        assert (folder / f'build/{name}.log').exists()
    assert not list(folder.glob('build/*.part'))
    result, calls = run(folder)
    assert calls == [] and result.stdout.count('is up to date') == 3
    later = time.time() + 5
    os.utime(folder / 'fuser.onnx', (later, later))
    assert [c[0] for c in run(folder)[1]] == ['--onnx=fuser.onnx']
    assert len(run(folder, '--force')[1]) == 3


def test_names_pick_and_print_runs_nothing(folder):
    assert [c[0] for c in run(folder, 'fuser')[1]] == ['--onnx=fuser.onnx']
    result, calls = run(folder, '--print', path=False, TRTEXEC='/opt/trtexec')
    assert calls == [] and result.stdout.count('/opt/trtexec --onnx=') == 3
    assert '--fp16 --int8' in result.stdout


def test_the_environment_is_respected(folder):
    other = folder.parent / 'other trtexec'
    shutil.copy(folder.parent / 'bin/trtexec', other)
    (folder.parent / 'bin/trtexec').unlink()
    result, calls = run(folder, 'fuser', TRTEXEC=str(other), WORKSPACE='512')
    assert result.returncode == 0 and '--memPoolSize=workspace:512' in calls[0]


def test_a_failed_build_leaves_no_engine_and_says_where_to_look(folder):
    result, calls = run(folder, fail='fuser')
    assert result.returncode == 1 and len(calls) == 2  # it stops there
    assert 'fuser.plan could not be built; see build/fuser.log' in result.stderr
    assert 'no such layer' in result.stderr
    built = {p.name for p in (folder / 'build').iterdir()}
    assert built == {'camera.backbone.plan', 'camera.backbone.log', 'fuser.log'}


def test_help_and_wrong_arguments(folder):
    result, _ = run(folder, '--help')
    assert result.returncode == 0 and 'TRTEXEC=/usr/src' in result.stdout
    assert 'LAYERNORM_PLUGIN' not in result.stdout
    result, calls = run(folder, 'fusor')
    assert result.returncode == 2 and 'unknown argument fusor' in result.stderr and not calls
    result, _ = run(folder, TRTEXEC='trtexec-of-nobody')
    assert result.returncode == 1 and 'not found; set TRTEXEC' in result.stderr


def test_plugins_and_dynamic_batches(folder):
    head = entry(
        tensors('middle', shape=('batch', 8, 4, 4)), tensors('score'), 'CustomLayerNormalization'
    )
    write(folder, manifest(**{'head.bbox.onnx': head}))
    call = run(folder, 'head.bbox', LAYERNORM_PLUGIN='/lib/a b.so')[1][0]
    assert '--plugins=/lib/a b.so' in call
    assert '--minShapes=middle:1x8x4x4' in call and '--maxShapes=middle:2x8x4x4' in call
    assert '--plugins=libcustom_layernorm.so' in run(folder, '--force', 'head.bbox')[1][0]
    assert 'LAYERNORM_PLUGIN' in run(folder, '--help')[0].stdout


def test_bash_and_shellcheck_have_no_objections(folder):
    script = str(folder / 'build_engines.sh')
    assert subprocess.run(['bash', '-n', script]).returncode == 0
    if shutil.which('shellcheck'):
        assert subprocess.run(['shellcheck', script]).returncode == 0


def test_the_readme_has_every_file_with_shapes_and_flags():
    text = readme(manifest())
    rows = {line.split('`')[1]: line for line in text.splitlines() if line.startswith('| `')}
    assert rows.keys() == FILES.keys()
    assert rows['fuser.onnx'].endswith('| `--fp16 --int8` |') and '1x8x4x4' in rows['fuser.onnx']
    assert rows['head.bbox.onnx'].endswith('| `--fp16` |')
    assert rows['lidar.backbone.xyz.onnx'].endswith('| none |')
    assert './build_engines.sh' in text and 'in the order xyz' in text
    assert 'build_engines' not in readme(dict(manifest(), target='openvino'))


@pytest.mark.parametrize('text', ['{', '[]', '{}', '{"files": [1]}', '{"files": {"a.onnx": 3}}'])
def test_the_files_for_engines_and_a_manifest_that_cannot_tell_them(tmp_path, text):
    told = tmp_path / 'manifest.json'
    with pytest.raises(ExportError, match=f'{told} does not exist; make the folder'):
        engine_files(tmp_path)
    told.write_text(json.dumps(manifest()))
    names = sorted(n for n in FILES if not n.startswith('lidar'))
    assert engine_files(tmp_path) == [tmp_path / name for name in names]
    told.write_text(text)
    with pytest.raises(ExportError, match=f'{told} is damaged .*; export again'):
        engine_files(tmp_path)
