"""Rules of sparse convolutions in numpy: which voxels meet under which weight, and their sums.

The definition is that of a dense convolution: output ``o`` sees input ``o * stride - padding +
k * dilation`` under weight ``k``. A submanifold convolution keeps the voxels and their order.
Any other makes every voxel that sees an input; here they come in ascending order of frame and
coordinates. (spconv's order on a GPU is that of a hash table, and differs from run to run.)
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

from mmdet3d_quant.engines.files import EngineError

Three = tuple  # of int; Python 3.8 cannot subscript it where it runs
#: Most numbers of a dense map.
MOST = 2**29


@dataclass(frozen=True)
class Geometry:
    """Where a sparse convolution looks.

    Attributes:
        shape: Cells of the grid by axis, in the order of the coordinates.
        kernel: Weights by axis.
        stride: As of a dense convolution; 1 for a submanifold one, whatever the file says.
        padding: As of a dense convolution; half the kernel for a submanifold one.
        dilation: As of a dense convolution.
        submanifold: Whether the outputs are the inputs' voxels.

    Raises:
        EngineError: If nothing is left of the grid, or a submanifold kernel has no middle.
    """

    shape: Three
    kernel: Three
    stride: Three
    padding: Three
    dilation: Three
    submanifold: bool

    def __post_init__(self) -> None:
        if self.submanifold:
            if any(k % 2 == 0 for k in self.kernel):
                raise EngineError(
                    f'a submanifold convolution needs odd kernels, this one is {self.kernel}'
                )
            centre = tuple(k // 2 * d for k, d in zip(self.kernel, self.dilation))
            object.__setattr__(self, 'padding', centre)
            object.__setattr__(self, 'stride', (1, 1, 1))
        if min(self.out_shape) < 1:
            raise EngineError(f'a grid of {self.shape} has no room for a kernel of {self.kernel}')

    @property
    def out_shape(self) -> Three:
        """Cells of the output's grid by axis."""
        axes = zip(self.shape, self.kernel, self.stride, self.padding, self.dilation)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)

    @property
    def offsets(self) -> np.ndarray:
        """Coordinates of the weights (K, 3), the last axis fastest, times dilation."""
        return np.array([*product(*map(range, self.kernel))]) * np.array(self.dilation)


def check_voxels(indices: np.ndarray, batch: int, shape: Three) -> None:
    """Checks the coordinates of voxels.

    Args:
        indices: (N, 4), frame and three axes.
        batch: Number of frames.
        shape: Cells of the grid by axis.

    Raises:
        EngineError: If one is outside of the grid, or two are the same.
    """
    if indices.ndim != 2 or indices.shape[1] != 4:
        raise EngineError(f'coordinates of shape {indices.shape}, wanted is (voxels, 4)')
    outside = ((indices < 0) | (indices >= [batch, *shape])).any(axis=1)
    if outside.any():
        raise EngineError(
            f'{outside.sum()} of {len(indices)} voxels lie outside of the grid, the first at '
            f'{indices[outside][0].tolist()}; there are {batch} frames of {tuple(shape)} cells: '
            'check the order of the coordinates and the range of the points'
        )
    if len(np.unique(_keys(indices, shape))) != len(indices):
        raise EngineError('two voxels have the same coordinates: voxelize without repetition')


def _keys(indices: np.ndarray, shape: Three) -> np.ndarray:
    """Numbers the cells of all frames, in ascending order of frame and coordinates."""
    keys = indices[:, 0]
    for axis, cells in enumerate(shape, 1):
        keys = keys * cells + indices[:, axis]
    return keys


