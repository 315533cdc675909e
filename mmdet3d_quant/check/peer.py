"""Another quantizer that makes files to compare with, run in an environment of its own."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmdet3d_quant.engines import Arrays, EngineError


class Peer:
    """Runs a script of ours in a Python that has another quantizer.

    Args:
        name: What to call it in messages.
        python: The Python.
        script: The script, called as ``script FILE INPUTS OUT [OPTION ...]``.
        modules: Modules that it needs there.
        remedy: What to do if they are not there.

    Raises:
        EngineError: If Python or a module is not there.
    """

    def __init__(
        self, name: str, python: str, script: Path, modules: Sequence[str], remedy: str
    ) -> None:
        self.name, self.python, self.script = name, python, script
        try:
            done = subprocess.run(
                [python, '-c', f'import {", ".join(modules)}'], capture_output=True, text=True
            )
            problem = _last_words(done) if done.returncode else None
        except OSError as err:
            problem = str(err)
        if problem:
            raise EngineError(f'{python}: {problem}; {remedy}')

    def quantize(self, graph: Path, samples: Arrays, out: Path, *options: str) -> None:
        """Quantizes a file.

        Args:
            graph: The file.
            samples: Inputs to calibrate on, by name, samples along a new first axis.
            out: File to write.
            *options: Of the script.

        Raises:
            EngineError: If it fails; carries the end of its message.
        """
        with tempfile.TemporaryDirectory() as folder:
            inputs = Path(folder) / 'inputs.npz'
            np.savez(inputs, **samples)
            command = [self.python, self.script, graph, inputs, out, *options]
            done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
        if done.returncode:
            problem = done.stderr.strip()[-500:] or _last_words(done)
            raise EngineError(f'{self.name} could not quantize {graph}: {problem}')


def _last_words(done: subprocess.CompletedProcess) -> str:
    """Last line of what a process wrote to its standard error, or how it ended without any."""
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f'it ended with exit code {done.returncode} and no message'
