"""Packages that are looked for, as data, and comparison of their versions."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Package:
    """A package that is used here.

    Attributes:
        wanted: Requirement, as pip takes it.
        module: Module that is imported to see whether it works.
        without: What cannot be done where it is missing; empty where nothing works then.
        install: What installs it; default: ``pip install`` with ``wanted``.
        others: Other names under which the same module is distributed.
    """

    wanted: str
    module: str
    without: str = ''
    install: str = ''
    others: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the distribution."""
        return requirement(self.wanted)[0]

    @property
    def remedy(self) -> str:
        """Command that installs a version that fits."""
        return self.install or f"pip install '{self.wanted}'"


_EXPORT = 'files cannot be exported and checked'
_ENGINE = 'files cannot be run in it'
#: In the order in which they are imported: one that others need comes before them.
PACKAGES = (
    Package('numpy<2', 'numpy'),
    Package('torch>=2.0', 'torch', install='see https://pytorch.org: it must fit the CUDA version'),
    Package('mmengine>=0.10,<0.11', 'mmengine'),
    Package(
        'mmcv>=2.0,<2.2',
        'mmcv.ops',
        install='MMCV_WITH_OPS=1 pip install --no-build-isolation mmcv==2.1.0 (minutes: it '
        'compiles; a newest torch: docs/versions.md)',
        others=('mmcv-lite', 'mmcv-full'),
    ),
    Package('mmdet>=3.2,<3.4', 'mmdet'),
    Package('mmdet3d>=1.4,<1.5', 'mmdet3d'),
    Package('pytorch-quantization>=2.1.3,<2.2', 'pytorch_quantization'),
    Package(
        'spconv>=2.1',
        'spconv.pytorch',
        without='no sparse LiDAR encoder but that of mmcv',
        install='pip install spconv (no GPU) or spconv-cu120 (as CUDA is)',
        others=('spconv-cu114', 'spconv-cu117', 'spconv-cu118', 'spconv-cu120', 'spconv-cu121'),
    ),
    Package('onnx>=1.14', 'onnx', without=_EXPORT),
    Package(
        'onnxruntime>=1.16', 'onnxruntime', without=_EXPORT, others=('onnxruntime-gpu',)
    ),
    Package('openvino>=2024.0', 'openvino', without=_EXPORT),
    Package(
        'tensorrt>=8.6',
        'tensorrt',
        without=_ENGINE,
        install='pip install tensorrt (on an Orin it comes with JetPack)',
    ),
    Package(
        'tensorrt-rtx-cu12-bindings==1.7.1.116',
        'tensorrt_rtx_bindings',
        without="NVIDIA's compiler is not asked what runs in INT8",
        install='pip install --no-deps tensorrt-rtx-cu12-libs==1.7.1.116 '
        'tensorrt-rtx-cu12-bindings==1.7.1.116',
    ),
    Package(
        'safetensors>=0', 'safetensors', without='checkpoints in that format are not read',
        install='pip install safetensors',
    ),
)  # fmt: skip


def numbers(version: str) -> tuple[int, ...]:
    """Reads the numbers of a release: ``2.1.2+cu121`` gives (2, 1, 2)."""
    found = re.match(r'\d+(?:\.\d+)*', version)
    return tuple(map(int, found[0].split('.'))) if found else ()


def requirement(text: str) -> tuple[str, list[tuple[str, tuple[int, ...]]]]:
    """Splits a requirement into the name and its bounds, each an operator and numbers."""
    name = re.match(r'[\w-]+', text)
    assert name, text
    bounds = re.findall(r'(>=|<|==)([\d.]+)', text)
    return name[0], [(operator, numbers(version)) for operator, version in bounds]


def fits(version: str, wanted: str) -> bool:
    """Tells whether a version is within a requirement's bounds."""
    has = numbers(version)
    for operator, bound in requirement(wanted)[1]:
        length = max(len(has), len(bound))
        left, right = (n + (0,) * (length - len(n)) for n in (has, bound))
        if not {'>=': left >= right, '<': left < right, '==': left == right}[operator]:
            return False
    return True
