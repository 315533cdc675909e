"""How the tools talk: one console, errors in one line, only warnings from libraries below."""

import sys
import warnings
from typing import Any, Callable, NoReturn

from mmengine.logging import MMLogger
from rich.console import Console

from mmdet3d_quant.core.errors import QuantError

#: Columns where the output is not a terminal (a log, a pipe): tables stay whole.
LOG_WIDTH = 120


def open_console() -> Console:
    """Console for a tool's output; silences the libraries' notes and deprecations."""
    MMLogger.get_instance('mmdet3d_quant', log_level='WARNING')
    warnings.filterwarnings('ignore', category=DeprecationWarning)
    warnings.filterwarnings('ignore', category=UserWarning, module='torch|mmengine|mmcv|mmdet')
    console = Console()
    return console if console.is_terminal else Console(width=LOG_WIDTH)


def run_tool(
    main: Callable[[], Any],
    failure: int = 1,
    interrupted: str = '',
    errors: tuple = (QuantError, OSError, ValueError),
) -> NoReturn:
    """Runs a tool; the errors of what it was given become one line, with the remedy in it.

    Args:
        main: The tool; an int that it returns is the exit code.
        failure: Exit code for such an error.
        interrupted: What Ctrl-C leaves behind, where a user would ask.
        errors: What becomes one line; of others the traceback is of use.
    """
    try:
        code = main()
    except errors as err:
        print(f'error: {err}', file=sys.stderr)
        sys.exit(failure)
    except KeyboardInterrupt:
        sys.exit(f'error: interrupted; {interrupted}' if interrupted else 'error: interrupted')
    sys.exit(code if isinstance(code, int) else 0)
