"""What a job tells its listener, with warnings that may be errors."""

from __future__ import annotations

from dataclasses import dataclass, field

from mmdet3d_quant.calibration import CalibrationError
from mmdet3d_quant.runs.listener import Listener


@dataclass(frozen=True)
class Told:
    """Passes on notes and warnings.

    Attributes:
        listener: Receives them.
        strict: A warning is an error.
        warnings: All warnings so far.
    """

    listener: Listener
    strict: bool
    warnings: list[str] = field(default_factory=list)

    def warn(self, text: str) -> None:
        """Warns.

        Raises:
            CalibrationError: If warnings are errors.
        """
        if self.strict:
            raise CalibrationError(f'{text} (--strict)')
        self.warnings.append(text)
        self.listener.warn(text)
