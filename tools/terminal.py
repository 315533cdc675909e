"""Console output of the tools: one console, errors in one line, libraries' warnings only."""

from __future__ import annotations

import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator, NoReturn

from mmengine.logging import MMLogger
from rich.console import Console
from rich.progress import Progress, ProgressColumn

from mmdet3d_quant.core.errors import QuantError
from mmdet3d_quant.files.once import once
from mmdet3d_quant.runs.listener import Listener

#: Columns where the output is not a terminal (a log, a pipe): tables stay whole.
LOG_WIDTH = 120


def open_console() -> Console:
    """Console for a tool's output; silences the libraries' notes and deprecations."""
    MMLogger.get_instance('mmdet3d_quant', log_level='WARNING')
    warnings.filterwarnings('ignore', category=DeprecationWarning)
    warnings.filterwarnings('ignore', category=UserWarning, module='torch|mmengine|mmcv|mmdet')
    console = Console()
    return console if console.is_terminal else Console(width=LOG_WIDTH)


class ConsoleListener(Listener):
    """Shows the progress of a job on a console, counted work as a bar.

    Args:
        console: Console to print on.
        columns: Of the bar; default: rich's.
        transient: Whether the bar goes away when the work is done.
    """

    def __init__(self, console: Console, *columns: ProgressColumn, transient: bool = False) -> None:
        self.console, self.columns, self.transient = console, columns, transient

    def note(self, text: str) -> None:
        self.console.print(text)

    def warn(self, text: str) -> None:
        self.console.print(f'[yellow]warning:[/yellow] {text}')

    @contextmanager
    def counting(self, title: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
        with Progress(*self.columns, console=self.console, transient=self.transient) as bar:
            task = bar.add_task(title, total=total, completed=done)
            yield lambda done: bar.update(task, completed=done)


class Steps:
    """Announces the steps of a long run and times them; says which are not done twice.

    Args:
        console: Where to tell.
        total: Number of steps.

    Attributes:
        seconds: By title, of every step that reused nothing.
    """

    def __init__(self, console: Console, total: int) -> None:
        self.console = console
        self.total = total
        self.seconds: dict[str, float] = {}
        self._number = 0
        self._reused = False

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Rules off a step and says how long it took."""
        self._number += 1
        self._reused = False
        self.console.rule(f'{self._number}/{self.total} {title}')
        start = time.perf_counter()
        yield
        took = time.perf_counter() - start
        if not self._reused:
            self.seconds[title] = took
        self.console.print(f'[dim]{took:.0f} s[/dim]')

    def once(self, path: Path, key: dict[str, Any], make: Callable[[], Any]) -> None:
        """Makes a file or folder where it is needed, see ``files.once``."""
        if not once(path, key, make):
            self.console.print(f'Reusing {path}')
            self._reused = True


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
