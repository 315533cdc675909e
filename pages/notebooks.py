"""Run the notebooks of docs/notebooks/ and write what their cells print into them.

``python -m pages.notebooks [NOTEBOOK ...]``, that is ``make notebooks``. Each runs in a process and
a new folder of its own, by IPython, without a kernel. The site shows them as pages.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / 'docs/notebooks'
NOTEBOOKS = sorted(FOLDER.glob('*.ipynb'))


class CellError(RuntimeError):
    """A cell of a notebook that failed."""


def source(cell: dict[str, Any]) -> str:
    """Returns the text of a cell, which a notebook may hold as a list of lines."""
    return ''.join(cell['source'])


def lines(text: str) -> list[str]:
    """Splits a text as notebooks store it: a list of lines with their ends."""
    return text.splitlines(keepends=True)


def execute(notebook: dict[str, Any]) -> dict[str, Any]:
    """Runs all cells of a notebook in the current folder, in one namespace.

    Args:
        notebook: As its file has it.

    Returns:
        The notebook with the outputs of this run.

    Raises:
        CellError: If a cell fails.
    """
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    from pages.transcripts import shown

    shell, count = InteractiveShell.instance(), 0
    hook: Any = shell.displayhook
    hook.write_output_prompt = lambda: None  # the page has no numbers of outputs
    cells = []
    for cell in notebook['cells']:
        if cell['cell_type'] == 'code':
            count += 1
            with capture_output() as got:
                done = shell.run_cell(source(cell))
            if not done.success:
                error = done.error_in_exec or done.error_before_exec
                raise CellError(f'{source(cell)}\n{got.stdout[-2000:]}{error!r}')
            printed = shown(got.stdout, Path.cwd()).strip('\n')
            outputs: list[dict[str, Any]] = []
            if printed:
                outputs.append(dict(output_type='stream', name='stdout', text=lines(printed)))
            outputs += [
                dict(output_type='display_data', metadata={}, data=_plain(rich.data))
                for rich in got.outputs
            ]
            cell = dict(cell, execution_count=count, outputs=outputs)
        cells.append(cell)
    return dict(notebook, cells=cells)


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    """What a cell shows, as JSON takes it."""
    kept = {k: v for k, v in data.items() if k in ('text/plain', 'image/png')}
    return {
        kind: base64.b64encode(value).decode() if isinstance(value, bytes) else lines(value)
        for kind, value in kept.items()
    }


def as_markdown(notebook: dict[str, Any], name: str) -> str:
    """Writes a notebook as a page.

    Args:
        notebook: As its file has it.
        name: Of the file.

    Returns:
        Markdown: text as it is, code and output as blocks, pictures in the page itself.
    """
    parts = []
    for cell in notebook['cells']:
        if cell['cell_type'] == 'markdown':
            parts.append(source(cell))
            continue
        parts.append(f'```python\n{source(cell)}\n```')
        for output in cell['outputs']:
            data = output.get('data', {})
            text = ''.join(output.get('text', data.get('text/plain', '')))
            if 'image/png' in data:
                parts.append(f'![output](data:image/png;base64,{"".join(data["image/png"])})')
            elif text:
                parts.append(f'```text\n{text}\n```')
    head, _, rest = '\n\n'.join(parts).partition('\n')
    was_run = any(cell.get('execution_count') for cell in notebook['cells'])
    told = 'run from top to bottom by a script' if was_run else 'without outputs (`make notebooks`)'
    note = f'A notebook, {told}: `docs/notebooks/{name}` of the checkout.'
    return f'{head}\n\n{note}\n{rest}\n'


def read(path: Path) -> dict[str, Any]:
    """Reads a notebook."""
    return json.loads(path.read_text())


def rerun(path: Path, folder: Path) -> None:
    """Runs a notebook in a process of its own, and writes its outputs into it.

    Args:
        path: The notebook.
        folder: Where it runs.

    Raises:
        CellError: If a cell fails.
    """
    search = [str(Path(sys.executable).parent), os.environ['PATH']]
    env = dict(os.environ, PATH=os.pathsep.join(search), PYTHONPATH=str(ROOT), COLUMNS='100')
    env.setdefault('OMP_NUM_THREADS', '1')
    command = [sys.executable, '-m', 'pages.notebooks', '--here', str(path.resolve())]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        raise CellError(f'{path.name}: {done.stderr[-4000:]}')
    run = json.loads(done.stdout)
    path.write_text(json.dumps(run, indent=1, ensure_ascii=False) + '\n')


def main(argv: list[str]) -> None:
    if argv[:1] == ['--here']:
        written = json.dumps(execute(read(Path(argv[1]))), ensure_ascii=False)
        print(written)
        return
    for path in map(Path, argv) if argv else NOTEBOOKS:
        print(path, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            try:
                rerun(path, Path(folder))
            except CellError as err:
                sys.exit(f'error: {re.sub(folder + "/", "", str(err))}')


if __name__ == '__main__':
    main(sys.argv[1:])
