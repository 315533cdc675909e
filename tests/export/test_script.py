"""The script that builds engines, against a trtexec of each generation."""

import os
import subprocess

import pytest

from mmdet3d_quant.export.deploy import build_script

#: Flags that choose types, by generation; all others end a run.
TYPES = {
    'tensorrt8': '--fp16|--int8|--inputIOFormats=*|--outputIOFormats=*',
    'tensorrt10': '--stronglyTyped',
    'tensorrt11': '--none',
}
TRTEXEC = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
for a in "$@"; do case $a in
  --saveEngine=*) echo engine > "${a#*=}" ;;
  --onnx=*|--timingCacheFile=*|--memPoolSize=*|--profilingVerbosity=*|--exportLayerInfo=*) ;;
  %s) ;;
  *) echo "unknown option $a" >&2; exit 1 ;;
esac; done
"""


def entry(*nodes):
    tensor = dict(x=dict(shape=[1, 2], dtype='float'))
    return dict(inputs=tensor, outputs=tensor, nodes=dict.fromkeys(nodes, 1))


def run(folder, target, version):
    files = {'a.onnx': entry('Conv', 'DequantizeLinear'), 'b.onnx': entry('Conv')}
    (folder / 'trtexec').write_text(TRTEXEC % TYPES[version])
    (folder / 'trtexec').chmod(0o755)
    for name in files:
        (folder / name).write_text('graph')
    script = build_script(dict(target=target, precision='int8', files=files))
    (folder / 'build_engines.sh').write_text(script)
    calls = folder / 'calls'
    env = dict(os.environ, TRTEXEC=str(folder / 'trtexec'), CALLS=str(calls))
    done = subprocess.run(['bash', str(folder / 'build_engines.sh')], env=env, capture_output=True)
    return done.returncode, calls.read_text().splitlines()


@pytest.mark.parametrize(
    'target, version, flags',
    [
        ('tensorrt', 'tensorrt8', ({'--fp16', '--int8'}, {'--fp16'})),
        ('tensorrt10', 'tensorrt10', ({'--stronglyTyped'},) * 2),
        ('tensorrt11', 'tensorrt11', (set(), set())),
    ],
)
def test_each_generation_gets_its_flags(target, version, flags, tmp_path):
    code, calls = run(tmp_path, target, version)
    told = [set(call.split()) & {'--fp16', '--int8', '--stronglyTyped'} for call in calls]
    assert code == 0 and tuple(told) == flags


def test_a_trtexec_of_another_generation_refuses_them(tmp_path):
    assert run(tmp_path, 'tensorrt', 'tensorrt11')[0] == 1
