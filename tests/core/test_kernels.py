"""The kernels of a GPU compute what a CPU does, by Triton's interpreter."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pytest

CASES = Path(__file__).with_name('kernel_cases.py')
#: A case or two of each kernel; the others take minutes.
QUICK = (
    '(bits_of_a_cpu and shape3 and dtype0) or (of_separate and shape0 and True-True) or tied '
    'or (counted and 4099) or waits or together or joined_only or leaves_the '
    'or (join_their and True-None) or evaluation'
)


def _loops() -> bool:
    """Tells whether NumPy still makes an int of an array of one element, on which loops rest."""
    try:
        return int(np.ones(1, dtype=int)) == 1
    except TypeError:
        return False


def _triton() -> bool:
    """Tells whether there is a Triton whose interpreter and compiler serve; it is not imported.

    The kernels are written for 3.0 on, whose interpreter refuses them.
    """
    try:
        return tuple(map(int, version('triton').split('.')[:2])) >= (3, 3)
    except PackageNotFoundError:
        return False


@pytest.mark.skipif(not _triton(), reason='there is no Triton from 3.3 on')
@pytest.mark.skipif(not _loops(), reason="Triton's interpreter wants NumPy below 2.5")
@pytest.mark.parametrize('cases', [QUICK, pytest.param('', marks=pytest.mark.slow)])
def test_in_the_interpreter(cases):
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', str(CASES)]
    command += ['-k', cases] if cases else []
    env = dict(os.environ, TRITON_INTERPRET='1')
    found = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert not found.returncode, found.stdout[-5000:] + found.stderr[-2000:]


#: Types of arguments that are no constants; T is the tensor's.
ARGUMENTS = dict(
    x='T', other='T', y='T', grad='T', grad_x='T', grad_other='T', rounded='T', bits='*i32',
    tables='*i32', exponent='*i32', n='i32', count='i32', inner='i32', rows='i32', each='i32',
    words='i32', eps='fp32', root='fp32', **dict.fromkeys(
        'amax mean var gain shift sums grad_amax'.split(), '*fp32'
    ), **dict.fromkeys('weights lengths ranges starts'.split(), '*i64'),
)  # fmt: skip
CONSTANTS = dict(
    QMIN=-127, QMAX=127, RECTIFY=True, STORE=True, ADD=True, BLOCK=1024, TABLES=8, CHANNELS=128,
    WIDE=64, LONG=16, PLANES=False, MASK=True, LEARNED=False,
)  # fmt: skip


@pytest.mark.skipif(not _triton(), reason='there is no Triton from 3.3 on')
@pytest.mark.parametrize(
    'changes', [{}, dict(MASK=False, LEARNED=True), dict(PLANES=True, WIDE=1, CHANNELS=5)]
)
def test_they_compile_for_a_gpu_that_is_not_there(changes):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mmdet3d_quant.core import kernels

    found = [f for f in vars(kernels).values() if isinstance(f, triton.JITFunction)]
    found = [f for f in found if not f.__name__.startswith('_')]
    assert len(found) > 8
    for kernel in found:
        names = kernel.arg_names
        constants = {n: v for n, v in {**CONSTANTS, **changes}.items() if n in names}
        if not constants.keys() & changes.keys() and changes:
            continue
        for kind in ('*fp32',) if kernel is kernels.count else ('*fp32', '*fp16'):
            types = {n: 'constexpr' if n in constants else ARGUMENTS[n] for n in names}
            types = {n: kind if t == 'T' else t for n, t in types.items()}
            values = {(names.index(n),): value for n, value in constants.items()}
            source = ASTSource(kernel, types, constexprs=values)
            made = triton.compile(source, target=GPUTarget('cuda', 90, 32))
            assert '.target sm_90' in made.asm['ptx']
