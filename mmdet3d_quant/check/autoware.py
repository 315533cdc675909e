"""A BEVFusion whose layers all run from Autoware's files: voxels, images and matrices to boxes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdet3d_quant.check.sparse import int8_layers
from mmdet3d_quant.check.verify import nonfinite
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.engines import Arrays, Engine
from mmdet3d_quant.export.autoware.camera import image_norm, pooling_inputs
from mmdet3d_quant.export.autoware.modules import ROWS
from mmdet3d_quant.export.autoware.suite import IMAGES, LIDAR_BODY, MAIN_BODY
from mmdet3d_quant.export.manifest import read_manifest
from mmdet3d_quant.export.onnx import ExportError
from mmdet3d_quant.export.sparse import trace
from mmdet3d_quant.export.sparse.arithmetic import AUTOWARE, with_int8
from mmdet3d_quant.export.sparse.run import ScnEncoder, ScnNetwork


def autoware_detector(
    detector: nn.Module, folder: str | Path, engine: Callable[[Path], Engine]
) -> nn.Module:
    """Copies a BEVFusion with Autoware's files run by an engine.

    Voxels, the geometry of the cameras and decoding of boxes, which Autoware's node computes, are
    torch's; all else is the files'.

    Args:
        detector: The detector in eval mode; left unchanged.
        folder: Its files, from ``export_suite``.
        engine: Constructor of the engine, from a file; ONNX Runtime runs the plugin nodes.

    Returns:
        A detector of the same type.

    Raises:
        ExportError: If a file is missing, or the detector is none that has a body in one file.
    """
    result: Any = copy.deepcopy(detector)
    if not hasattr(getattr(result, 'bbox_head', None), 'boxes'):
        raise ExportError(
            f"Autoware's files of a {type(detector).__name__} are not scored, only a BEVFusion's: "
            'export with --runtime cuda-bevfusion to score'
        )
    view = getattr(result, 'view_transform', None)
    result.pts_backbone = _Body(*_opened(folder, LIDAR_BODY if view is None else MAIN_BODY, engine))
    if view is not None:
        result.view_transform = _Camera(result, *_opened(folder, IMAGES, engine))
        result.img_backbone = nn.Identity()  # the view transform gets the images
        result.img_neck = None
        result.fusion_layer = _Together()
    layer = result.pts_voxel_layer
    result.extract_pts_feat = lambda inputs: [_voxels(layer, p) for p in inputs['points']]
    result.pts_neck = nn.Identity()
    result.bbox_head = _Boxes(result.bbox_head)
    return result


def as_autoware(detector: nn.Module, folder: str | Path) -> nn.Module:
    """Copies a BEVFusion with its sparse encoder in Autoware's arithmetic, all of it in torch.

    Args:
        detector: The detector in eval mode; left unchanged.
        folder: Its files, whose manifest says which sparse layers are INT8.

    Returns:
        A detector of the same type: the model that the files are to be judged by.
    """
    manifest = read_manifest(folder)
    result: Any = copy.deepcopy(detector)
    program = trace(
        result.pts_middle_encoder,
        quantized=manifest.get('precision') != 'float',
        arithmetic=with_int8(AUTOWARE, int8_layers(manifest) or ()),
    )
    result.pts_middle_encoder = ScnEncoder(ScnNetwork(program, fp16_tensors=True))
    return result


def _opened(folder: str | Path, stem: str, engine: Callable[[Path], Engine]) -> tuple[Engine, str]:
    path = Path(folder) / f'{stem}.onnx'
    if not path.is_file():
        raise ExportError(f'{path} does not exist; make it with --runtime autoware')
    return engine(path), str(path)


def _voxels(layer: Any, points: Tensor) -> Arrays:
    """The points of a frame as the body takes them."""
    voxels, coors, counts = layer(points.float())
    arrays = dict(voxels=voxels, coors=coors.int(), num_points_per_voxel=counts.int())
    return {name: x.cpu().numpy() for name, x in arrays.items()}


class _Camera(nn.Module):
    """``image_backbone``, and what the body needs of the cameras, frame by frame."""

    def __init__(self, detector: Any, engine: Engine, name: str) -> None:
        super().__init__()
        self.view, self.engine, self.name = detector.view_transform, engine, name
        self.mean, self.std, self.flips = image_norm(detector)

    def forward(
        self,
        img: Tensor,
        points: Sequence[Tensor] | None,
        lidar2image: Tensor,
        camera_intrinsics: Tensor,
        camera2lidar: Tensor,
        img_aug_matrix: Tensor,
        lidar_aug_matrix: Tensor,
        metas: Any = None,
    ) -> list[Arrays]:
        """As the view transform's, with images (B, N, 3, H, W); returns inputs of the body."""
        pixels = (img.flip(2) if self.flips else img) * self.std + self.mean
        frames = []
        for i, image in enumerate(pixels.round().clamp(0, 255).byte()):
            (feats,) = _run(self.engine, self.name, {'imgs': image.numpy()}).values()
            mine = slice(i, i + 1)
            tensors = dict(
                pooling_inputs(
                    self.view, camera2lidar[mine], camera_intrinsics[mine], img_aug_matrix[mine]
                ),
                lidar2image=lidar2image[i],
                img_aug_matrix=img_aug_matrix[i],
            )
            if points is not None:
                tensors['points'] = points[i].float()
            frames.append({'image_feats': feats, **{n: t.numpy() for n, t in tensors.items()}})
        return frames


class _Together(nn.Module):
    """The inputs of both sensors, frame by frame."""

    def forward(self, sensors: Sequence[list[Arrays]]) -> list[Arrays]:
        return [{**camera, **lidar} for camera, lidar in strict_zip(*sensors)]


class _Body(nn.Module):
    """The body: from its inputs, frame by frame, to the head's outputs by name."""

    def __init__(self, engine: Engine, name: str) -> None:
        super().__init__()
        self.engine, self.name = engine, name

    def forward(self, frames: list[Arrays]) -> list[Arrays]:
        return [
            _run(self.engine, self.name, {n: frame[n] for n in self.engine.input_shapes})
            for frame in frames
        ]


class _Boxes(nn.Module):
    """Decoding of ``bbox_pred``, ``score`` and ``label_pred`` in torch."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.head = head

    def predict(self, frames: list[Arrays], metas: list[dict]) -> Any:
        """As the head's."""
        rows, score, labels = (
            torch.from_numpy(np.stack([np.asarray(f[name], dtype) for f in frames]))
            for name, dtype in (('bbox_pred', 'f4'), ('score', 'f4'), ('label_pred', 'i8'))
        )
        sizes = dict(center=2, height=1, dim=3, rot=2, vel=2)
        found = dict(strict_zip(ROWS, rows.split([sizes[name] for name in ROWS], dim=1)))
        one_hot = F.one_hot(labels, self.head.num_classes).transpose(1, 2)
        return self.head.boxes(dict(found, score=score[:, None] * one_hot), metas)


def _run(engine: Engine, name: str, inputs: Arrays) -> Arrays:
    found = engine(inputs)
    for output, array in found.items():
        odd = nonfinite(name, output, array)
        if odd:
            raise ExportError(odd)
    return found
