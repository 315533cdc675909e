"""The float BEVFusion for a pip-installed mmdet3d, under its public names.

Importing this package registers the family in mmdet3d's registries, so that configs and
checkpoints of the public BEVFusion project of mmdet3d work without its compiled extensions.
Where one of the names is already taken, as after importing that project, it registers nothing:
a family is never mixed from two sources. (Import the public project first if you need both.)
"""

from mmdet3d.registry import MODELS, TASK_UTILS, TRANSFORMS
from mmengine.logging import print_log

from mmdet3d_quant.bevfusion.assigner import (
    BBoxBEVL1Cost,
    HeuristicAssigner3D,
    HungarianAssigner3D,
    IoU3DCost,
)
from mmdet3d_quant.bevfusion.augment import (
    BEVFusionGlobalRotScaleTrans,
    BEVFusionRandomFlip3D,
    GridMask,
)
from mmdet3d_quant.bevfusion.box_coder import TransFusionBBoxCoder
from mmdet3d_quant.bevfusion.depth import DepthSupervisedLSSTransform
from mmdet3d_quant.bevfusion.detector import BEVFusion
from mmdet3d_quant.bevfusion.head import TransFusionHead
from mmdet3d_quant.bevfusion.labelling import LabelPoints
from mmdet3d_quant.bevfusion.loading import BEVLoadMultiViewImageFromFiles
from mmdet3d_quant.bevfusion.transformer import TransformerDecoderLayer
from mmdet3d_quant.bevfusion.transforms import ImageAug3D
from mmdet3d_quant.parents import (
    BEVFusionSparseEncoder,
    ConvFuser,
    DepthLSSTransform,
    GeneralizedLSSFPN,
    LSSTransform,
)

#: Registry and the types that go into it.
FAMILY = (
    (
        MODELS,
        (
            BEVFusion,
            BEVFusionSparseEncoder,
            ConvFuser,
            DepthLSSTransform,
            DepthSupervisedLSSTransform,
            GeneralizedLSSFPN,
            LSSTransform,
            TransFusionHead,
            TransformerDecoderLayer,
        ),
    ),
    (
        TASK_UTILS,
        (
            BBoxBEVL1Cost,
            HeuristicAssigner3D,
            HungarianAssigner3D,
            IoU3DCost,
            TransFusionBBoxCoder,
        ),
    ),
    (
        TRANSFORMS,
        (
            BEVFusionGlobalRotScaleTrans,
            BEVFusionRandomFlip3D,
            BEVLoadMultiViewImageFromFiles,
            GridMask,
            ImageAug3D,
            LabelPoints,
        ),
    ),
)

__all__ = ['FAMILY', *(cls.__name__ for _, types in FAMILY for cls in types)]


def _register() -> None:
    entries = [(registry, cls) for registry, types in FAMILY for cls in types]
    taken = [cls.__name__ for registry, cls in entries if cls.__name__ in registry.module_dict]
    if taken:
        print_log(
            f'mmdet3d_quant.bevfusion registers nothing: {", ".join(taken)} already registered '
            f'(by {MODELS.module_dict.get("BEVFusion", "another package")})',
            logger='current',
        )
        return
    for registry, cls in entries:
        registry.register_module(module=cls)


_register()
