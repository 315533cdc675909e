"""Writes the INT8 config of a float config, and the config that trains it on, with comments."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

from mmengine.config import Config

from mmdet3d_quant.core.coverage import Coverage, coverage
from mmdet3d_quant.core.naming import type_name
from mmdet3d_quant.files.literals import WIDTH, assignment, literal
from mmdet3d_quant.files.outputs import check_writable, whole
from mmdet3d_quant.jobs.swaps import Swap, find_swaps, model_change
from mmdet3d_quant.runs import from_config as fc

#: QAT takes this share of the float training's learning rate, and of its epochs.
RATE, EPOCHS = 0.01, 1 / 6
#: Where the QAT config expects the calibrated checkpoint.
CALIBRATED = 'work_dirs/int8.pth'
_CALIBRATE = f'#   mmdet3d-quant calibrate THIS_CONFIG FLOAT_CHECKPOINT --out {CALIBRATED}'
_EXPORT = f'#   mmdet3d-quant export_onnx THIS_CONFIG {CALIBRATED} --out-dir onnx'
#: What a part that scatters pillars into a map asks for.
PILLARS = 'PointPillarsScatter'
_EMPTY = (
    'Most cells hold no pillar: without --empty-cells their values are off alike in INT8, which '
    'may cost several points of mAP (docs/calibration.md).'
)
#: How many names a comment lists.
_SHOWN = 4


@dataclass(frozen=True)
class Written:
    """Result of :func:`quantize_config`.

    Attributes:
        int8: The INT8 config.
        qat: The config that trains it.
        swaps: What changes in each part.
        coverage: The layers of the INT8 model; their work is not counted.
    """

    int8: Path
    qat: Path
    swaps: list[Swap]
    coverage: Coverage


def quantize_config(
    config: str | Path, out: str | Path | None = None, force: bool = False
) -> Written:
    """Writes the INT8 child of a float config, and the QAT child beside it.

    Args:
        config: A float config of mmdet3d; ``mmdet3d::...`` names one in its wheel.
        out: INT8 config to write; default: ``STEM_int8.py`` in the current folder. The other is
            named with ``qat`` for ``int8``.
        force: Replace files that are there.

    Returns:
        :class:`Written`, after the INT8 config was read and its model built.

    Raises:
        ConfigError: If the config cannot be read, its model cannot be built, or has no part that
            can be quantized.
        OSError: If a file is there and not ``force``, or cannot be written.
    """
    config = fc.located(config)
    out = Path(out) if out is not None else Path(f'{config.stem}_int8.py')
    qat = _qat_path(out)
    for path in (out, qat):
        check_writable(path)
        if path.exists() and not force:
            raise FileExistsError(f'{path} is there: give another -o, or --force')
    if out.resolve() == config.resolve():
        raise fc.ConfigError(f'{out} is the float config itself: give another -o')
    cfg = fc.read_config(config)
    swaps = find_swaps(cfg)
    if not any(s.change for s in swaps):
        reasons = '; '.join(f'{s.part} ({s.kind}): {s.reason}' for s in swaps)
        raise fc.ConfigError(f'no part of {config} can be quantized: {reasons or "it has none"}')
    with whole(out) as part:
        part.write_text(int8_text(cfg, config, out, swaps))
    with whole(qat) as part:
        part.write_text(qat_text(cfg, out, swaps))
    made = coverage(fc.build_model(fc.read_config(out)))
    return Written(out, qat, swaps, made)


def _qat_path(out: Path) -> Path:
    stem = out.stem.replace('int8', 'qat') if 'int8' in out.stem else f'{out.stem}_qat'
    return out.with_name(f'{stem}.py')


def int8_text(cfg: Config, config: Path, out: Path, swaps: Sequence[Swap]) -> str:
    """Composes the INT8 config.

    Args:
        cfg: The float config.
        config: Where it lies.
        out: Where the text will lie.
        swaps: What to change.
    """
    head = [
        f'# INT8 child of {config.name}: types change, all else is inherited.',
        *_commands(cfg),
    ]
    change = model_change(cfg, swaps)
    lines = ['model = dict(']
    parts = {s.part: s for s in swaps}
    for key, value in change.items():
        lines += _comments(parts[key], '    ') if key in parts else []
        lines.append(f'    {assignment(key, value, 4)},')
    for swap in swaps:
        lines += [] if swap.change or swap.meant else _comments(swap, '    ')
    notes = [line for s in swaps for line in _comments(s, '')]
    return child_text(cfg, config, out, head, change, [*lines, ')'], notes)


def child_text(
    cfg: Config,
    config: Path,
    out: Path,
    head: Sequence[str],
    change: dict[str, Any],
    lines: Sequence[str],
    notes: Sequence[str] = (),
) -> str:
    """Composes a config that changes the model of another and has this package imported.

    Args:
        cfg: The other config, read.
        config: Where it lies.
        out: Where the text will lie.
        head: Lines of comment for its head.
        change: Of the model.
        lines: The same as text.
        notes: Comments that stand in for those of ``lines`` where the config is written out.
    """
    if Config._is_lazy_import(str(config)):  # a text config has no Python config as its base
        plain = Config(dict(cfg._cfg_dict.to_dict(), custom_imports=_imports(cfg)))
        plain.merge_from_dict(dict(model=change))
        return '\n'.join([*head, *notes, plain.pretty_text])
    base = [f'_base_ = [{_base(config, out)!r}]', assignment('custom_imports', _imports(cfg))]
    return '\n'.join([*head, *base, '', *lines, ''])


def _commands(cfg: Config) -> list[str]:
    """The commands that calibrate and export, with what the detector asks for."""
    parts = [part for part in cfg.model.values() if isinstance(part, dict)]
    if PILLARS not in [type_name(part['type']) for part in parts if 'type' in part]:
        return [_CALIBRATE, _EXPORT]
    return [*_comment(_EMPTY, ''), f'{_CALIBRATE} --empty-cells', _EXPORT]


def _base(config: Path, out: Path) -> str:
    """How a config at ``out`` names another as its base."""
    config = config.resolve()
    if fc.WHEEL.resolve() in config.parents:
        return f'mmdet3d::{config.relative_to(fc.WHEEL.resolve()).as_posix()}'
    return Path(os.path.relpath(config, out.resolve().parent)).as_posix()


def _imports(cfg: Config, *more: str) -> dict[str, Any]:
    """The config's ``custom_imports`` with this package."""
    given = dict(cfg.get('custom_imports') or {})
    there = given.get('imports') or []
    there = [there] if isinstance(there, str) else list(there)
    names = list(dict.fromkeys([*there, 'mmdet3d_quant', *more]))
    return dict(given, imports=names, allow_failed_imports=False)


