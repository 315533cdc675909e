"""Runtimes that exported files are made for, as data: their files and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Tuple, Union

from mmdet3d_quant.export.targets import ALIASES, DEFAULT, TARGETS, target_of

#: Sizes of a tensor: numbers, and names of those that vary from frame to frame or by model.
Shape = Tuple[Union[int, str], ...]


@dataclass(frozen=True)
class Port:
    """An input or output of a file.

    Attributes:
        name: Its name.
        dtype: Its type, as NumPy calls it.
        shape: Its sizes. A name stands for one number throughout a runtime; in capitals the model
            says which, else the frame does, and the file leaves it open.
    """

    name: str
    dtype: str
    shape: Shape

    @property
    def varying(self) -> dict[int, str]:
        """Axes whose size the frame decides, with their names."""
        return {i: n for i, n in enumerate(self.shape) if isinstance(n, str) and n.islower()}


@dataclass(frozen=True)
class RuntimeFile:
    """A file that a runtime reads.

    Attributes:
        name: Stem of the file.
        role: What it computes, in words.
        inputs: In order.
        outputs: In order.
    """

    name: str
    role: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


@dataclass(frozen=True)
class Runtime:
    """What calls the engines of exported files, and what it expects of them.

    Attributes:
        name: Value of ``--runtime``.
        targets: Names of the engines that it goes with, as in ``export.targets``; the first unless
            another is asked for. None: all of them, the default one first.
        arithmetic: Name of how its sparse layers compute (``export.sparse.arithmetic``).
        files: Files with tensors of its own, by stem; those of others are the targets' cuts.
        domain: Of its operators that ONNX lacks; empty: none.
        version: Of the domain.
        max_voxels: Most voxels that a layer may have; None: the file says.
        clouds: What it does with a cloud of ``none``, ``one`` and ``more`` voxels than it takes.
    """

    name: str
    targets: tuple[str, ...] = ()
    arithmetic: str = 'libspconv'
    files: tuple[RuntimeFile, ...] = ()
    domain: str = ''
    version: int = 1
    max_voxels: int | None = None
    clouds: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def file(self, name: str) -> RuntimeFile:
        """Looks up a file by its stem."""
        return next(f for f in self.files if f.name == name)


_CUDA_BEVFUSION = Runtime(
    'cuda-bevfusion',
    clouds=MappingProxyType(
        dict(
            none='the map is zero: libspconv is not to be called',
            one='as any other',
            more='libspconv reserves memory for output_bound voxels by layer and cuts off the rest',
        )
    ),
)

_VOXELS = (
    Port('voxels', 'float32', ('voxels_num', 'POINTS', 'FEATURES')),
    Port('coors', 'int32', ('voxels_num', 3)),
    Port('num_points_per_voxel', 'int32', ('voxels_num',)),
)
_CAMERA = (
    Port('points', 'float32', ('num_points', 'FEATURES')),
    Port('lidar2image', 'float32', ('num_imgs', 4, 4)),
    Port('img_aug_matrix', 'float32', ('num_imgs', 4, 4)),
    Port('geom_feats', 'int32', ('num_kept', 4)),
    Port('kept', 'bool', ('num_geom_feats',)),
    Port('ranks', 'int64', ('num_kept',)),
    Port('indices', 'int64', ('num_kept',)),
    Port('image_feats', 'float32', ('num_imgs', 'CHANNELS', 'ROWS', 'COLUMNS')),
)
_BOXES = (
    Port('bbox_pred', 'float32', (10, 'PROPOSALS')),
    Port('score', 'float32', ('PROPOSALS',)),
    Port('label_pred', 'int64', ('PROPOSALS',)),
)
_HEAD = (
    ('heatmap', 'CLASSES'),
    ('reg', 2),
    ('height', 1),
    ('dim', 3),
    ('rot', 2),
    ('vel', 2),
)
_AUTOWARE = Runtime(
    'autoware',
    targets=('tensorrt', 'tensorrt8'),  # which the nodes build by flags
    arithmetic='autoware',
    domain='autoware',
    max_voxels=256_000,
    files=(
        RuntimeFile('bevfusion_lidar', 'voxels to boxes', _VOXELS, _BOXES),
        RuntimeFile(
            'image_backbone',
            'images to features',
            (Port('imgs', 'uint8', ('num_imgs', 3, 'HEIGHT', 'WIDTH')),),
            (Port('image_feats', 'float32', ('num_imgs', 'CHANNELS', 'ROWS', 'COLUMNS')),),
        ),
        RuntimeFile(
            'main_body', 'voxels and image features to boxes', (*_VOXELS, *_CAMERA), _BOXES
        ),
        RuntimeFile(
            'pts_voxel_encoder_centerpoint',
            'points by pillar to features',
            (Port('input_features', 'float32', ('num_voxels', 'POINTS', 'FEATURES')),),
            (Port('pillar_features', 'float32', ('num_voxels', 1, 'CHANNELS')),),
        ),
        RuntimeFile(
            'pts_backbone_neck_head_centerpoint',
            'the map to what the head predicts by cell',
            (Port('spatial_features', 'float32', ('batch_size', 'CHANNELS', 'ROWS', 'COLUMNS')),),
            tuple(Port(n, 'float32', ('batch_size', c, 'H', 'W')) for n, c in _HEAD),
        ),
    ),
    clouds=MappingProxyType(
        dict(
            none='engines are built for 1 voxel or more: frames without points are to be skipped; '
            'engine onnxruntime computes them, from a map of zeros',
            one='as any other',
            more='the voxel generator leaves out what is beyond its bound, before the file; the '
            'plugins keep 256,000 voxels by layer, and engine onnxruntime refuses more',
        )
    ),
)

_OPENVINO = Runtime(
    'openvino',
    targets=('openvino',),
    arithmetic='openvino',
    domain='org.openvinotoolkit',
    clouds=MappingProxyType(
        dict(
            none='its example refuses a frame without points: such frames are to be skipped; '
            'engine onnxruntime makes a map of zeros',
            one='as any other',
            more='the plugin has memory for output_bound voxels of a strided layer; its example '
            'makes 80,000 voxels of a frame at most and leaves out the rest; engine onnxruntime '
            'refuses more than output_bound',
        )
    ),
)

#: By name.
RUNTIMES: dict[str, Runtime] = {r.name: r for r in (_CUDA_BEVFUSION, _AUTOWARE, _OPENVINO)}
DEFAULT_RUNTIME = 'cuda-bevfusion'


def runtime_of(name: str) -> Runtime:
    """Looks up a runtime by name.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in RUNTIMES:
        raise ValueError(f'there is no runtime {name!r}; there are {", ".join(RUNTIMES)}')
    return RUNTIMES[name]


def target_for(runtime: str, target: str | None = None) -> str:
    """Chooses the target that files of a runtime are written for.

    Args:
        runtime: Name of the runtime.
        target: Name of the target that is asked for; None: the runtime's own.

    Returns:
        Name of the target.

    Raises:
        ValueError: If there is none of a name, or the runtime does not go with the target.
    """
    goes_with = runtime_of(runtime).targets or (DEFAULT, *TARGETS)
    target = target or goes_with[0]
    known = {ALIASES.get(name, name) for name in goes_with}
    if target_of(target).name not in known:
        raise ValueError(
            f'the runtime {runtime} does not run engines of {target}: take --target '
            f'{" or ".join(goes_with)}, or another --runtime'
        )
    return target
