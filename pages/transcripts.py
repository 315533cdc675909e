"""Run the commands of a page of docs/, and write what they print below them.

``python -m pages.transcripts docs/tutorial.md`` runs every ``console`` block of the page, one after
the other, in one new folder, and puts the outputs in the places of those that are there. So what
the page shows is what the commands say. A command that fails stops it, unless the last line that
the page has for it is ``(exit code N)``.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r'^```console\n(.*?)^```$', re.M | re.S)
FAILED = re.compile(r'\(exit code (\d+)\)\n?\Z')
#: Control sequences of a terminal.
CONTROL = re.compile(r'\x1b\[[0-9;?]*[A-Za-z]')
#: Bars of progress, warnings of libraries, and lines of mmengine's log, which begin with a date,
#: with the tables below them.
NOISE = re.compile(r'^.*(?:Warning: |warnings\.warn|━ *\d+/\d+ ).*\n', re.M)
STAMP = re.compile(r'^\d\d/\d\d \d\d:\d\d:\d\d - mmengine - .*\n(?:[+|].*\n)*', re.M)


@dataclass(frozen=True)
class Step:
    """A command of a page.

    Attributes:
        command: As the shell gets it, continued lines included.
        output: What the page has below it, each line with its end.
    """

    command: str
    output: str

    @property
    def code(self) -> int:
        """Exit code that the page tells; 0 if it tells none."""
        found = FAILED.search(self.output)
        return int(found[1]) if found else 0


def steps(block: str) -> Iterator[Step]:
    """Reads a block: commands after ``$``, each with the lines below it."""
    for part in re.split(r'^\$ ', block, flags=re.M)[1:]:
        lines = part.splitlines(keepends=True)
        end = next(n for n, line in enumerate(lines, 1) if not line.endswith('\\\n'))
        yield Step(''.join(lines[:end]).rstrip('\n'), ''.join(lines[end:]))


def page_steps(text: str) -> list[Step]:
    """Lists the commands of a page."""
    return [step for block in BLOCK.findall(text) for step in steps(block)]


def run(step: Step, folder: Path) -> str:
    """Runs a command.

    Args:
        step: The command.
        folder: Where it runs.

    Returns:
        What it printed, as the page shows it.

    Raises:
        ValueError: If its exit code is not the one that the page tells.
    """
    paths = [str(Path(sys.executable).parent), os.environ['PATH']]
    env = dict(os.environ, PATH=os.pathsep.join(paths), COLUMNS='100', NO_COLOR='1', TERM='dumb')
    done = subprocess.run(
        ['bash', '-o', 'pipefail', '-c', step.command],
        cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if done.returncode != step.code:
        raise ValueError(
            f'{step.command}: exit code {done.returncode}, the page has {step.code}\n'
            + done.stdout[-2000:]
        )
    text = shown(done.stdout, folder)
    return text + (f'(exit code {step.code})\n' if step.code else '')


def shown(output: str, folder: Path) -> str:
    """Takes from an output what is of the machine or of the moment: paths, dates, progress."""
    text = CONTROL.sub('', output).replace('\r\n', '\n')
    text = re.sub(r'^.*\r', '', text, flags=re.M)
    text = STAMP.sub('', NOISE.sub('', text))
    # The relative one first: it may end with the whole of the absolute one.
    for path in (os.path.relpath(ROOT, folder), folder, ROOT):
        text = text.replace(f'{path}/', '')
    lines = [line.rstrip() for line in text.splitlines()]
    return re.sub(r'\n{3,}', '\n\n', '\n'.join(lines).strip('\n') + '\n').lstrip('\n')


def rerun(text: str, folder: Path, save: Callable[[str], object] = lambda text: None) -> str:
    """Runs all commands of a page.

    Args:
        text: Markdown.
        folder: Where they run.
        save: Gets the page after each block, with the outputs so far.

    Returns:
        The page with their outputs.
    """
    done, end = '', 0
    for block in BLOCK.finditer(text):
        done += text[end : block.start()] + '```console\n'
        end = block.end()
        for step in steps(block[1]):
            print(f'$ {step.command}', flush=True)
            done += f'$ {step.command}\n{run(step, folder)}'
        done += '```'
        save(done + text[end:])
    return done + text[end:]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('pages', nargs='+', type=Path, metavar='PAGE')
    parser.add_argument('--folder', type=Path, help='to run in; default: a new one for each page')
    args = parser.parse_args(argv)
    for page in args.pages:
        with tempfile.TemporaryDirectory() as new:
            folder = (args.folder or Path(new)).resolve()
            folder.mkdir(parents=True, exist_ok=True)
            try:
                rerun(page.read_text(), folder, page.write_text)
            except ValueError as err:
                sys.exit(f'error: {page}: {err}')


if __name__ == '__main__':
    main()
