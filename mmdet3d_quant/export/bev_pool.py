"""Pooling of camera features to bird's-eye view as OpenVINO's plugin for Intel GPUs has it.

``BevPoolV2`` of the domain ``org.openvinotoolkit`` sums, cell by cell, features weighted by depth.
Which depth bins fall into a cell is an input: two lists that follow from the calibration of the
cameras and are made once, by :func:`intervals_of`.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Mapping, Sequence

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.export.cuts import Cut
from mmdet3d_quant.export.pairs import ExportError
from mmdet3d_quant.export.sparse.openvino import DOMAIN, as_model

Bounds = Mapping[str, Sequence[float]]
#: Stem of the file, and of that whose outputs it reads.
POOL, BACKBONE = 'camera.pool', 'camera.backbone'


def finish_openvino(
    detector: Any, folder: Path, quantized: bool, int8: Any, cuts: Sequence[Cut], inputs: Any
) -> tuple[dict[str, dict[str, Any]], list[Cut]]:
    """Writes :data:`POOL` beside :data:`BACKBONE`, or warns why there can be none.

    Returns:
        Entries of the manifest by name of the file, and the cuts.
    """
    lifting = [cut for cut in cuts if cut.name == BACKBONE]
    if not lifting:
        return {}, list(cuts)
    view = detector.view_transform
    try:
        model = as_bev_pool(view, bounds_of(view), lifting[0].inputs['img'].shape[1])
    except ExportError as err:
        warnings.warn(f'{POOL}.onnx is not written, the caller has to pool: {err}', stacklevel=2)
        return {f'{BACKBONE}.onnx': dict(no_pooling=str(err))}, list(cuts)
    onnx.save(model, str(folder / f'{POOL}.onnx'))
    return {f'{POOL}.onnx': {}}, list(cuts)


def bounds_of(view: Any) -> Bounds:
    """Reads first edge, last edge and step of a view transform by axis, metres."""
    edges = [
        (float(centre - step / 2), float(centre - step / 2 + step * cells), float(step))
        for centre, step, cells in strict_zip(view.bx, view.dx, view.nx)
    ]
    return dict(strict_zip('xyz', edges), d=tuple(view.dbound))


def as_bev_pool(view: Any, bounds: Bounds, cameras: int) -> onnx.ModelProto:
    """Makes the file that pools the features of a view transform.

    Args:
        view: A view transform of this package.
        bounds: First edge, last edge and step by axis, ``'x'``, ``'y'``, ``'z'`` and ``'d'``, as
            the config of the view transform has them.
        cameras: Number of cameras.

    Returns:
        The model: ``camera_feature`` (cameras, fH, fW, C), ``camera_depth_weights``
        (cameras, D, fH, fW), ``indices`` int32 (n,), ``intervals`` int32 (m, 3) to ``feat_in``
        (1, C, nx, ny).

    Raises:
        ExportError: If the map has several heights, or the plugin would count other depth bins.
    """
    nx, ny, nz = (int(n) for n in view.nx)
    rows, cols = (int(n) for n in view.feature_size)
    low, high, step = (np.float32(v) for v in bounds['d'])
    if nz != 1:
        raise ExportError(
            f'view_transform makes {nz} heights, and BevPoolV2 one: give it a zbound of one step'
        )
    if int((high - low) / step) != view.D:
        raise ExportError(
            f'view_transform has {view.D} depth bins, and BevPoolV2 counts '
            f'{int((high - low) / step)} in dbound {list(bounds["d"])}: end it on a multiple of '
            'its step'
        )
    shapes: list[tuple[str, int, list[Any]]] = [
        ('camera_feature', TensorProto.FLOAT, [cameras, rows, cols, view.C]),
        ('camera_depth_weights', TensorProto.FLOAT, [cameras, view.D, rows, cols]),
        ('indices', TensorProto.INT32, ['points']),
        ('intervals', TensorProto.INT32, ['intervals', 3]),
    ]
    limits: dict[str, Any] = {
        f'{axis}_bound_{end}': float(value)
        for axis, values in bounds.items()
        for end, value in strict_zip(('min', 'max', 'step'), values)
    }
    pooled = helper.make_node(
        'BevPoolV2',
        [name for name, _, _ in shapes],
        ['pooled'],
        'bev_pool',
        domain=DOMAIN,
        input_channels=view.C,
        output_channels=view.C,
        image_width=cols,
        image_height=rows,
        feature_width=ny,
        feature_height=nx,
        feat_layout='NHWC',
        **limits,
    )
    # The node makes a map per camera and fills the first.
    first = helper.make_node('Slice', ['pooled', 'begin', 'end', 'axis'], ['feat_in'], 'first')
    graph = helper.make_graph(
        [pooled, first],
        'bev_pool',
        [helper.make_tensor_value_info(*shape) for shape in shapes],
        [helper.make_tensor_value_info('feat_in', TensorProto.FLOAT, [1, view.C, nx, ny])],
        [
            numpy_helper.from_array(np.array([value]), name)
            for name, value in (('begin', 0), ('end', 1), ('axis', 0))
        ],
    )
    return as_model(graph, {})


def intervals_of(cells: Tensor, num_cells: int) -> tuple[Tensor, Tensor]:
    """Sorts depth bins by cell.

    Args:
        cells: Cell of each depth bin of each pixel, (N, D, fH, fW), int64; those outside of
            ``[0, num_cells)`` are left out.
        num_cells: Number of cells of the map.

    Returns:
        ``indices``, int32 (n,): places in the flat depth weights, by cell, in their own order; and
        ``intervals``, int32 (m, 3): begin and end among them, and cell.
    """
    flat = cells.flatten()
    points = ((flat >= 0) & (flat < num_cells)).nonzero().squeeze(1)
    by_cell, order = flat[points].sort(stable=True)
    found, counts = by_cell.unique_consecutive(return_counts=True)
    ends = counts.cumsum(0)
    intervals = torch.stack([ends - counts, ends, found], 1)
    return points[order].int(), intervals.int()
