"""Checkpoints of mit-han-lab's BEVFusion, on which CUDA-BEVFusion is built, to mmdet3d's and back.

Three things differ: the names (:data:`RULES`), the layout of sparse weights, and how boxes are
coded. docs/checkpoints.md has the sources.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from mmdet3d_quant.core.compat import removesuffix, strict_zip
from mmdet3d_quant.parents.derived import DERIVED, derived_modules
from mmdet3d_quant.parents.sparse_layout import LayoutError, layout_of, rearranged
from mmdet3d_quant.runs.wrappers import prefixes, tell, without

#: (mit-han-lab, mmdet3d), the first that matches holds; ``{n}`` is a number, ``{rest}`` the rest.
RULES = (
    ('encoders.camera.backbone.{rest}', 'img_backbone.{rest}'),
    # NVIDIA's concat 0 runs first: on the coarsest maps.
    ('encoders.camera.neck.quant_concat0.{rest}', 'img_neck.concats.1.{rest}'),
    ('encoders.camera.neck.quant_concat1.{rest}', 'img_neck.concats.0.{rest}'),
    ('encoders.camera.neck.{rest}', 'img_neck.{rest}'),
    ('encoders.camera.vtransform.{rest}', 'view_transform.{rest}'),
    ('encoders.lidar.backbone.conv_input.{rest}', 'pts_middle_encoder.conv_input.{rest}'),
    ('encoders.lidar.backbone.encoder_layers.{rest}', 'pts_middle_encoder.encoder_layers.{rest}'),
    ('encoders.lidar.backbone.conv_out.{rest}', 'pts_middle_encoder.conv_out.{rest}'),
    ('fuser.{rest}', 'fusion_layer.{rest}'),
    ('decoder.backbone.{rest}', 'pts_backbone.{rest}'),
    ('decoder.neck.{rest}', 'pts_neck.{rest}'),
    ('heads.object.shared_conv.{rest}', 'bbox_head.shared_conv.{rest}'),
    ('heads.object.heatmap_head.{rest}', 'bbox_head.heatmap_head.{rest}'),
    ('heads.object.class_encoding.{rest}', 'bbox_head.class_encoding.{rest}'),
    (
        'heads.object.decoder.{n}.self_posembed.{rest}',
        'bbox_head.decoder.{n}.self_posembed.{rest}',
    ),
    (
        'heads.object.decoder.{n}.cross_posembed.{rest}',
        'bbox_head.decoder.{n}.cross_posembed.{rest}',
    ),
    ('heads.object.decoder.{n}.self_attn.{rest}', 'bbox_head.decoder.{n}.self_attn.attn.{rest}'),
    (
        'heads.object.decoder.{n}.multihead_attn.{rest}',
        'bbox_head.decoder.{n}.cross_attn.attn.{rest}',
    ),
    ('heads.object.decoder.{n}.linear1.{rest}', 'bbox_head.decoder.{n}.ffn.layers.0.0.{rest}'),
    ('heads.object.decoder.{n}.linear2.{rest}', 'bbox_head.decoder.{n}.ffn.layers.1.{rest}'),
    ('heads.object.decoder.{n}.norm1.{rest}', 'bbox_head.decoder.{n}.norms.0.{rest}'),
    ('heads.object.decoder.{n}.norm2.{rest}', 'bbox_head.decoder.{n}.norms.1.{rest}'),
    ('heads.object.decoder.{n}.norm3.{rest}', 'bbox_head.decoder.{n}.norms.2.{rest}'),
    ('heads.object.prediction_heads.{n}.{rest}', 'bbox_head.prediction_heads.{n}.{rest}'),
)
#: Target -> column of :data:`RULES` that it reads, layout of its sparse weights.
TARGETS = {'mmdet3d': (0, 'spconv2'), 'mit': (1, 'spconv1')}
#: A convolution and the batch norm after it, both in every checkpoint that is not folded.
_CONV, _NORM = 'decoder.backbone.blocks.0.0.weight', 'decoder.backbone.blocks.0.1.running_var'
#: Last convolution of the size and the yaw of a box.
_BOX = re.compile(r'bbox_head\.prediction_heads\.\d+\.(dim|rot)\.\d+\.(weight|bias)')
_FOLDED = (
    "batch norm is folded into the convolutions, as NVIDIA's ptq.py does (bevfusion_ptq.pth): "
    'convert the float checkpoint that this one was made from, then run tools/calibrate.py'
)
#: What begins the names of mit-han-lab's BEVFusion, and of no part of mmdet3d.
_MIT = ('encoders.camera.', 'encoders.lidar.')
_SPARSE = 'pts_middle_encoder.'
_RANGE = '_quantizer._amax'


class ConversionError(ValueError):
    """A checkpoint cannot be converted.

    Attributes:
        entries: The names concerned and what is wrong with each.
    """

    def __init__(self, problem: str, entries: Mapping[str, str]):
        self.entries = dict(entries)
        lines = [f'  {name} {what}'.rstrip() for name, what in self.entries.items()]
        more = [f'  ... {len(lines) - 20} more'] if lines[20:] else []
        super().__init__('\n'.join([problem, *lines[:20], *more]))


@dataclass(frozen=True)
class Part:
    """Counts of one part of a model: entries, numbers in them, entries changed in value."""

    entries: int = 0
    numbers: int = 0
    changed: int = 0


def _pattern(template: str) -> re.Pattern:
    pattern = re.escape(template).replace(r'\{n\}', r'(?P<n>\d+)')
    return re.compile(pattern.replace(r'\{rest\}', r'(?P<rest>.+)'))


_PATTERNS = [[_pattern(rule[side]) for rule in RULES] for side in (0, 1)]


def rename(name: str, to: str) -> str | None:
    """Maps an entry's name to the target's layout; None where the target has no such place.

    >>> rename('heads.object.decoder.0.norm1.weight', 'mmdet3d')
    'bbox_head.decoder.0.norms.0.weight'
    """
    side, _ = TARGETS[to]
    for pattern, rule in strict_zip(_PATTERNS[side], RULES):
        if match := pattern.fullmatch(name):
            return rule[1 - side].format(**match.groupdict())
    return None


def maker_of(names: Collection[str]) -> str | None:
    """Says whose checkpoint has such names, and what takes it; None where it is not mit-han-lab's.

    >>> maker_of(['module.encoders.camera.neck.fpn_convs.0.conv.weight'])
    'a BEVFusion of mit-han-lab: tools/convert_checkpoint.py makes one for mmdet3d of it'
    """
    prefix = prefixes(names)[-1]
    bare = {name[len(prefix) :] for name in names}
    if not any(name.startswith(_MIT) for name in bare):
        return None
    if _CONV in bare and _NORM not in bare:
        return f'a quantized BEVFusion of CUDA-BEVFusion; {_FOLDED}'
    return 'a BEVFusion of mit-han-lab: tools/convert_checkpoint.py makes one for mmdet3d of it'


def convert(state: Mapping[str, Tensor], to: str) -> tuple[dict[str, Tensor], dict[str, Part]]:
    """Converts a state dict; every entry finds a place.

    Args:
        state: Names and tensors, in the other layout; not changed.
        to: ``'mmdet3d'`` or ``'mit'``.

    Returns:
        The new state dict, with the version of sparse weights in its ``_metadata`` where mmdet3d
        needs it; and per part of mmdet3d's model what was placed.

    Raises:
        ConversionError: If an entry has no place, two share one, or the layout of the sparse
            weights is unclear.
    """
    side, layout = TARGETS[to]
    prefix = prefixes(state)[-1]
    tell(prefix)
    state = without(dict(state), prefix)
    names = _new_names(state, to)
    ours = {name: new if to == 'mmdet3d' else name for name, new in names.items()}

    sparse = {n for n, our in ours.items() if our.startswith(_SPARSE) and state[n].dim() == 5}
    shapes = [state[name].shape for name in sparse if name.endswith('.weight')]
    try:
        turn = bool(shapes) and layout_of(shapes) != layout
    except LayoutError as err:
        raise ConversionError(str(err), {}) from None

    new_state: OrderedDict[str, Tensor] = OrderedDict()
    parts: dict[str, Part] = {}
    for name, value in state.items():
        box = _BOX.fullmatch(ours[name])
        if box:
            value = _recode_box(value, box[1])
        if turn and name in sparse:
            value = rearranged(value, layout)
        new_state[names[name]] = value
        label = ours[name].split('.')[0]
        part = parts.get(label, Part())
        parts[label] = Part(
            part.entries + 1,
            part.numbers + value.numel(),
            part.changed + (value is not state[name]),
        )
    if to == 'mmdet3d':
        layers = [removesuffix(names[name], '.weight') for name in sparse]
        new_state._metadata = {layer: dict(version=2) for layer in layers}  # type: ignore
    return new_state, parts


def _new_names(state: Mapping[str, Tensor], to: str) -> dict[str, str]:
    """Maps every entry's name to its name in the target's layout.

    Raises:
        ConversionError: If an entry has no place or two share one.
    """
    names = {name: new for name in state if (new := rename(name, to)) is not None}
    back = 'mit' if to == 'mmdet3d' else 'mmdet3d'
    lost = {n: str(tuple(state[n].shape)) for n in state if n not in names}
    if not names and any(rename(name, back) for name in lost):
        raise ConversionError(f'the checkpoint has the names of {to} already', {})
    if lost:
        raise ConversionError(f'{len(lost)} entries have no place in {to}:', lost)
    if _CONV in state and _NORM not in state:
        raise ConversionError(
            f'{_FOLDED}; missing',
            {_NORM: ''},
        )
    if len(set(names.values())) < len(names):
        places = list(names.values())
        twice = {n: f'-> {new}' for n, new in names.items() if places.count(new) > 1}
        raise ConversionError('entries share a place:', twice)
    return names


def _recode_box(value: Tensor, head: str) -> Tensor:
    """Recodes the rows of the last convolution of a head; the same both ways.

    mit-han-lab keeps the boxes of mmdet3d before 1.0: width before length, and a yaw r that is
    -pi/2 - yaw of today, so that (sin r, cos r) = (-cos yaw, -sin yaw).
    """
    return value[[1, 0, 2]] if head == 'dim' else -value[[1, 0]]


def fit(state: Mapping[str, Tensor], model: nn.Module) -> list[str]:
    """Compares a state dict in mmdet3d's layout with a model.

    Args:
        state: Names and tensors.
        model: The model, float or quantized.

    Returns:
        Ranges of quantizers that the model does not have, or has in another shape.

    Raises:
        ConversionError: If another entry is missing, unknown or of another shape.
    """
    derived = {f'{module}.{key}' for module, _ in derived_modules(model) for key in DERIVED}
    own = _shapes(model.state_dict(), derived)
    given = _shapes(state, derived)
    wrong = {
        name: f'{shape}, expected {own[name]}' if name in own else f'{shape} is not in the model'
        for name, shape in given.items()
        if own.get(name) != shape
    }
    ranges = [name for name in wrong if name.endswith(_RANGE)]
    wrong = {name: what for name, what in wrong.items() if name not in ranges}
    for name in own.keys() - given.keys():
        if not name.endswith(_RANGE):
            wrong[name] = f'{own[name]} is missing'
    if wrong:
        raise ConversionError(
            f'the checkpoint does not fit the model of the config: {len(wrong)} entries',
            dict(sorted(wrong.items())),
        )
    return ranges


def _shapes(state: Mapping[str, Tensor], but: Collection[str]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items() if name not in but}
