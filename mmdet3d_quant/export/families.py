"""Which chains of modules of mmdet3d's detectors become files, as data: a row per family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.core.copies import tensors
from mmdet3d_quant.core.modes import evaluating, set_mode
from mmdet3d_quant.export.cuts import Cut, bevfusion_cuts
from mmdet3d_quant.export.targets import DEFAULT


@dataclass(frozen=True)
class Chain:
    """Children of a detector that are called one after the other, and become one file.

    Attributes:
        name: Stem of the file.
        source: Name of the input, which the first child reads.
        parts: Names of the children in order; a detector without the first has no such file, one
            without another goes on without. The last may be a head: see :data:`HEADS`.
        level: Number of the only output that is read; None: all are.
    """

    name: str
    source: str
    parts: tuple[str, ...]
    level: int | None = None


_LIDAR = Chain('lidar.detector', 'bev', ('backbone', 'neck', 'bbox_head'))
_PROPOSALS = Chain('lidar.detector', 'bev', ('backbone', 'neck', 'rpn_head'))
#: Chains by the name of the detector's class, or of one that it inherits from.
FAMILIES: dict[str, tuple[Chain, ...]] = {
    'VoxelNet': (_LIDAR,),
    'SASSD': (_LIDAR,),
    'PartA2': (_PROPOSALS,),
    'PointVoxelRCNN': (_PROPOSALS,),
    'MVXTwoStageDetector': (
        Chain('camera.backbone', 'img', ('img_backbone', 'img_neck')),
        Chain('lidar.detector', 'bev', ('pts_backbone', 'pts_neck', 'pts_bbox_head')),
    ),
    'SingleStageMono3DDetector': (
        Chain('camera.detector', 'input', ('backbone', 'neck', 'bbox_head')),
    ),
    'ImVoxelNet': (
        Chain('camera.backbone', 'img', ('backbone', 'neck'), level=0),
        Chain('volume.detector', 'volume', ('neck_3d', 'bbox_head')),
    ),
}
#: Outputs of heads by the name of their class, or of one that they inherit from: what ``forward``
#: returns in order, by level; ``{}`` stands for the level. Other heads stay out of the files.
HEADS: dict[str, tuple[str, ...]] = {
    'Anchor3DHead': ('cls_score{}', 'bbox_pred{}', 'dir_cls_pred{}'),
    'CenterHead': ('cls_score{}', 'bbox_pred{}', 'dir_cls_pred{}'),
    'PGDHead': (
        'cls_score{}',
        'bbox_pred{}',
        'dir_cls_pred{}',
        'depth_cls_pred{}',
        'weight{}',
        'attr_pred{}',
        'centerness{}',
    ),
    'FCOSMono3DHead': (
        'cls_score{}',
        'bbox_pred{}',
        'dir_cls_pred{}',
        'attr_pred{}',
        'centerness{}',
    ),
    'SMOKEMono3DHead': ('cls_score', 'bbox_pred'),
    'ImVoxelHead': ('centerness{}', 'bbox_pred{}', 'cls_score{}'),
}
#: Where a ``CenterHead`` has its predictions: by output, those of each task, in this order.
CENTER = {
    'cls_score{}': ('heatmap',),
    'bbox_pred{}': ('reg', 'height', 'dim', 'vel'),
    'dir_cls_pred{}': ('rot',),
}


def chains_of(detector: nn.Module) -> tuple[Chain, ...]:
    """Finds the chains of a detector that it has modules for.

    Returns:
        The chains; none for a detector of no family.
    """
    chains = _by_class(detector, FAMILIES) or ()
    return tuple(c for c in chains if isinstance(getattr(detector, c.parts[0], None), nn.Module))


def is_of_family(detector: nn.Module) -> bool:
    """Whether :data:`FAMILIES` has a row for a detector."""
    return _by_class(detector, FAMILIES) is not None


def head_outputs(head: nn.Module) -> tuple[str, ...] | None:
    """Names of a head's outputs, as in :data:`HEADS`; None if it stays out of the files."""
    return _by_class(head, HEADS)


