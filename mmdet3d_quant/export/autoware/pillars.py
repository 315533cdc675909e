"""CenterPoint with pillars as Autoware's files have it: its encoder, and what reads its map."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from mmdet3d_quant.export.autoware.join import with_ports
from mmdet3d_quant.export.boxes import CUDA_BEVFUSION
from mmdet3d_quant.export.cuts import Cut
from mmdet3d_quant.export.pairs import ExportError
from mmdet3d_quant.export.runtimes import runtime_of

RUNTIME = runtime_of('autoware')
ENCODER, HEAD = 'pts_voxel_encoder_centerpoint', 'pts_backbone_neck_head_centerpoint'
#: Outputs of the head in order; of a CenterHead by task, all but the first as the coding has them.
OUTPUTS = ('heatmap', 'reg', 'height', 'dim', 'rot', 'vel')
#: Pillars of the example that the encoder is traced on.
_PILLARS = 64


class PillarEncoder(nn.Module):
    """The layers of a PillarFeatureNet.

    ``forward(input_features)``: (V, points, features), decorated by the node; returns (V, 1, C).
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.pts_voxel_encoder = nn.Module()
        self.pts_voxel_encoder.pfn_layers = detector.pts_voxel_encoder.pfn_layers

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.pts_voxel_encoder.pfn_layers:
            x = layer(x, None)
        return x


class PillarHead(nn.Module):
    """Backbone, neck and head of one task.

    ``forward(spatial_features)``: (B, C, Y, X); returns :data:`OUTPUTS`, boxes coded as
    CUDA-BEVFusion's.
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.pts_backbone = detector.pts_backbone
        self.pts_neck = detector.pts_neck
        self.pts_bbox_head = detector.pts_bbox_head

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.pts_backbone(x)
        x = x if self.pts_neck is None else self.pts_neck(x)
        found = self.pts_bbox_head(x)[0][0]
        coded = CUDA_BEVFUSION.encode({**found, 'center': found['reg']})
        return (found['heatmap'], *(coded[name] for name in OUTPUTS[1:]))


def is_centerpoint(detector: nn.Module) -> bool:
    """Whether a detector has the head of CenterPoint, under mmdet3d's names."""
    head = getattr(detector, 'pts_bbox_head', None)
    return any(t.__name__ == 'CenterHead' for t in type(head).__mro__)


def pillar_cuts(detector: Any, inputs: Mapping[str, Tensor]) -> list[Cut]:
    """Cuts a CenterPoint as Autoware's lidar_centerpoint has it.

    Raises:
        ExportError: If it has voxels, several tasks or no velocity.
    """
    head, encoder = detector.pts_bbox_head, detector.pts_voxel_encoder
    kind = type(encoder).__name__
    if not hasattr(encoder, 'pfn_layers'):
        raise ExportError(
            f'pts_voxel_encoder is a {kind}: autoware_lidar_centerpoint has pillars only. Take '
            '--runtime cuda-bevfusion, or train with a PillarFeatureNet'
        )
    if len(head.task_heads) != 1:
        raise ExportError(
            f'pts_bbox_head has {len(head.task_heads)} tasks: autoware_lidar_centerpoint reads '
            'one. Train with tasks=[dict(num_class=..., class_names=[...])] of all classes'
        )
    missing = [n for n in OUTPUTS if n not in head.task_heads[0].heads]
    if missing:
        raise ExportError(
            f'pts_bbox_head does not predict {", ".join(missing)}, which '
            'autoware_lidar_centerpoint reads: train with common_heads=dict(vel=(2, 2), ...)'
        )
    linear = encoder.pfn_layers[0].linear
    points = getattr(getattr(detector, 'data_preprocessor', None), 'voxel_layer', None)
    sizes = (_PILLARS, getattr(points, 'max_num_points', 20), linear.in_features)
    example = torch.randn(sizes, generator=torch.Generator().manual_seed(0))
    maps = {'spatial_features': inputs['bev']} if 'bev' in inputs else {}
    return [
        Cut(
            ENCODER,
            PillarEncoder(detector),
            {'input_features': example.to(linear.weight.device)} if inputs else {},
            ('pillar_features',),
            varying={'input_features': {0: 'num_voxels'}},
        ),
        Cut(HEAD, PillarHead(detector), maps, OUTPUTS),
    ]


def finish_pillars(folder: Path) -> dict[str, dict[str, Any]]:
    """Declares the tensors of CenterPoint's files as Autoware has them; entries of the manifest."""
    entries: dict[str, dict[str, Any]] = {}
    for name in (ENCODER, HEAD):
        path = folder / f'{name}.onnx'
        if not path.is_file():
            continue
        model, file = onnx.load(str(path)), RUNTIME.file(name)
        sizes: dict[str, int] = {'batch_size': 1}
        for value in (*model.graph.input, *model.graph.output):
            port = next(p for p in (*file.inputs, *file.outputs) if p.name == value.name)
            for key, dim in zip(port.shape, value.type.tensor_type.shape.dim):
                if isinstance(key, str) and dim.dim_value and key.isupper():
                    sizes[key] = dim.dim_value
        with_ports(model, file.inputs, file.outputs, sizes)
        onnx.checker.check_model(model)
        onnx.save(model, str(path))
        entries[path.name] = {}
    if f'{HEAD}.onnx' in entries:
        coding = dict(coding=CUDA_BEVFUSION.name, text=CUDA_BEVFUSION.text)
        entries[f'{HEAD}.onnx'] = dict(boxes=coding, voxels=dict(RUNTIME.clouds))
    return entries
