"""NNCF's quantization of a float file, as a peer, in an environment of its own."""

from __future__ import annotations

from pathlib import Path

from mmdet3d_quant.check.peer import Peer

#: The peer's name among the variants.
PEER = 'NNCF'


class Nncf(Peer):
    """Quantizes float files with NNCF, to OpenVINO's ``.xml`` or to ``.onnx``.

    Args:
        python: A Python with nncf, openvino and onnx.
        script: ``tools/nncf_peer.py``, which it runs.

    Raises:
        EngineError: If NNCF is not there.
    """

    def __init__(self, python: str, script: Path) -> None:
        remedy = (
            'make the Python for --nncf-python with `python3 -m venv DIR && DIR/bin/pip install '
            'nncf openvino onnx`'
        )
        super().__init__(PEER, python, script, ('nncf', 'openvino', 'onnx'), remedy)
