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
    """Tells whether there is a Triton that the kernels are written for; it is not imported."""
    try:
        return int(version('triton').split('.')[0]) >= 3
    except PackageNotFoundError:
        return False


@pytest.mark.skipif(not _triton(), reason='there is no Triton from 3.0 on')
@pytest.mark.skipif(not _loops(), reason="Triton's interpreter wants NumPy below 2.5")
@pytest.mark.parametrize('cases', [QUICK, pytest.param('', marks=pytest.mark.slow)])
def test_in_the_interpreter(cases):
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', str(CASES)]
    command += ['-k', cases] if cases else []
    env = dict(os.environ, TRITON_INTERPRET='1')
    found = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert not found.returncode, found.stdout[-5000:] + found.stderr[-2000:]
