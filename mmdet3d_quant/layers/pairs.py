"""Which batch norm reads the output of which convolution, and which of the pairs can be folded.

Seen on real tensors where a forward is given; else only in modules whose forward is known to call
their children in the order of registration.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from mmdet3d_quant.core.joined import untouched
from mmdet3d_quant.core.modes import set_mode
from mmdet3d_quant.layers.joining import Joining
from mmdet3d_quant.layers.sparse import OUTPUTS_LAST, SPARSE_CONVS
from mmdet3d_quant.layers.watch import KEEPING, Watch

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED, nn.Linear, *SPARSE_CONVS)
#: Where a forward may come from that is linear in the weight; mmcv has others (ConvWS2d).
_LINEAR = (
    'torch.nn.modules.',
    'mmcv.cnn.bricks.wrappers',
    'mmcv.ops.sparse_',
    'spconv.',
    'mmdet3d_quant.layers.',
    'mmdet3d_quant.parents.',
)
#: Classes whose forward calls convolutions and norms in the order of registration.
_IN_ORDER = frozenset({
    'torch.nn.modules.container.Sequential',
    'spconv.pytorch.modules.SparseSequential',
    'mmcv.ops.sparse_modules.SparseSequential',
    'mmcv.cnn.bricks.conv_module.ConvModule',
    'mmdet.models.backbones.resnet.BasicBlock',
    'mmdet.models.backbones.resnet.Bottleneck',
    'mmdet.models.backbones.resnet.ResNet',
    'mmdet3d.models.layers.sparse_block.SparseBasicBlock',
    'mmdet3d_quant.models.resnet._QuantBlock',
    'mmdet3d_quant.models.sparse_encoder.QuantSparseBasicBlock',
    'mmdet3d_quant.parents.fuser.ConvFuser',
})  # fmt: skip
#: Classes of batch norms whose forward, in eval mode, is torch's.
_AS_TORCH = tuple(
    f'mmdet3d.models.layers.norm.NaiveSyncBatchNorm{dims}' for dims in ('1d', '2d', '3d')
)

Run = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class Pairs:
    """Batch norms of a model, as far as its forward reaches them.

    Attributes:
        folding: Each convolution that a batch norm can be folded into, and that batch norm.
        kept: Why each of the others cannot be folded, by its name.
        unsure: Names of those in ``kept`` that a forward on real tensors may find foldable.
    """

    folding: list[tuple[nn.Module, _BatchNorm]] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    unsure: list[str] = field(default_factory=list)


def find_pairs(model: nn.Module, run: Run | None = None, quantized: bool = True) -> Pairs:
    """Finds every batch norm that can be folded into a convolution, and why others cannot.

    A batch norm can be folded if it reads exactly what one convolution makes, each time, and
    nothing else reads that or keeps it.

    Args:
        model: Module in eval mode; in mode ``float`` meanwhile, and unchanged afterwards.
        run: Runs the model once on real inputs. Without, only children of modules that are known
            to call them in the order of registration are paired.
        quantized: Whether the ranges of weights must stay exact; False: only their values.

    Returns:
        The pairs.
    """
    names: dict[nn.Module, str] = {m: n for n, m in model.named_modules()}
    norms = [m for m in names if isinstance(m, _BatchNorm)]
    if not norms:
        return Pairs()
    own = {m: problem_alone(m) for m in names if isinstance(m, (*CONVS, _BatchNorm))}
    model = getattr(model, '_orig_mod', model)  # of torch.compile, whose graphs cannot be watched
    unsure: dict[nn.Module, str] = {}
    if run is None or any(_compiled(m) for m in model.modules()):
        sources, spoiled, unsure = _by_order(model)
    else:
        with set_mode(model, 'float'), torch.no_grad():
            sources, spoiled = _by_reading(model, run)
    found = Pairs()
    readers = Counter(conv for convs in sources.values() for conv in convs)
    for bn in norms:
        name = names[bn]
        if bn in unsure:
            found.kept[name] = unsure[bn]
            found.unsure.append(name)
        elif bn in sources:
            reason, conv = _reason(bn, sources[bn], readers, {**own, **spoiled}, names)
            reason = reason or _problem(conv, bn, quantized)
            if reason:
                found.kept[name] = reason
            else:
                found.folding.append((conv, bn))
    return found


def _compiled(module: nn.Module) -> bool:
    return hasattr(module, '_orig_mod') or getattr(module, '_compiled_call_impl', None) is not None


def _by_reading(
    model: nn.Module, run: Run
) -> tuple[dict[nn.Module, set[Any]], dict[nn.Module, str]]:
    """Runs the model; returns what each BN read, and why outputs of convolutions must stay."""
    with Watch(model, CONVS, _BatchNorm, _dims) as watch:
        result = run(model)
        watch.check_kept()
        del result
    return watch.sources, watch.spoiled


def _by_order(
    model: nn.Module,
) -> tuple[dict[nn.Module, set[Any]], dict[nn.Module, str], dict[nn.Module, str]]:
    """Pairs by order of registration, where that is known to be the order of calls."""
    sources: dict[nn.Module, set[Any]] = {}
    unsure: dict[nn.Module, str] = {}
    places: Counter = Counter()
    for parent in model.modules():
        owner = forward_owner(parent)
        last: nn.Module | None = None
        for child in parent._modules.values():
            places[child] += 1
            if isinstance(child, _BatchNorm):
                fits = last is not None and _channels(last) == child.num_features
                sources.setdefault(child, set()).add(last if fits else None)
                if owner not in _IN_ORDER or not _norm_comes_next(parent):
                    unsure[child] = f'{owner} may call its children in any order'
                elif isinstance(last, nn.Linear):
                    unsure[child] = 'the output of a linear layer may have more than two axes'
            if child is not None and not isinstance(child, KEEPING):
                last = child if isinstance(child, CONVS) else None
    spoiled = {m: 'a module of the pair has several places' for m, n in places.items() if n > 1}
    return sources, spoiled, unsure


def _norm_comes_next(parent: nn.Module) -> bool:
    """True unless a ConvModule, which is called in the order it is given, says otherwise."""
    order = list(getattr(parent, 'order', ('conv', 'norm')))
    after = order[order.index('conv') + 1 :] if 'conv' in order else []
    return after[:1] == ['norm'] and getattr(parent, 'efficient_conv_bn_eval_forward', None) is None


def _reason(
    bn: _BatchNorm, convs: set[Any], readers: Counter, problems: dict[nn.Module, Any], names: dict
) -> tuple[str | None, Any]:
    """Reason against the only convolution that a BN reads, or None, and that convolution."""
    if problems.get(bn):
        return problems[bn], None
    if len(convs) > 1:
        return 'it reads the outputs of several modules', None
    (conv,) = convs
    if conv is None:
        return 'what it reads is not the output of a convolution that can take it', None
    if readers[conv] > 1:
        return f'{names[conv]} has several batch norms', conv
    if problems.get(conv):
        return f'{names[conv]}: {problems[conv]}', conv
    return None, conv


def problem_alone(module: nn.Module) -> str | None:
    """Finds the reason why a layer's weight and bias must stay as they are, or None.

    Args:
        module: A convolution, linear layer or norm, whatever its neighbours; without hooks of
            whoever asks.
    """
    if isinstance(module, _BatchNorm):
        if module.running_mean is None or module.running_var is None:
            return (
                'it keeps no running statistics (track_running_stats=False) and normalises by '
                'those of its input; train it with track_running_stats=True'
            )
        known = type(module).forward in (_BatchNorm.forward, SyncBatchNorm.forward)
        if not known and forward_owner(module) not in _AS_TORCH:
            return f'{forward_owner(module)} has a forward of its own'
    else:
        for method in ('forward', '_conv_forward'):
            owner = forward_owner(module, method)
            if owner and not owner.startswith(_LINEAR):
                return f'{owner} has a forward of its own'
        if 'weight' not in module._parameters or 'bias' not in module._parameters:
            return 'its weight is computed (a parametrization or a norm of the weight)'
    if not untouched(module):
        return 'it has forward hooks, or another forward put in'
    return None


def _problem(conv: nn.Module, bn: _BatchNorm, quantized: bool) -> str | None:
    """Reason why the numbers of a pair forbid folding."""
    quantizer = getattr(conv, '_weight_quantizer', None)
    if not quantized or quantizer is None or getattr(quantizer, '_amax', None) is None:
        return None
    axis = output_axis(conv)
    if quantizer.spec.axis != axis:
        return 'the range of the weight is not per output channel'
    groups = conv.groups if isinstance(conv, TRANSPOSED) else 1
    factor = _factor(bn).abs().reshape(groups, -1)
    if not bool((factor == factor[:1]).all()):
        return (
            'it follows a transposed convolution with groups, whose weight has one range for '
            'channels of all groups'
        )
    return None


@torch.no_grad()
def _factor(bn: _BatchNorm) -> Tensor:
    """(channels,): what a BN with running statistics multiplies each channel by."""
    assert bn.running_var is not None
    factor = torch.rsqrt(bn.running_var + bn.eps)
    return factor * bn.weight if bn.affine else factor


def output_axis(conv: nn.Module) -> int:
    """Axis of the weight that indexes output channels (those of a group, if transposed)."""
    if isinstance(conv, OUTPUTS_LAST):
        return conv.weight.dim() - 1
    return 1 if isinstance(conv, TRANSPOSED) else 0


def input_axis(conv: nn.Module) -> int:
    """Axis of the weight that indexes input channels (those of a group, if not transposed)."""
    if isinstance(conv, OUTPUTS_LAST):
        return conv.weight.dim() - 2
    if isinstance(conv, SPARSE_CONVS):
        return conv.weight.dim() - 1
    return 0 if isinstance(conv, TRANSPOSED) else 1


def _channels(conv: nn.Module) -> int:
    return conv.out_features if isinstance(conv, nn.Linear) else conv.out_channels


def forward_owner(module: nn.Module, method: str = 'forward') -> str:
    """Path of the class that says what a module computes; empty if none has the method."""
    owners = (t for t in type(module).__mro__ if method in vars(t) and Joining not in t.__bases__)
    owner = next(owners, None)
    return '' if owner is None else f'{owner.__module__}.{owner.__name__}'


def _dims(conv: nn.Module) -> int:
    """Number of axes of an output with channels at axis 1."""
    return 2 if isinstance(conv, SPARSE_CONVS) else conv.weight.dim()
