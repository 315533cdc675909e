"""A detector whose exported parts run in an engine, to score the files themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
from torch import Tensor, nn

from mmdet3d_quant.check.autoware import as_autoware, autoware_detector
from mmdet3d_quant.check.chains import chain_detector
from mmdet3d_quant.check.parts import EnginePart as EnginePart
from mmdet3d_quant.check.pooling import pool_in
from mmdet3d_quant.check.sparse import OpenVINONetwork
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.engines import Engine, ONNXRuntime, OpenVINO
from mmdet3d_quant.export.bev_pool import POOL
from mmdet3d_quant.export.boxes import BoxCoding
from mmdet3d_quant.export.families import detector_cuts, is_of_family
from mmdet3d_quant.export.half_ranges import round_ranges
from mmdet3d_quant.export.manifest import MANIFEST, read_manifest
from mmdet3d_quant.export.onnx import ExportError
from mmdet3d_quant.export.runtimes import DEFAULT_RUNTIME, runtime_of
from mmdet3d_quant.export.sparse.arithmetic import ARITHMETICS, computed_as
from mmdet3d_quant.export.sparse.read import read_program
from mmdet3d_quant.export.sparse.run import ScnEncoder, ScnNetwork
from mmdet3d_quant.export.sparse.trace import order_of
from mmdet3d_quant.export.suite import LIDAR
from mmdet3d_quant.export.targets import coding_in
from mmdet3d_quant.export.unsigned import make_unsigned, unsigned_names
from mmdet3d_quant.files.checkpoint import CheckpointError
from mmdet3d_quant.files.outputs import sha256
from mmdet3d_quant.files.typed import is_strong


def engine_detector(
    detector: nn.Module,
    folder: str | Path,
    engine: Callable[[Path], Engine] = OpenVINO,
    scn: bool = False,
) -> nn.Module:
    """Copies a detector with its exported parts run by an engine.

    Everything that is not exported stays in torch: preprocessing, voxels, sparse encoder, depth
    maps, BEV pooling, decoding of boxes. Of files for Autoware only voxels, the geometry of the
    cameras and the decoding do.

    Args:
        detector: The detector in eval mode; left unchanged.
        folder: Its files, from ``export_suite``.
        engine: Constructor of the engine, from a file.
        scn: Also take the LiDAR encoder's file, as libspconv would compute it; one for OpenVINO,
            and its BEV pooling, run in ONNX Runtime.

    Returns:
        A detector of the same type on the same device, with the same ``test_step``, for batches
        of any size.

    Raises:
        ExportError: If a file is missing, or nothing of the detector is exported.
        QuantError: If the view transform is not of this package.
    """
    runtime = runtime_in(folder)
    if runtime == 'autoware':
        return autoware_detector(detector, folder, engine)
    if is_of_family(detector):
        return chain_detector(detector, folder, engine)
    cuts = {cut.name: cut for cut in detector_cuts(detector, {})}
    names = list(cuts)
    if not names:
        raise ExportError(f'{type(detector).__name__} has no part that can be exported')
    parts = {}
    for name in names:
        path = Path(folder) / f'{name}.onnx'
        if not path.is_file():
            raise ExportError(f'{path} does not exist; make it with tools/export_onnx.py')
        parts[name] = EnginePart(engine(path), str(path))

    result: Any = copy.deepcopy(detector)
    if 'camera.backbone' in parts:
        if 'camera.vtransform' in parts:
            result.view_transform.downsample = _Downsample(parts['camera.vtransform'])
        result.view_transform = _View(result.view_transform, parts['camera.backbone'])
        result.img_backbone = nn.Identity()  # the view transform gets the images
        result.img_neck = None
    if 'fuser' in parts:
        result.fusion_layer = _Fuser(parts['fuser'], cuts['fuser'].module.sensors)
        result.pts_backbone = nn.Identity()
        result.pts_neck = nn.Identity()
    if 'head.bbox' in parts:
        file = onnx.load(str(Path(folder) / 'head.bbox.onnx'), load_external_data=False)
        result.bbox_head = _Head(result.bbox_head, parts['head.bbox'], coding_in(file))
    if scn and runtime == 'openvino':
        network = OpenVINONetwork(
            Path(folder) / f'{LIDAR}.onnx', order_of(detector.pts_middle_encoder)
        )
        result.pts_middle_encoder = ScnEncoder(network)
        pool = Path(folder) / f'{POOL}.onnx'
        if 'camera.backbone' in parts and pool.is_file():
            pool_in(result.view_transform.view, ONNXRuntime(pool))
    elif scn:
        files = sorted(Path(folder).glob('lidar.backbone.*.onnx'))
        if len(files) != 1:
            raise ExportError(
                f'{folder} has {len(files)} files lidar.backbone.*.onnx, wanted is one; make it '
                'with tools/export_onnx.py --target tensorrt'
            )
        result.pts_middle_encoder = ScnEncoder(ScnNetwork(read_program(files[0])))
    return result


def runtime_in(folder: str | Path) -> str:
    """Reads what the files of a folder are for; of one without a manifest, the usual."""
    if not (Path(folder) / MANIFEST).is_file():
        return DEFAULT_RUNTIME
    return read_manifest(folder).get('runtime', DEFAULT_RUNTIME)


def as_exported(detector: nn.Module, folder: str | Path, scn: bool = False) -> nn.Module:
    """Copies a detector that computes what its files do, in torch.

    It has their grids (unsigned ones, and scales that FP16 has), and for Autoware its arithmetic of
    sparse layers.

    Args:
        detector: The detector; left unchanged.
        folder: Its files, from ``export_suite``.
        scn: Also keep float in the LiDAR encoder what the runtime does not compute in INT8.

    Returns:
        The copy, or the detector itself if it has the grids of its files.
    """
    runtime = runtime_in(folder)
    if runtime == 'autoware':
        return as_autoware(detector, folder)
    if scn:
        arithmetic = ARITHMETICS[runtime_of(runtime).arithmetic]
        detector = copy.deepcopy(detector)
        encoder: Any = detector.pts_middle_encoder
        detector.pts_middle_encoder = computed_as(encoder, arithmetic)
    files = {
        cut.name: onnx.load(str(path), load_external_data=False)
        for cut in detector_cuts(detector, {})
        if (path := Path(folder) / f'{cut.name}.onnx').is_file()
    }
    unsigned = {name: unsigned_names(file) for name, file in files.items()}
    strong = {name for name, file in files.items() if is_strong(file)}
    if not strong and not any(unsigned.values()):
        return detector
    result = copy.deepcopy(detector)
    for cut in detector_cuts(result, {}):
        make_unsigned(cut.module, unsigned.get(cut.name, ()))
        if cut.name in strong:
            round_ranges(cut.module)
    return result


def manifest_problems(
    manifest: dict[str, Any], folder: str | Path, checkpoint: str | Path
) -> list[str]:
    """Checks that the files of a folder come from a checkpoint and were not changed since.

    Returns:
        List of str, one message per problem.

    Raises:
        CheckpointError: If the checkpoint does not exist.
    """
    if not Path(checkpoint).is_file():
        raise CheckpointError(f'checkpoint {checkpoint} does not exist')
    source = manifest.get('source_checkpoint') or {}
    problems = []
    if source.get('sha256') != sha256(checkpoint):
        problems.append(
            f'{folder} was exported from another checkpoint ({source.get("name", "unknown")}, '
            f'SHA-256 {str(source.get("sha256"))[:12]}) than {checkpoint}'
        )
    for name, entry in manifest['files'].items():
        path = Path(folder) / name
        if not path.is_file():
            problems.append(f'{path}, named in the manifest, does not exist')
        elif entry.get('sha256') not in (None, sha256(path)):
            problems.append(f'{path} was changed after it was exported')
    return problems


class _View(nn.Module):
    """The view transform from images: ``camera.backbone`` lifts, geometry and pooling are torch."""

    def __init__(self, view: nn.Module, backbone: EnginePart) -> None:
        super().__init__()
        self.view = view
        self.backbone = backbone

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
    ) -> Tensor:
        """As the view transform's, with images (B, N, 3, H, W) instead of features."""
        inputs = dict(img=img)
        if hasattr(self.view, 'depth_map'):
            inputs['depth'] = self.view.depth_map(
                points, lidar2image, img_aug_matrix, lidar_aug_matrix, img.shape[1]
            )
        lifted = self.backbone(**inputs)
        context = lifted['camera_feature'].permute(0, 3, 1, 2)
        return self.view._project(
            (context, lifted['camera_depth_weights']),
            camera_intrinsics,
            camera2lidar,
            img_aug_matrix,
            lidar_aug_matrix,
        )


class _Downsample(nn.Module):
    """``camera.vtransform``."""

    def __init__(self, part: EnginePart) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(feat_in=x)['feat_out']


class _Fuser(nn.Module):
    """``fuser``: fusion layer, BEV backbone and neck in one."""

    def __init__(self, part: EnginePart, sensors: Sequence[str]) -> None:
        super().__init__()
        self.part = part
        self.sensors = sensors

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.part(**dict(strict_zip(self.sensors, features)))['middle']


class _Head(nn.Module):
    """``head.bbox``, and decoding in torch."""

    def __init__(self, head: nn.Module, part: EnginePart, coding: BoxCoding) -> None:
        super().__init__()
        self.head = head
        self.part = part
        self.coding = coding

    def predict(self, feats: Tensor | Sequence[Tensor], metas: list[dict]) -> Any:
        """As the head's."""
        middle = feats if isinstance(feats, Tensor) else feats[0]
        return self.head.boxes(self.coding.decode(self.part(middle=middle)), metas)
