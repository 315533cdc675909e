"""How the tools talk: one console, and only warnings from the libraries below."""

import warnings

from mmengine.logging import MMLogger
from rich.console import Console

#: Columns where the output is not a terminal (a log, a pipe): tables stay whole.
LOG_WIDTH = 120


def open_console() -> Console:
    """Console for a tool's output; silences the libraries' notes and deprecations."""
    MMLogger.get_instance('mmdet3d_quant', log_level='WARNING')
    warnings.filterwarnings('ignore', category=DeprecationWarning)
    warnings.filterwarnings('ignore', category=UserWarning, module='torch|mmengine|mmcv|mmdet')
    console = Console()
    return console if console.is_terminal else Console(width=LOG_WIDTH)
