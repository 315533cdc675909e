"""Post-training calibration."""

from mmdet3d_quant.calibration.calibrator import (
    CalibratedRange,
    Calibration,
    CalibrationError,
    Calibrator,
    calibrate,
)
from mmdet3d_quant.calibration.health import Health
from mmdet3d_quant.calibration.observe import Statistics
from mmdet3d_quant.calibration.plan import Plan
from mmdet3d_quant.calibration.resume import Progress, ResumeError
from mmdet3d_quant.calibration.stability import Look, Stability
from mmdet3d_quant.calibration.strata import Band, Strata, by_distance

__all__ = [
    'Band',
    'CalibratedRange',
    'Calibration',
    'CalibrationError',
    'Calibrator',
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
