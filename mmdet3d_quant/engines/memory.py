"""Memory of an engine: ``python -m mmdet3d_quant.engines.memory ENGINE FILE INPUTS THREADS``."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil

from mmdet3d_quant.core.errors import QuantError
from mmdet3d_quant.engines import Arrays, make_engine


def added_memory(engine: str, path: str | Path, inputs: Path, num_threads: int) -> float:
    """Measures by how many megabytes an engine raises the peak memory of a fresh process.

    The engine loads the file and runs it twice.

    Args:
        engine: A key of ``ENGINES``.
        path: The file.
        inputs: Its inputs, ``.npz``.
        num_threads: CPU threads.

    Returns:
        Float, megabytes of 10**6 bytes.

    Raises:
        QuantError: If the process ends with an error; carries its last line.
    """
    command = [sys.executable, '-m', __name__, engine, str(path), str(inputs), str(num_threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ['no message'])[-1]
        raise QuantError(f'measuring the memory of {path} failed: {last}')
    return float(done.stdout.split()[-1])


def _measure(engine: str, path: str, inputs: Arrays, num_threads: int) -> float:
    before = psutil.Process().memory_info().rss
    run = make_engine(engine, path, num_threads)
    for _ in range(2):
        run(inputs)
    return (peak_memory() - before) / 1e6


def peak_memory() -> int:
    """Reads the peak resident memory of this process, in bytes."""
    status = Path('/proc/self/status')
    if status.is_file():  # Linux: getrusage counts the parent's peak too
        line = next(x for x in status.read_text().splitlines() if x.startswith('VmHWM'))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == '__main__':
    name, file, arrays, threads = sys.argv[1:]
    with np.load(arrays) as stored:
        print(_measure(name, file, dict(stored), int(threads)))
