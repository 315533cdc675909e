"""Facts of an environment as plain values: versions, imports, processor, compilers."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Sequence

from mmdet3d_quant.doctor.packages import PACKAGES
from mmdet3d_quant.version import __version__

CPUINFO = Path('/proc/cpuinfo')
#: What a container may use of the processor: microseconds, and of how many.
QUOTA = Path('/sys/fs/cgroup/cpu.max')
#: Instructions that matter to INT8 and to bfloat16, as Linux calls them on x86 and on ARM.
INSTRUCTIONS = ('avx2', 'avx_vnni', 'avx512_vnni', 'amx_int8', 'avx512_bf16', 'amx_bf16')
INSTRUCTIONS_ARM = ('asimddp', 'i8mm', 'bf16')
VARIABLES = ('ONEDNN_MAX_CPU_ISA', 'OMP_NUM_THREADS', 'CUDA_VISIBLE_DEVICES', 'TRITON_INTERPRET')
_CHILD = Path(__file__).with_name('child.py')
_HOME = Path(__file__).resolve().parents[2]


def gather() -> dict[str, Any]:
    """Gathers what :func:`judge` looks at; takes as long as the imports do.

    Returns:
        Dict: ``python``, ``system``, ``machine``; ``versions`` by distribution, None where it is
        missing; ``imports`` by module, with ``error``; ``processor``; ``programs`` by name, their
        paths; ``variables`` of the environment that are set; ``driver``, whether NVIDIA's is there.
    """
    names = [name for package in PACKAGES for name in (package.name, *package.others)]
    modules = [package.module for package in PACKAGES] + ['triton', 'mmdet3d_quant']
    return dict(
        python=platform.python_version(),
        system=platform.platform(),
        machine=platform.machine(),
        versions={'mmdet3d-quant': __version__, **{n: installed(n) for n in (*names, 'triton')}},
        imports=try_imports(modules),
        processor=processor(),
        programs={name: shutil.which(name) for name in ('c++', 'cc', 'nvcc', 'nvidia-smi')},
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
        driver=Path('/proc/driver/nvidia/version').exists(),
    )


def installed(name: str) -> str | None:
    """Looks up the version of a distribution; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def try_imports(
    modules: Sequence[str], timeout: float = 300, home: Path = _HOME
) -> dict[str, dict[str, Any]]:
    """Imports modules in a process of its own, and in another where one takes the process along.

    Args:
        modules: Their names; those that are not there are not tried.
        timeout: Seconds for all of them.
        home: Folder to import from first.

    Returns:
        Dict by module that is there: ``error`` (empty if it imports), ``version``, ``file``, and
        what else ``child.py`` asks it.
    """
    left = [name for name in modules if _is_there(name, home)]
    found: dict[str, dict[str, Any]] = {}
    while left:
        command = [sys.executable, str(_CHILD), str(home), *left]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
            told, end = run.stdout, _end(run.returncode, run.stderr)
        except subprocess.TimeoutExpired as err:
            told = err.stdout.decode() if isinstance(err.stdout, bytes) else err.stdout or ''
            end = f'took longer than {timeout:.0f} s'
        answers = [json.loads(line) for line in told.splitlines() if line.startswith('{')]
        found.update((answer.pop('name'), answer) for answer in answers if 'name' in answer)
        begun = [answer['begins'] for answer in answers if 'begins' in answer]
        for name in [n for n in begun if n not in found] or ([] if begun else left):
            found[name] = dict(error=end)
        left = [name for name in left if name not in found]
    return found


def _is_there(name: str, home: Path) -> bool:
    top = name.partition('.')[0]
    try:
        return (home / top).is_dir() or find_spec(top) is not None
    except ValueError:  # it was imported and has no spec
        return True


def _end(code: int, errors: str) -> str:
    """Says how a process ended."""
    last = errors.strip().splitlines()[-1:] or ['']
    if code < 0:
        return f'the process crashed with {signal.Signals(-code).name}'
    return f'the process ended with exit code {code}: {last[0]}'


def processor() -> dict[str, Any]:
    """Reads the processor, as far as the system tells it.

    Returns:
        Dict: ``name``; ``instructions`` of :data:`INSTRUCTIONS`, None where they are not told;
        ``cores`` that this process may use.
    """
    lines = CPUINFO.read_text().splitlines() if CPUINFO.is_file() else []
    fields = dict(
        (key.strip(), value.strip()) for key, _, value in (line.partition(':') for line in lines)
    )
    flags = fields.get('flags', fields.get('Features'))
    known = (*INSTRUCTIONS, *INSTRUCTIONS_ARM)
    return dict(
        name=fields.get('model name') or platform.processor() or platform.machine(),
        instructions=None if flags is None else [f for f in known if f in flags.split()],
        cores=cores(),
    )


def cores() -> float:
    """Counts the cores that this process may use, of which a container may have a part."""
    affinity = getattr(os, 'sched_getaffinity', None)
    count = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    words = QUOTA.read_text().split() if QUOTA.is_file() else []
    if len(words) == 2 and words[0] != 'max':
        return min(count, int(words[0]) / int(words[1]))
    return count
