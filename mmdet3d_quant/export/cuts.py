"""The sub-networks that a deployed detector is made of: named tensors in, named tensors out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.errors import QuantError
from mmdet3d_quant.core.modes import evaluating, set_mode
from mmdet3d_quant.export.boxes import MMDET3D, BoxCoding
from mmdet3d_quant.export.inputs import random_input
from mmdet3d_quant.export.targets import DEFAULT, target_of


@dataclass(frozen=True)
class Cut:
    """A part of a detector that becomes one ONNX file.

    Attributes:
        name: Stem of the file.
        module: The part, as a module over named tensors.
        inputs: Example inputs, by name.
        output_names: Names of the outputs.
        boxes: How the outputs code boxes; None if they are none.
        io: Type and layout of the inputs and outputs of TensorRT's engine.
        varying: Axes of inputs whose size a frame decides, with names, by input.
        plugins: Whether the file has operators that ONNX lacks, by design.
    """

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    output_names: tuple[str, ...]
    boxes: BoxCoding | None = None
    io: str = 'fp16:chw'
    varying: dict[str, dict[int, str]] | None = None
    plugins: bool = False


# Children of a cut are called as in the detector: `core.ties.LINKS` finds them by name.


class CameraBackbone(nn.Module):
    """Images to context features and depth weights, per camera.

    ``forward(img, depth)`` (or ``forward(img)`` for a transform without LiDAR depth): ``img`` is
    float32 (B, N, 3, H, W), normalised; ``depth`` is (B, N, 1, H, W) in metres, 0 where unknown.
    Returns ``camera_feature`` (B * N, fH, fW, C) and ``camera_depth_weights`` (B * N, D, fH, fW).
    """

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.img_backbone = detector.img_backbone
        self.img_neck = detector.img_neck
        self.view_transform = detector.view_transform

    def forward(self, img: Tensor, *depth: Tensor) -> tuple[Tensor, Tensor]:
        x = self.img_neck(self.img_backbone(img.flatten(0, 1)))
        x = x if isinstance(x, Tensor) else x[0]
        x = x.unflatten(0, (img.shape[0], img.shape[1]))
        context, weights = self.view_transform.lift(x, *depth)
        return context.permute(0, 2, 3, 1), weights


class Fuser(nn.Module):
    """The BEV maps of all sensors to the map that the head reads.

    ``forward(camera, lidar)``: ``camera`` is (B, Cc, X, Y), ``lidar`` (B, Cl, X, Y); returns
    ``middle`` (B, C, X, Y). A detector with one sensor has nothing to fuse, and only its map.

    A map whose maker declares it ``rectified`` passes one more ReLU, which changes nothing: it
    lets an engine see in this file alone that it may round the map to unsigned integers.

    Attributes:
        sensors: Names of the maps, in order.
        rectified: Whether each map is never negative, as its maker declares.
    """

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.sensors = fused_sensors(detector)
        makers = dict(camera='view_transform', lidar='pts_middle_encoder')
        self.rectified = tuple(
            getattr(getattr(detector, makers[sensor], None), 'rectified', False)
            for sensor in self.sensors
        )
        self.fusion_layer = getattr(detector, 'fusion_layer', None)
        self.pts_backbone = detector.pts_backbone
        self.pts_neck = getattr(detector, 'pts_neck', None)

    def forward(self, *maps: Tensor) -> Tensor:
        maps = tuple(m.relu() if known else m for m, known in strict_zip(maps, self.rectified))
        x = maps[0] if self.fusion_layer is None else self.fusion_layer(list(maps))
        x = self.pts_backbone(x)
        x = x if self.pts_neck is None else self.pts_neck(x)
        return x if isinstance(x, Tensor) else x[0]


def fused_sensors(detector: nn.Module) -> tuple[str, ...]:
    """Of ``camera`` and ``lidar`` those whose maps the detector has."""
    if getattr(detector, 'fusion_layer', None) is not None:
        return 'camera', 'lidar'
    return ('camera',) if getattr(detector, 'view_transform', None) is not None else ('lidar',)


class Head(nn.Module):
    """The map to boxes in cells, by query.

    ``forward(middle)``: ``middle`` is (B, C, X, Y); returns the outputs of a coding of boxes in
    its order.

    Attributes:
        output_names: Their names.
    """

    def __init__(self, detector: nn.Module, coding: BoxCoding = MMDET3D):
        super().__init__()
        self.bbox_head = detector.bbox_head
        has_velocity = hasattr(self.bbox_head.prediction_heads[0], 'vel')
        self.coding = coding
        self.output_names = coding.names(has_velocity)

    def forward(self, middle: Tensor) -> tuple[Tensor, ...]:
        predicted = self.bbox_head.scored(self.bbox_head.forward_single(middle)[0])
        outputs = self.coding.encode(predicted)
        return tuple(outputs[name] for name in self.output_names)


def bevfusion_cuts(
    detector: nn.Module, inputs: dict[str, Tensor], target: str = DEFAULT
) -> list[Cut]:
    """Cuts a detector into the parts that a CUDA-BEVFusion style runtime has engines for.

    * ``camera.backbone``: ``img``, ``depth`` -> ``camera_feature``, ``camera_depth_weights``
    * ``camera.vtransform``: ``feat_in`` -> ``feat_out``, the BEV map after pooling
    * ``fuser``: ``camera``, ``lidar`` -> ``middle``, with the BEV backbone and neck; with one
      sensor, its map alone
    * ``head.bbox``: ``middle`` -> boxes as the target codes them (``export.boxes``); only of the
      TransFusionHead of this package

    BEV pooling is not among them, nor is the sparse encoder, whose file has a format of its own
    (``export.sparse``).

    Args:
        detector: A BEVFusion detector; a part that it does not have gives no cut.
        inputs: Example inputs by name, from :func:`capture_inputs` or :func:`generate_inputs`.
        target: Name of the engine that the files are for.

    Returns:
        The cuts, each with its share of ``inputs``.

    Raises:
        QuantError: If the view transform has no ``lift`` (it is not of this package).
    """
    cuts = []

    def add(name: str, module: nn.Module, wanted: tuple[str, ...], outputs: tuple[str, ...]):
        cuts.append(Cut(name, module, {n: inputs[n] for n in wanted if n in inputs}, outputs))

    view = getattr(detector, 'view_transform', None)
    if view is not None:
        if not hasattr(view, 'lift'):
            raise QuantError(
                f'view_transform is a {type(view).__module__}.{type(view).__name__}, which cannot '
                'be cut for export; use QuantDepthLSSTransform or QuantLSSTransform'
            )
        outputs = ('camera_feature', 'camera_depth_weights')
        add('camera.backbone', CameraBackbone(detector), ('img', 'depth'), outputs)
        if not isinstance(view.downsample, nn.Identity):
            add('camera.vtransform', view.downsample, ('feat_in',), ('feat_out',))
    if getattr(detector, 'pts_backbone', None) is not None:
        add('fuser', Fuser(detector), fused_sensors(detector), ('middle',))
    head = _exported_head(detector)
    if head is not None:
        module = Head(detector, target_of(target).boxes)
        add('head.bbox', module, ('middle',), module.output_names)
        cuts[-1] = replace(cuts[-1], boxes=module.coding)
    return cuts


def _exported_head(detector: nn.Module) -> nn.Module | None:
    """The head if it is one that gives a cut."""
    head = getattr(detector, 'bbox_head', None)
    return head if hasattr(head, 'scored') else None


@torch.no_grad()
def capture_inputs(detector: nn.Module, batch: Any) -> dict[str, Tensor]:
    """Runs the detector on a batch and keeps the inputs of the cuts and of the LiDAR encoder.

    Args:
        detector: A BEVFusion detector in eval mode.
        batch: One batch of its data loader, of one sample.

    Returns:
        Tensors by input name, on the detector's device; those of the LiDAR encoder are ``voxels``
        (N, C) and their ``coors`` (N, 4).

    Raises:
        ValueError: If the batch has more than one sample.
    """
    seen: dict[str, Any] = {}

    def keep(name: str):
        return lambda module, args: seen.setdefault(name, args)

    view = getattr(detector, 'view_transform', None)
    watched = {
        'img': getattr(detector, 'img_backbone', None),
        'depth': getattr(view, 'dtransform', None),
        'feat_in': getattr(view, 'downsample', None),
        'fused': getattr(detector, 'fusion_layer', None) or getattr(detector, 'pts_backbone', None),
        'middle': getattr(_exported_head(detector), 'shared_conv', None),
        'voxels': getattr(detector, 'pts_middle_encoder', None),
    }
    hooks = [m.register_forward_pre_hook(keep(n)) for n, m in watched.items() if m is not None]
    try:
        samples = len(detector.test_step(batch))
    finally:
        for hook in hooks:
            hook.remove()
    if samples != 1:
        raise ValueError(f'expected a batch of one sample, got {samples}: set batch_size=1')
    voxels = seen.get('voxels')
    seen = {name: args[0] for name, args in seen.items()}
    if voxels is not None:
        seen['coors'] = voxels[1]
    if 'fused' in seen:
        maps = seen.pop('fused')
        maps = [maps] if isinstance(maps, Tensor) else maps
        seen.update(strict_zip(fused_sensors(detector), maps))
    for name in ('img', 'depth'):  # (B * N, ...) with B = 1
        if name in seen:
            seen[name] = seen[name].unsqueeze(0)
    return seen


def generate_inputs(detector: nn.Module, num_cams: int = 6, seed: int = 0) -> dict[str, Tensor]:
    """Generates random inputs of the shapes that the detector expects, for lack of data.

    Args:
        detector: A BEVFusion detector.
        num_cams: Number of cameras.
        seed: Seed of the generator.

    Returns:
        Tensors by input name, of one sample, as :func:`random_input` draws them.
    """
    if num_cams < 1:
        raise ValueError(f'num_cams must be at least 1, got {num_cams}')
    rng = torch.Generator().manual_seed(seed)
    inputs: dict[str, Tensor] = {}

    def draw(name: str, *shape: int) -> None:
        inputs[name] = random_input(name, (1, *shape), rng)

    view = getattr(detector, 'view_transform', None)
    if view is not None:
        size = tuple(view.image_size)
        draw('img', num_cams, 3, *size)
        if hasattr(view, 'dtransform'):
            draw('depth', num_cams, 1, *size)
        x, y, z = (int(n) for n in view.nx)
        draw('feat_in', view.C * z, x, y)
        draw('camera', *_output_shape(view.downsample, inputs['feat_in'])[1:])
    encoder = getattr(detector, 'pts_middle_encoder', None)
    if encoder is not None:
        draw('lidar', *_lidar_shape(encoder)[1:])
    head = _exported_head(detector)
    if head is not None:
        cells = [n // head.test_cfg['out_size_factor'] for n in head.test_cfg['grid_size'][:2]]
        draw('middle', head.in_channels, *cells)
    return inputs


@torch.no_grad()
def _output_shape(module: nn.Module, x: Tensor) -> tuple[int, ...]:
    """Shape of a module's float output, by running it in eval mode on its device."""
    device = next((p.device for p in module.parameters()), x.device)
    with evaluating(module), set_mode(module, 'float'):
        return tuple(module(x.to(device)).shape)


@torch.no_grad()
def _lidar_shape(encoder: nn.Module) -> tuple[int, ...]:
    """Shape of a sparse encoder's map, from a cloud of one voxel in eval mode."""
    device = next(encoder.parameters()).device
    with evaluating(encoder), set_mode(encoder, 'float'):
        bev = encoder(
            torch.ones(1, encoder.in_channels, device=device),
            torch.zeros(1, 4, dtype=torch.int32, device=device),
            1,
        )
    return tuple((bev if isinstance(bev, Tensor) else bev[0]).shape)
