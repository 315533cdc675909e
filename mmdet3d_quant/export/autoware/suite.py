"""The files of a BEVFusion for Autoware: cuts of its dense parts, and what is put in front."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from torch import Tensor, nn

from mmdet3d_quant.export.autoware.join import join, with_ports
from mmdet3d_quant.export.autoware.modules import Body, require_head
from mmdet3d_quant.export.autoware.sparse import SparseNodes
from mmdet3d_quant.export.autoware.voxels import FEATURES, PLACES, voxel_nodes
from mmdet3d_quant.export.boxes import BOXES_KEY, MMDET3D
from mmdet3d_quant.export.cuts import Cut
from mmdet3d_quant.export.pairs import ExportError
from mmdet3d_quant.export.runtimes import runtime_of

#: Key of the runtime's name in a file's ``metadata_props``.
RUNTIME_KEY = 'mmdet3d_quant.runtime'
RUNTIME = runtime_of('autoware')
LIDAR_BODY = 'bevfusion_lidar'
_OUTPUTS = ('bbox_pred', 'score', 'label_pred')


def autoware_cuts(detector: nn.Module, inputs: Mapping[str, Tensor], target: str) -> list[Cut]:
    """Cuts a detector into the dense parts of Autoware's files.

    Args:
        detector: A BEVFusion detector.
        inputs: Example inputs by name.
        target: Name of the engine that the files are for.

    Returns:
        The cuts, named as the files.

    Raises:
        ExportError: If Autoware has no place for the detector; names the part.
    """
    if getattr(detector, 'pts_middle_encoder', None) is None:
        raise ExportError(
            f'{type(detector).__name__} has no pts_middle_encoder: autoware_bevfusion reads '
            'points. Take --runtime cuda-bevfusion'
        )
    require_head(detector)
    mine = {'lidar': inputs['lidar']} if 'lidar' in inputs else {}
    return [Cut(LIDAR_BODY, Body(detector), mine, _OUTPUTS)]


def finish_autoware(
    detector: Any, folder: Path, quantized: bool, int8: tuple[str, ...] | None
) -> dict[str, dict[str, Any]]:
    """Completes the files in a folder: puts voxels and the sparse encoder in front of the body.

    Args:
        detector: The detector that the dense parts were exported from.
        folder: Where these lie.
        quantized: Whether the files are.
        int8: Patterns of the sparse layers to compute in INT8; None: the third stage on.

    Returns:
        More entries of the manifest, by name of the file.

    Raises:
        ExportError: If Autoware's plugins do not have what the encoder is made of.
    """
    from mmdet3d_quant.export.sparse import trace  # which needs spconv
    from mmdet3d_quant.export.sparse.arithmetic import AUTOWARE, with_int8

    path = folder / f'{LIDAR_BODY}.onnx'
    if not path.is_file():
        return {}
    arithmetic = AUTOWARE if int8 is None else with_int8(AUTOWARE, int8)
    program = trace(detector.pts_middle_encoder, quantized=quantized, arithmetic=arithmetic)
    dense = onnx.load(str(path))
    (fed,) = [v for v in dense.graph.input if v.name == 'lidar']
    sparse = SparseNodes(program, FEATURES, PLACES, fed.type.tensor_type.elem_type)
    nodes, stored = voxel_nodes(program.order)
    model = join(
        [*nodes, *sparse.nodes],
        [*stored, *sparse.stored],
        dense,
        {'lidar': sparse.output},
        RUNTIME,
    )
    ports, layer = RUNTIME.file(LIDAR_BODY), detector.pts_voxel_layer
    sizes = dict(
        POINTS=layer.max_num_points,
        FEATURES=program.channels,
        PROPOSALS=detector.bbox_head.num_proposals,
    )
    with_ports(model, ports.inputs, ports.outputs, sizes)
    props = {p.key: p.value for p in model.metadata_props}
    props.update({RUNTIME_KEY: RUNTIME.name, BOXES_KEY: MMDET3D.name})
    onnx.helper.set_model_props(model, props)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    bound = layer.max_voxels[1] if isinstance(layer.max_voxels, (tuple, list)) else layer.max_voxels
    return {
        path.name: dict(
            boxes=dict(coding=MMDET3D.name, text=MMDET3D.text),
            voxels=dict(max=min(bound, RUNTIME.max_voxels or bound), **RUNTIME.clouds),
            sparse=[
                dict(layer=op.layer, precision=op.precision, kernel=list(op.weight.shape))
                for op in program.convs
            ],
        )
    }
