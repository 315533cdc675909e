"""Results of the tasks of a long job, written line by line as they come, so that it can go on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmdet3d_quant.calibration import ResumeError
from mmdet3d_quant.files.outputs import whole


class Ledger:
    """Results by task in a file of JSON lines, the first of which says what job it is of.

    Args:
        path: The file; gone once :meth:`clear` is called.
        key: All that decides the results, as plain values.
        resume: Whether results of an earlier run may be there.

    Raises:
        ResumeError: If there are some and ``resume`` is off, or they are of another job.
    """

    def __init__(self, path: str | Path, key: Mapping[str, Any], resume: bool = False) -> None:
        self.path = Path(path)
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        if lines and not resume:
            raise ResumeError(
                f'{self.path} holds results of an unfinished run: go on with --resume, or delete '
                'the file to start again'
            )
        read = [_read(line) for line in lines]
        if read and read[0] is not None:
            other = [n for n in key if read[0].get(n) != json.loads(json.dumps(key[n]))]
            if other:
                raise ResumeError(
                    f'{self.path} is of another run: its {", ".join(other)} differ(s); delete the '
                    'file to start again'
                )
        entries = [entry for entry in read[1:] if entry is not None]  # the last may be cut off
        self._results: dict[str, Any] = {entry['task']: entry['result'] for entry in entries}
        with whole(self.path) as part:  # a run that is stopped here keeps the results there are
            part.write_text(''.join(json.dumps(line) + '\n' for line in (dict(key), *entries)))

    def __contains__(self, task: Mapping[str, Any]) -> bool:
        return _name(task) in self._results

    def __getitem__(self, task: Mapping[str, Any]) -> Any:
        return self._results[_name(task)]

    def __len__(self) -> int:
        return len(self._results)

    def add(self, task: Mapping[str, Any], result: Any) -> None:
        """Writes a result."""
        entry = dict(task=_name(task), result=result)
        with self.path.open('a') as file:
            file.write(json.dumps(entry) + '\n')
        self._results[entry['task']] = json.loads(json.dumps(result))

    def clear(self) -> None:
        """Removes the file, once the output is written."""
        self.path.unlink()


def _name(task: Mapping[str, Any]) -> str:
    return json.dumps(dict(task), sort_keys=True)


def _read(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
