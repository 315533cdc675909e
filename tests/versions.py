"""Marks of tests that an old version of an engine cannot run."""

from importlib.metadata import version

import pytest

#: The last for Python 3.8, and the last for 3.9, which read fewer operators and types.
OPENVINO_2024 = version('openvino').split('.')[0] <= '2024'
OPENVINO_2025 = version('openvino').split('.')[0] <= '2025'
_RUNTIME = tuple(map(int, version('onnxruntime').split('.')[:2]))
#: Before 1.25, the first with a kernel for them.
NO_DEFORMABLE = _RUNTIME < (1, 25)
#: The last opset that ONNX Runtime loads, where that is not ahead of onnx.
MOST_OPSET = 21 if _RUNTIME < (1, 20) else 99

without_old_openvino = pytest.mark.skipif(OPENVINO_2025, reason='OpenVINO 2025 cannot read it')
without_old_onnxruntime = pytest.mark.skipif(
    NO_DEFORMABLE, reason='ONNX Runtime before 1.25 has no deformable convolutions'
)
DEFORMABLE_ENGINES = [pytest.param('onnxruntime', marks=without_old_onnxruntime), 'openvino']
