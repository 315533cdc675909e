"""Example inputs of the cuts of any detector: seen on a batch, or generated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmdet3d_quant.core.copies import tensors
from mmdet3d_quant.core.errors import QuantError
from mmdet3d_quant.core.macs import weighted
from mmdet3d_quant.core.modes import set_mode
from mmdet3d_quant.export import cuts
from mmdet3d_quant.export.autoware.camera import camera_inputs
from mmdet3d_quant.export.families import Chain, chains_of, is_of_family
from mmdet3d_quant.export.inputs import random_input
from mmdet3d_quant.export.runtimes import DEFAULT_RUNTIME

#: What adds inputs of cameras for a runtime that has files of its own for them.
CAPTURES = {'autoware': camera_inputs}
#: Names under which detectors have what makes the bird's-eye view map of points.
ENCODERS = ('pts_middle_encoder', 'middle_encoder')


@torch.no_grad()
def capture_inputs(
    detector: nn.Module, batch: Any, runtime: str = DEFAULT_RUNTIME
) -> dict[str, Tensor]:
    """Runs the detector on a batch and keeps the inputs of the cuts.

    Args:
        detector: A detector in eval mode.
        batch: One batch of its data loader, of one sample.
        runtime: Name of what runs the files; one with files of its own adds their inputs.

    Returns:
        Tensors by input name, on the detector's device.

    Raises:
        ValueError: If the batch has more than one sample.
    """
    if not is_of_family(detector):
        seen = cuts.capture_inputs(detector, batch)
        if runtime in CAPTURES and getattr(detector, 'view_transform', None) is not None:
            seen.update(CAPTURES[runtime](detector, batch))
        return seen
    seen = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple) -> None:
            seen.setdefault(name, next(tensors(args)).clone())

        return hook

    chains = chains_of(detector)
    hooks = [
        getattr(detector, c.parts[0]).register_forward_pre_hook(keep(c.source)) for c in chains
    ]
    try:
        samples = len(detector.test_step(batch))  # type: ignore[operator]
    finally:
        for hook in hooks:
            hook.remove()
    if samples != 1:
        raise ValueError(f'expected a batch of one sample, got {samples}: set batch_size=1')
    return seen


def generate_inputs(
    detector: nn.Module,
    num_cams: int = 6,
    seed: int = 0,
    image_size: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """Generates random inputs of the shapes that the detector expects, for lack of data.

    Args:
        detector: A detector.
        num_cams: Number of cameras of a detector that takes several.
        seed: Seed of the generator.
        image_size: Height and width of the images after preprocessing, of detectors that do not
            say themselves.

    Returns:
        Tensors by input name, of one sample, as :func:`random_input` draws them.

    Raises:
        QuantError: If the size of the images, or the shape of a map, is not known.
    """
    if not is_of_family(detector):
        return cuts.generate_inputs(detector, num_cams, seed)
    rng = torch.Generator().manual_seed(seed)
    shapes = {c.source: _shape(detector, c, num_cams, image_size) for c in chains_of(detector)}
    return {name: random_input(name, shape, rng) for name, shape in shapes.items()}


def _shape(
    detector: Any, chain: Chain, num_cams: int, image_size: Sequence[int] | None
) -> tuple[int, ...]:
    """Shape of the input of a chain."""
    if chain.source == 'volume':
        return (1, detector.neck.out_channels, *detector.n_voxels)
    if chain.source != 'bev':
        if image_size is None:
            raise QuantError(
                f'the size of the images of {type(detector).__name__} is not known: give '
                'image_size=(height, width), --image-size'
            )
        several = chain.source == 'img' and not hasattr(detector, 'pts_backbone')
        cameras = num_cams if several and not hasattr(detector, 'backbone') else 1
        return (cameras, 3, *image_size)
    return map_shape(detector)


@torch.no_grad()
def map_shape(detector: nn.Module) -> tuple[int, ...]:
    """Shape of the bird's-eye view map that a detector makes of points, from one voxel.

    Raises:
        QuantError: If its encoder does not make a map of features by voxel.
    """
    encoder: Any = next((getattr(detector, n) for n in ENCODERS if hasattr(detector, n)), None)
    channels = getattr(encoder, 'in_channels', None)
    if channels is None:
        raise QuantError(
            f'{type(detector).__name__} has a {type(encoder).__name__}, whose map has no known '
            'shape: give example inputs of real data, --inputs data'
        )
    device = next((p.device for p in encoder.parameters()), torch.device('cpu'))
    voxels = torch.ones(1, channels, device=device)
    with set_mode(encoder, 'float'):
        bev = encoder(voxels, torch.zeros(1, 4, dtype=torch.int32, device=device), 1)
    return tuple(next(tensors(bev)).shape)


def sparse_encoder(detector: nn.Module) -> nn.Module | None:
    """Finds the encoder of sparse convolutions of a detector; None if it has none."""
    for name in ENCODERS:
        encoder = getattr(detector, name, None)
        if isinstance(encoder, nn.Module) and weighted(encoder):
            return encoder
    return None