def _comments(swap: Swap, indent: str) -> list[str]:
    """Says what of a part stays float, and why."""
    if swap.reason:
        count = f'{swap.layers} layer{"s" if swap.layers > 1 else ""}'
        return _comment(f'{swap.part} ({swap.kind}, {count}) stays float: {swap.reason}', indent)
    lines = []
    for reason, names in swap.left.items():
        shown = ', '.join(names[:_SHOWN])
        shown += f' and {len(names) - _SHOWN} more' if names[_SHOWN:] else ''
        lines += _comment(f'float in {swap.part}: {shown}: {reason}', indent)
    return lines


def _comment(text: str, indent: str) -> list[str]:
    return [f'{indent}# {line}' for line in wrap(text, WIDTH - len(indent) - 2)]


def qat_text(cfg: Config, int8: Path, swaps: Sequence[Swap]) -> str:
    """Composes the config that trains the INT8 model from its calibrated checkpoint.

    Args:
        cfg: The float config.
        int8: The INT8 config, in the same folder.
        swaps: What the INT8 config changes.
    """
    hooks = [dict(h) for h in cfg.get('custom_hooks') or []]
    hooks.append(dict(type='QATHook', freeze_bn=0))
    necks = {s.part: 1.0 for s in swaps if s.change and 'neck' in s.part}
    if necks:
        hooks.append(dict(type='DistillHook', checkpoint=CALIBRATED, modules=necks))
    lines = [
        f'# QAT of {int8.name}, from its calibrated checkpoint. docs/qat.md has the reasons.',
        '#   mmdet3d-quant train THIS_CONFIG',
        f'_base_ = [{int8.name!r}]',
        assignment('custom_imports', _imports(cfg, 'mmdet3d_quant.qat')),
        '',
        f'load_from = {CALIBRATED!r}',
        'custom_hooks = [',
        *(f'    {literal(hook, 4)},' for hook in hooks),
        ']',
        *_schedule(cfg),
    ]
    return '\n'.join([*lines, ''])


def _schedule(cfg: Config) -> list[str]:
    """A hundredth of the learning rate, falling to 0, for a sixth of the epochs."""
    loop, wrapper = cfg.get('train_cfg') or {}, cfg.get('optim_wrapper') or {}
    rate = (wrapper.get('optimizer') or {}).get('lr')
    if rate is None or not loop.get('max_epochs'):
        return [
            '',
            '# The float config has no epochs and learning rate to derive the schedule from: set',
            '# train_cfg, optim_wrapper and param_scheduler; a hundredth of the rate is good.',
        ]
    epochs = max(1, round(loop['max_epochs'] * EPOCHS))
    scheduler = [
        dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=100),
        dict(
            type='CosineAnnealingLR',
            begin=0,
            T_max=epochs,
            end=epochs,
            by_epoch=True,
            eta_min_ratio=1e-2,
            convert_to_iter_based=True,
        ),
    ]
    return [
        '',
        '# A hundredth of the float learning rate, falling to 0, for a sixth of the epochs.',
        assignment('train_cfg', dict(max_epochs=epochs, val_interval=1)),
        assignment('optim_wrapper', dict(optimizer=dict(lr=float(f'{rate * RATE:.3g}')))),
        'param_scheduler = [',
        *(f'    {literal(step, 4)},' for step in scheduler),
        ']',
        'train_dataloader = dict(persistent_workers=False)  # a resumed run augments alike',
    ]
