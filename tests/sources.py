"""A copy of the checkout to build packages in, without what grows beside the sources."""

import shutil
from pathlib import Path

from tests.small import ROOT

#: Folders of the root that are left out; everywhere, what starts with a dot and what Python makes.
LEFT = {'data', 'work_dirs', 'build', 'dist', 'site', 'tests'}
GROWN = shutil.ignore_patterns('.*', '__pycache__', '*.egg-info')


def copied_to(folder: Path) -> Path:
    """Copies the checkout to a folder that is not there yet."""

    def left_out(parent, names):
        return GROWN(parent, names) | (LEFT if Path(parent) == ROOT else set())

    return Path(shutil.copytree(ROOT, folder, ignore=left_out))
