"""Writes the child of a config that keeps some layers float."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmdet3d_quant.core.naming import type_name
from mmdet3d_quant.core.spec import as_reasons
from mmdet3d_quant.files.literals import assignment
from mmdet3d_quant.files.outputs import whole
from mmdet3d_quant.jobs.child_configs import child_text

#: Types of detectors that take ``skip`` themselves.
_TAKE_SKIP = ('Quant', 'Quantized')


def write_skip_config(
    cfg: Config, config: str | Path, out: str | Path, skip: Mapping[str, str], head: Sequence[str]
) -> None:
    """Writes a child config; what its base skips stays skipped.

    Args:
        cfg: The config, read.
        config: Where it lies.
        out: Where to write.
        skip: Reason by name pattern of what becomes float.
        head: Lines of comment for its head.

    Raises:
        OSError: If it cannot be written.
    """
    config, out = Path(config), Path(out)
    change: dict[str, Any] = {}
    if type_name(cfg.model['type']) not in _TAKE_SKIP:
        change = dict(type='Quantized', of=cfg.model['type'])
    before = cfg.model.get('skip') if not change else None
    change['skip'] = dict(skip)
    if before is not None and not isinstance(before, Mapping):  # a list would not merge
        change['skip'] = dict({**as_reasons(before), **skip}, _delete_=True)
    comments = [f'# {line}' for line in head]
    text = child_text(cfg, config, out, comments, change, [assignment('model', change)])
    with whole(out) as part:
        part.write_text(text)