def _by_class(module: nn.Module, table: Mapping[str, Any]) -> Any:
    """The entry of the nearest class in a table, None if none is there."""
    return next((table[c.__name__] for c in type(module).__mro__ if c.__name__ in table), None)


class ChainModule(nn.Module):
    """The modules of a chain, called as in the detector, with flat outputs.

    ``forward(x)``: ``x`` is a map (B, C, X, Y), a volume (B, C, X, Y, Z) or an image (B, 3, H, W);
    returns the outputs of the head level by level, or the features.
    """

    def __init__(self, detector: nn.Module, chain: Chain) -> None:
        super().__init__()
        self.level = chain.level
        self.names: list[str] = []
        for name in chain.parts:
            part = getattr(detector, name, None)
            if part is None or (name.endswith('head') and head_outputs(part) is None):
                continue
            self.add_module(name, part)
            self.names.append(name)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(value for _, value in self.named(x))

    def named(self, x: Tensor) -> list[tuple[str, Tensor]]:
        """Computes the outputs of the chain with their names, in the order of the file."""
        value: Any = x
        for name in self.names:
            value = self._modules[name](value)  # type: ignore[misc]
            if name.endswith('head'):
                return predictions(self._modules[name], value)
        found = list(tensors(value))
        found = found if self.level is None else [found[self.level]]
        return [(f'feature{i}', v) for i, v in enumerate(found)]

    @torch.no_grad()
    def output_names(self, x: Tensor) -> tuple[str, ...]:
        """Finds the names of the outputs by running the float modules once."""
        with evaluating(self), set_mode(self, 'float'):
            return tuple(name for name, _ in self.named(x))


def predictions(head: Any, outputs: Any) -> list[tuple[str, Tensor]]:
    """Names what a head of :data:`HEADS` returns.

    Args:
        head: The head.
        outputs: Of its ``forward``: by prediction a list by level; of a ``CenterHead`` by task a
            list by level of dicts.

    Returns:
        Names and tensors, level by level; without what the head does not predict.
    """
    names = head_outputs(head) or ()
    if names and isinstance(outputs[0][0], Mapping):
        outputs = _joined_tasks(outputs, names)
    levels = range(len(outputs[0]))
    found = []
    for i in levels:
        for name, values in strict_zip(names, outputs[: len(names)]):
            if values[i] is not None:
                found.append((name.format(i), values[i]))
    return found


def _joined_tasks(tasks: Sequence[Any], names: Sequence[str]) -> list[list[Tensor]]:
    """Joins the predictions of all tasks along the channels, by output and level."""
    return [
        [
            torch.cat([task[i][key] for task in tasks for key in CENTER[name] if key in task[i]], 1)
            for i in range(len(tasks[0]))
        ]
        for name in names
    ]


def detector_cuts(
    detector: nn.Module, inputs: dict[str, Tensor], target: str = DEFAULT
) -> list[Cut]:
    """Cuts any detector: by its row of :data:`FAMILIES`, else as a BEVFusion.

    Args:
        detector: A detector.
        inputs: Example inputs by name; a cut whose input is missing has no names of outputs.
        target: Name of the engine that the files are for.

    Returns:
        The cuts, each with its share of ``inputs``.

    Raises:
        QuantError: As :func:`mmdet3d_quant.export.cuts.bevfusion_cuts`.
    """
    if not is_of_family(detector):
        return bevfusion_cuts(detector, inputs, target)
    cuts = []
    for chain in chains_of(detector):
        module = ChainModule(detector, chain)
        mine = {n: x for n, x in inputs.items() if n == chain.source}
        names = module.output_names(mine[chain.source]) if mine else ()
        cuts.append(Cut(chain.name, module, mine, names, io='fp32:chw'))
    return cuts