def meetings(indices: np.ndarray, batch: int, geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """Finds which input voxel each output voxel sees under each weight.

    Args:
        indices: Voxels (N, 4), int64: frame and three axes.
        batch: Number of frames.
        geometry: Of the convolution.

    Returns:
        Output voxels (M, 4), int64, and the table (K, M), int64: row of the input, or -1.

    Raises:
        EngineError: If the voxels do not fit the grid.
    """
    check_voxels(indices, batch, geometry.shape)
    places, stride = indices[:, 1:] + np.array(geometry.padding), np.array(geometry.stride)
    out_shape, keys, seen = geometry.out_shape, [], []
    for offset in geometry.offsets:
        at, rest = np.divmod(places - offset, stride)
        fits = ((rest == 0) & (at >= 0) & (at < out_shape)).all(axis=1)
        seen.append(np.flatnonzero(fits))
        keys.append(_keys(np.column_stack([indices[fits, 0], at[fits]]), out_shape))
    if geometry.submanifold:
        wanted = _keys(indices, out_shape)
        order = np.argsort(wanted)
        known = wanted[order]
    else:
        known = np.unique(np.concatenate(keys))
        order = np.arange(len(known))
    table = np.full((len(keys), len(known)), -1, np.int64)
    for row, mine, inputs in zip(table, keys, seen):
        place = np.minimum(np.searchsorted(known, mine), max(len(known) - 1, 0))
        hit = known[place] == mine if len(known) else np.zeros(0, bool)
        row[order[place[hit]]] = inputs[hit]
    return (indices if geometry.submanifold else _places(known, out_shape)), table


def _places(keys: np.ndarray, shape: Three) -> np.ndarray:
    """The inverse of :func:`_keys`."""
    axes = []
    for cells in reversed(shape):
        keys, at = np.divmod(keys, cells)
        axes.append(at)
    return np.column_stack([keys, *reversed(axes)])


def convolve(features: np.ndarray, weights: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Sums the products of the voxels that meet, in float64: FP16 outputs are rounded once.

    Args:
        features: (N, inputs), float.
        weights: (K, inputs, outputs), float.
        table: (K, M), row of the input or -1.

    Returns:
        Sums (M, outputs), float32.

    Raises:
        EngineError: If the shapes do not fit, or a row is none of the features.
    """
    count, inputs = features.shape
    if weights.shape[:2] != (len(table), inputs):
        raise EngineError(
            f'weights for {weights.shape[0]} places and {weights.shape[1]} channels, rules for '
            f'{len(table)} places, features of {inputs} channels'
        )
    if table.size and not -1 <= table.min() <= table.max() < count:
        raise EngineError(f'the rules name voxel {table.max()}, there are {count}')
    result = np.zeros((table.shape[1], weights.shape[2]))
    features = features.astype(np.float64)
    for rows, weight in zip(table, weights.astype(np.float64)):
        hit = np.flatnonzero(rows >= 0)
        result[hit] += features[rows[hit]] @ weight
    return result.astype(np.float32)


def pool(rows: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Sums runs of rows.

    Args:
        rows: (N, channels), float.
        starts: First row of each run (M,).
        lengths: Rows of each run (M,); 0 is allowed.

    Returns:
        Sums (M, channels), float32.

    Raises:
        EngineError: If a run leaves the rows.
    """
    if len(starts) and not (
        starts.min() >= 0 and lengths.min() >= 0 and (starts + lengths).max() <= len(rows)
    ):
        raise EngineError(f'an interval leaves the {len(rows)} points')
    sums = np.zeros((len(starts), rows.shape[1]), np.float32)
    full = np.flatnonzero(lengths > 0)
    if len(full):
        ends = np.cumsum(lengths[full])
        first = ends - lengths[full]
        picked = np.repeat(starts[full] - first, lengths[full]) + np.arange(ends[-1])
        sums[full] = np.add.reduceat(rows[picked], first, axis=0)
    return sums


def check_size(*sizes: int) -> None:
    """Checks that a dense map of some sizes may be made, before memory is taken for it.

    Raises:
        EngineError: If it is too large.
    """
    count = 1
    for size in sizes:
        count *= int(size)
    if min(sizes) < 0 or count > MOST:
        raise EngineError(f'a map of {sizes} has more than {MOST:,} numbers')
