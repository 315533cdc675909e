"""NNCF's quantization of a float file, as a peer, in an environment of its own."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np

from mmdet3d_quant.engines import Arrays, EngineError

#: The peer's name among the variants.
PEER = 'NNCF'


class Nncf:
    """Quantizes float files with NNCF.

    Args:
        python: A Python with nncf, openvino and onnx.
        script: ``tools/nncf_peer.py``, which it runs.

    Raises:
        EngineError: If NNCF is not there.
    """

    def __init__(self, python: str, script: Path) -> None:
        self.python, self.script = python, script
        try:
            done = subprocess.run(
                [python, '-c', 'import nncf, openvino, onnx'], capture_output=True, text=True
            )
            problem = _last_words(done) if done.returncode else None
        except OSError as err:
            problem = str(err)
        if problem:
            raise EngineError(
                f'--nncf-python {python}: {problem}; make it with `python3 -m venv DIR && '
                'DIR/bin/pip install nncf openvino onnx`'
            )

    def quantize(self, graph: Path, samples: Arrays, out: Path) -> None:
        """Quantizes a float file.

        Args:
            graph: The file.
            samples: Inputs to calibrate on, by name, samples along a new first axis.
            out: OpenVINO's ``.xml`` to write.

        Raises:
            EngineError: If NNCF fails; carries the end of its message.
        """
        inputs = out.with_suffix('.npz')
        np.savez(inputs, **samples)
        command = [self.python, self.script, graph, inputs, out]
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
        if done.returncode:
            problem = done.stderr.strip()[-500:] or _last_words(done)
            raise EngineError(f'NNCF could not quantize {graph}: {problem}')


def _last_words(done: subprocess.CompletedProcess) -> str:
    """Last line of what a process wrote to its standard error, or how it ended without any."""
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f'it ended with exit code {done.returncode} and no message'
