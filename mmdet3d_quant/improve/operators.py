"""What operators do to a positive factor of their input: which hand it on to their result."""

from __future__ import annotations

from typing import Any

from torch import Tensor

#: Operators that look at the shape of their input alone, by name without a trailing underscore.
NOT_READ = frozenset(
    {f'{what}_like' for what in ('zeros', 'ones', 'empty', 'full', 'rand', 'randn')}
    | {f'new_{what}' for what in ('zeros', 'ones', 'empty', 'full', 'empty_strided')}
    | {'zero'}
)
#: Operators whose result is zero.
ZEROS = frozenset({'zeros', 'zero', 'new_zeros', 'zeros_like'})
#: Operators that write their last tensor into their first.
FILLS = frozenset({'copy', 'index_put', '_index_put_impl', 'index_copy', 'scatter', 'scatter_add'})
#: Operators with f(a x) = a f(x) for a > 0 whose second tensor has the slopes below zero.
SLOPES = frozenset({'prelu', '_prelu_kernel'})
#: Operators with f(a x) = a f(x) for a > 0, element by element.
_BY_ELEMENT = frozenset({'relu', 'leaky_relu', 'clone', '_to_copy', 'contiguous'}) | SLOPES
#: Operators with f(a x) = a f(x) for a > 0 that leave channels, axis 1, what and where they are.
_BY_CHANNEL = frozenset(
    _BY_ELEMENT
    | {f'{kind}_pool{n}d' for kind in ('avg', '_adaptive_avg') for n in (2, 3)}
    | {f'max_pool{n}d_with_indices' for n in (2, 3)}
    | {f'adaptive_max_pool{n}d' for n in (2, 3)}
    | {f'upsample_nearest{n}d' for n in (1, 2, 3)}
    | {f'_upsample_nearest_exact{n}d' for n in (1, 2, 3)}
    | {'upsample_linear1d', 'upsample_bilinear2d', 'upsample_bicubic2d', 'upsample_trilinear3d'}
    | {'_upsample_bilinear2d_aa', '_upsample_bicubic2d_aa'}
    | {f'{kind}_pad{n}d' for kind in ('reflection', 'replication') for n in (1, 2, 3)}
)
#: Operators with f(a x) = a f(x) for a > 0 that may move channels.
_ANY = frozenset({'index', 'index_select', 'gather', 'flip', 'roll', 'repeat', 'constant_pad_nd'})


def keeps(name: str, args: Any, kwargs: Any) -> bool:
    """Tells whether a positive factor of an operator's only floating input is one of its result.

    Args:
        name: The operator's, without namespace and trailing underscore.
        args: Its arguments.
        kwargs: Likewise.
    """
    if name == 'constant_pad_nd':
        return (args[2] if len(args) > 2 else kwargs.get('value', 0)) == 0
    return name in _BY_CHANNEL or name in _ANY


def keeps_channels(name: str, args: Any, axis: int = 1) -> bool:
    """Tells whether an operator of :func:`keeps` leaves channels what and where they are.

    Args:
        name: As there.
        args: Its arguments.
        axis: Which axis has the channels: 1, or -1, the last one.
    """
    if name == 'constant_pad_nd':
        pads = args[1]
        return not any(pads[:2]) if axis == -1 else len(pads) <= 2 * (args[0].dim() - 2)
    if axis == -1 and name == 'roll':
        dims = args[2] if len(args) > 2 else ()
        return bool(dims) and all(dim % args[0].dim() != args[0].dim() - 1 for dim in dims)
    return name in (_BY_ELEMENT if axis == -1 else _BY_CHANNEL)


def joins_channels(args: Any, kwargs: Any) -> bool:
    """Tells whether a ``cat`` joins floating tensors along their axis 1."""
    first = args[0][0]
    dim = args[1] if len(args) > 1 else kwargs.get('dim', 0)
    alike = all(x.dim() == first.dim() and x.is_floating_point() for x in args[0])
    return alike and first.dim() > 1 and dim % first.dim() == 1


def written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Finds the tensors that an operator writes to.

    Args:
        func: An overload of an operator, as ``torch.ops.aten.relu_.default``.
        args: Its arguments.
        kwargs: Likewise.
    """
    found: list[Tensor] = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            values = value if isinstance(value, (list, tuple)) else [value]
            found += [x for x in values if isinstance(x, Tensor)]
    return found
