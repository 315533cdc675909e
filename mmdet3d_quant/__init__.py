"""INT8 quantization of MMDetection3D models as a config change.

Importing this package registers the ``Quant*`` types and nothing else.
"""

from importlib import import_module
from types import ModuleType

from mmdet3d_quant import layers, models
from mmdet3d_quant.calibration import (
    Calibration,
    CalibrationError,
    Calibrator,
    Plan,
    calibrate,
)
from mmdet3d_quant.core.modes import quantizers, set_mode
from mmdet3d_quant.core.quantizer import UncalibratedError
from mmdet3d_quant.core.ties import ties
from mmdet3d_quant.layers.fold import fold_bn
from mmdet3d_quant.moved import MOVED, keep_old_paths
from mmdet3d_quant.version import __version__

__all__ = [
    'Calibration',
    'CalibrationError',
    'Calibrator',
    'Plan',
    'UncalibratedError',
    '__version__',
    'calibrate',
    'fold_bn',
    'layers',
    'models',
    'quantizers',
    'set_mode',
    'ties',
]


def __getattr__(name: str) -> ModuleType:
    """Imports ``mmdet3d_quant.export``, which needs onnx, when it is first asked for.

    So modules that moved, too, which used to be attributes.
    """
    if name == 'export' or name in MOVED:
        return import_module(f'mmdet3d_quant.{name}')
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


keep_old_paths()
