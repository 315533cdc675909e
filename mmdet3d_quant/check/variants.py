"""Finds the files and the inputs that a benchmark compares."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mmdet3d_quant.core.compat import removesuffix, strict_zip
from mmdet3d_quant.engines import Arrays, EngineError
from mmdet3d_quant.export.deploy import engine_files
from mmdet3d_quant.export.manifest import MANIFEST


def find_graphs(paths: list[Path]) -> dict[str, dict[str, Path]]:
    """Finds the variants of every graph.

    Args:
        paths: Files of one graph, or folders with files of the same names.

    Returns:
        File by the name of the variant, by the name of the graph.

    Raises:
        EngineError: If a path does not exist, files and folders are mixed, or no names are shared.
    """
    for path in paths:
        if not path.exists():
            raise EngineError(f'{path} does not exist')
    if len({path.is_dir() for path in paths}) > 1:
        raise EngineError('name files only, or folders only')
    names = _labels(paths)
    if not paths[0].is_dir():
        return {paths[0].name: dict(strict_zip(names, paths))}
    shared = set.intersection(*({file.name for file in _graph_files(path)} for path in paths))
    if not shared:
        raise EngineError(f'{", ".join(map(str, paths))} share no ONNX file of one name')
    return {
        name: {n: path / name for n, path in strict_zip(names, paths)} for name in sorted(shared)
    }


def _graph_files(folder: Path) -> list[Path]:
    """The files that engines run: of an exported set, all but the LiDAR encoder's."""
    if (folder / MANIFEST).is_file():
        return engine_files(folder)
    return list(folder.glob('*.onnx'))


def _labels(paths: list[Path]) -> list[str]:
    """Short names: the part of each path, from the end, that tells it from the others."""
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ['/'.join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return [removesuffix(name, '.onnx') for name in names]
    raise EngineError(f'{paths[0]} is named twice')


class StoredInputs:
    """Reads inputs from a ``.npz`` file: arrays by name, samples along a new first axis.

    Args:
        path: The file.

    Raises:
        EngineError: If it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with np.load(path) as stored:
                self.arrays = dict(stored)
        except Exception as err:  # numpy and zipfile have several
            raise EngineError(f'{path} cannot be read as .npz: {err}') from err

    def pick(self, shapes: dict[str, tuple]) -> Arrays:
        """Picks the arrays that a graph takes.

        Raises:
            EngineError: If one is missing.
        """
        missing = [name for name in shapes if name not in self.arrays]
        if missing:
            raise EngineError(f'{self.path} has no {missing[0]!r}, it has {", ".join(self.arrays)}')
        return {name: self.arrays[name] for name in shapes}
