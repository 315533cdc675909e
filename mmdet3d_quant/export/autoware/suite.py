"""The files of a BEVFusion for Autoware: cuts of its dense parts, and what is put in front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
from torch import Tensor, nn

from mmdet3d_quant.export.autoware.camera import ImageBackbone, MainBody
from mmdet3d_quant.export.autoware.join import join, with_ports
from mmdet3d_quant.export.autoware.modules import Body, FromVoxels, require_head
from mmdet3d_quant.export.autoware.pillars import finish_pillars, is_centerpoint, pillar_cuts
from mmdet3d_quant.export.autoware.sparse import SparseNodes
from mmdet3d_quant.export.autoware.voxels import FEATURES, PLACES, voxel_inputs, voxel_nodes
from mmdet3d_quant.export.boxes import BOXES_KEY, MMDET3D
from mmdet3d_quant.export.cuts import Cut
from mmdet3d_quant.export.pairs import ExportError
from mmdet3d_quant.export.runtimes import RuntimeFile, runtime_of
from mmdet3d_quant.export.sparse import trace
from mmdet3d_quant.export.sparse.arithmetic import AUTOWARE, with_int8

#: Key of the runtime's name in a file's ``metadata_props``.
RUNTIME_KEY = 'mmdet3d_quant.runtime'
RUNTIME = runtime_of('autoware')
LIDAR_BODY, MAIN_BODY, IMAGES = 'bevfusion_lidar', 'main_body', 'image_backbone'
_VOXELS = ('voxels', 'coors', 'num_points_per_voxel')
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
    if is_centerpoint(detector):
        return pillar_cuts(detector, inputs)
    if getattr(detector, 'pts_middle_encoder', None) is None:
        raise ExportError(
            f'{type(detector).__name__} has no pts_middle_encoder: autoware_bevfusion reads '
            'points. Take --runtime cuda-bevfusion'
        )
    require_head(detector)
    view = getattr(detector, 'view_transform', None)
    if view is None:
        mine = {'lidar': inputs['lidar']} if 'lidar' in inputs else {}
        return [Cut(LIDAR_BODY, Body(detector), mine, _OUTPUTS)]
    if not hasattr(view, 'lift'):
        raise ExportError(
            f'view_transform is a {type(view).__name__}, which cannot be cut: take '
            'QuantDepthLSSTransform or QuantLSSTransform'
        )
    if inputs and 'image_feats' not in inputs:
        raise ExportError(
            f'{MAIN_BODY} takes the geometry of real cameras, which cannot be generated: give '
            'data, --inputs data'
        )
    names = ('lidar', *(p.name for p in _ports(MAIN_BODY, view).inputs if p.name not in _VOXELS))
    body = Cut(
        MAIN_BODY,
        MainBody(detector),
        {n: inputs[n] for n in names if n in inputs},
        _OUTPUTS,
        varying={p.name: p.varying for p in RUNTIME.file(MAIN_BODY).inputs if p.name in names},
        plugins=True,
    )
    images = {'imgs': inputs['imgs']} if 'imgs' in inputs else {}
    backbone = Cut(IMAGES, ImageBackbone(detector), images, ('image_feats',))
    return [backbone, body]


def _ports(name: str, view: Any) -> RuntimeFile:
    """Looks up a file's tensors, without those of points for a view transform that reads none."""
    file = RUNTIME.file(name)
    if name != MAIN_BODY or hasattr(view, 'dtransform'):
        return file
    unread = ('points', 'lidar2image', 'img_aug_matrix')
    return replace(file, inputs=tuple(p for p in file.inputs if p.name not in unread))


def finish_autoware(
    detector: Any,
    folder: Path,
    quantized: bool,
    int8: tuple[str, ...] | None,
    cuts: Sequence[Cut],
    inputs: Mapping[str, Tensor],
) -> tuple[dict[str, dict[str, Any]], list[Cut]]:
    """Completes the files in a folder: puts voxels and the sparse encoder in front of the body.

    Args:
        detector: The detector that the dense parts were exported from.
        folder: Where these lie.
        quantized: Whether the files are.
        int8: Patterns of the sparse layers to compute in INT8; None: the third stage on.
        cuts: What was exported.
        inputs: Example inputs by name; without ``voxels`` the body's cut has none.

    Returns:
        More entries of the manifest, by name of the file; and the cuts as the files are now, that
        of the body with voxels and the sparse encoder in Autoware's arithmetic in front.

    Raises:
        ExportError: If the encoder has what Autoware's plugins do not have.
        ScnError: If they do not compute one of its layers; names it.
    """
    if is_centerpoint(detector):
        return finish_pillars(folder), list(cuts)
    view = getattr(detector, 'view_transform', None)
    path = folder / f'{LIDAR_BODY if view is None else MAIN_BODY}.onnx'
    if not path.is_file():
        return {}, list(cuts)
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
    ports, layer = _ports(path.stem, view), detector.pts_voxel_layer
    declared = {v.name: v for v in dense.graph.input}
    sizes = dict(
        POINTS=layer.max_num_points,
        FEATURES=program.channels,
        PROPOSALS=detector.bbox_head.num_proposals,
    )
    if 'image_feats' in declared:
        shape = declared['image_feats'].type.tensor_type.shape.dim
        names = ('CHANNELS', 'ROWS', 'COLUMNS')
        sizes.update(zip(names, (d.dim_value for d in shape[1:])))
    with_ports(model, ports.inputs, ports.outputs, sizes)
    props = {p.key: p.value for p in model.metadata_props}
    props.update({RUNTIME_KEY: RUNTIME.name, BOXES_KEY: MMDET3D.name})
    onnx.helper.set_model_props(model, props)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    bound = layer.max_voxels[1] if isinstance(layer.max_voxels, (tuple, list)) else layer.max_voxels
    entries = {
        path.name: dict(
            boxes=dict(coding=MMDET3D.name, text=MMDET3D.text),
            voxels=dict(max=min(bound, RUNTIME.max_voxels or bound), **RUNTIME.clouds),
            sparse=[
                dict(layer=op.layer, precision=op.precision, kernel=list(op.weight.shape))
                for op in program.convs
            ],
        )
    }

    def finished(cut: Cut) -> Cut:
        if cut.name != path.stem:
            return cut
        module = FromVoxels(cut.module, program, detector.pts_middle_encoder if quantized else None)
        given: dict[str, Tensor] = {}
        if 'voxels' in inputs:
            voxels = voxel_inputs(inputs, program.order, layer.max_num_points)
            rest = {name: tensor for name, tensor in cut.inputs.items() if name != 'lidar'}
            given = {**voxels, **rest}
        return replace(cut, module=module.eval(), inputs=given)

    return entries, [finished(cut) for cut in cuts]
