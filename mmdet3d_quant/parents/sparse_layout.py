"""The two layouts in which weights of sparse convolutions are stored.

spconv 1, mmcv and mit-han-lab's copy store (kernel x, y, z, in, out), spconv 2 stores (out, kernel
x, y, z, in). mmdet3d's loader tells them apart by the version in a state dict's `_metadata`, and
takes weights without one for spconv 1's. mmdet3d's published BEVFusion checkpoints have spconv 2's
layout without the version, so it turns them round and refuses them (its issue 2584). Shapes cannot
be wrong: here they decide.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mmcv.ops.sparse_conv import SparseConvolution as MMCVSparse
from mmdet3d.models.layers.spconv import IS_SPCONV2_AVAILABLE
from torch import Tensor, nn

if IS_SPCONV2_AVAILABLE:
    from spconv.pytorch.conv import SparseConvolution as Spconv2

    _SPARSE: tuple[type, ...] = (MMCVSparse, Spconv2)
else:
    _SPARSE = (MMCVSparse,)

#: Layout -> where the kernel's axes are.
KERNEL = {'spconv1': slice(0, 3), 'spconv2': slice(1, 4)}
_KERNEL_SIZES = (1, 3, 5, 7)


class LayoutError(ValueError):
    """Shapes do not tell in which layout weights are stored."""


def rearranged(weight: Tensor, layout: str) -> Tensor:
    """Rearranges a weight from the other layout to this one.

    Args:
        weight: Five axes, in the other layout.
        layout: ``'spconv1'`` or ``'spconv2'``: the layout wanted.

    Returns:
        The same numbers, contiguous.
    """
    axes = (4, 0, 1, 2, 3) if layout == 'spconv2' else (1, 2, 3, 4, 0)
    return weight.permute(axes).contiguous()


def layout_of(shapes: Iterable[Sequence[int]]) -> str:
    """Finds the one layout of all weights of an encoder.

    Args:
        shapes: Shapes of its weights, five axes each. Kernels have sides of 1, 3, 5 or 7.

    Returns:
        ``'spconv1'`` or ``'spconv2'``.

    Raises:
        LayoutError: If neither layout fits all weights, or both do.
    """
    known = {tuple(shape) for shape in shapes}
    fit = [
        layout
        for layout, where in KERNEL.items()
        if all(side in _KERNEL_SIZES for shape in known for side in shape[where])
    ]
    if len(fit) != 1:
        raise LayoutError(
            f'the sparse convolutions could be stored in {"either" if fit else "no known"} layout '
            '(expected kernel x, y, z, in, out as in spconv 1, or out, kernel x, y, z, in as in '
            f'spconv 2, the same for all); shapes found: {sorted(known)}'
        )
    return fit[0]


def accept_any_layout(model: nn.Module) -> None:
    """Lets the sparse convolutions of a model load weights of either layout, by their shape.

    Works with any loader: ``load_state_dict``, mmengine's ``load_checkpoint``, mmdet3d's
    ``init_model``. Ranges of quantized weights are turned with them. A weight that fits in both
    layouts (all five axes are equal) needs the version in the state dict's ``_metadata``;
    without, loading into spconv 2 fails. Calling it again changes nothing.

    Args:
        model: Any module.
    """
    for conv in model.modules():
        hooks = conv._load_state_dict_pre_hooks.values()
        known = any(getattr(hook, 'hook', None) is _hand_over for hook in hooks)
        if isinstance(conv, _SPARSE) and not known:
            conv._register_load_state_dict_pre_hook(_hand_over, with_module=True)


def _hand_over(
    conv: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Rearranges a weight to the layout that the loader, which runs next, expects.

    mmdet3d's loader, for spconv 2's convolutions, expects the layout that the version in the
    metadata names; torch's, for mmcv's, copies the weight as it is.
    """
    amax_key = f'{prefix}_weight_quantizer._amax'
    amax = getattr(getattr(conv, '_weight_quantizer', None), '_amax', None)
    if amax is not None and amax_key in state_dict and state_dict[amax_key].dim() == 5:
        if state_dict[amax_key].numel() == amax.numel():
            state_dict[amax_key] = state_dict[amax_key].reshape(amax.shape)
    key = f'{prefix}weight'
    if key not in state_dict:
        return
    own = tuple(conv.weight.shape)
    shape = tuple(state_dict[key].shape)
    told = 'spconv2' if local_metadata.get('version') == 2 else 'spconv1'
    if isinstance(conv, MMCVSparse):
        taken_for = 'spconv1'
        shapes = {'spconv1': own, 'spconv2': (own[-1], *own[:-1])}
    else:
        taken_for = told
        shapes = {'spconv1': (*own[1:], own[0]), 'spconv2': own}
    fit = [layout for layout, wanted in shapes.items() if shape == wanted]
    if len(fit) == 2 and told == 'spconv1' and not isinstance(conv, MMCVSparse):
        error_msgs.append(
            f'size of {key}, {shape}, fits both layouts of sparse weights, and the checkpoint '
            'does not tell which it has (no version 2 in `_metadata`).'
        )
    elif fit and (fit[0] if len(fit) == 1 else told) != taken_for:
        state_dict[key] = rearranged(state_dict[key], taken_for)
