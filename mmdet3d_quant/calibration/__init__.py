"""Post-training calibration."""

from mmdet3d_quant.calibration.calibrate_model import calibrate
from mmdet3d_quant.calibration.calibrator import Calibrator
from mmdet3d_quant.calibration.health import Health
from mmdet3d_quant.calibration.observe import Statistics
from mmdet3d_quant.calibration.plan import Plan
from mmdet3d_quant.calibration.result import (
    CalibratedRange,
    Calibration,
    CalibrationError,
    Choice,
    Correction,
)
from mmdet3d_quant.calibration.resume import Progress, ResumeError
from mmdet3d_quant.calibration.stability import Look, Stability
from mmdet3d_quant.calibration.strata import Band, Strata, by_distance

__all__ = [
    'Band',
    'CalibratedRange',
    'Calibration',
    'CalibrationError',
    'Calibrator',
    'Choice',
    'Correction',
    'Health',
    'Look',
    'Plan',
    'Progress',
    'ResumeError',
    'Stability',
    'Statistics',
    'Strata',
    'by_distance',
    'calibrate',
]
