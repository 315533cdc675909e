"""Where a file came from: config, checkpoint and versions, as plain values."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmdet3d_quant.files.outputs import sha256
from mmdet3d_quant.version import __version__

PACKAGES = ('torch', 'mmcv', 'mmengine', 'mmdet', 'mmdet3d', 'pytorch-quantization')


def provenance(cfg: Config | None, checkpoint: str | Path) -> dict[str, Any]:
    """Describes the inputs of a run.

    Args:
        cfg: The config, with overrides applied; None where a run needs none.
        checkpoint: The checkpoint that was read.

    Returns:
        Plain dict: ``source_checkpoint`` (name and SHA-256) and ``versions``; of the config its
        ``config`` (path), ``cfg`` (full text), and ``dataset_meta`` where it tells the classes.
    """
    versions = {'mmdet3d_quant': __version__}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    facts: dict[str, Any] = dict(
        source_checkpoint=dict(name=Path(checkpoint).name, sha256=sha256(checkpoint)),
        versions=versions,
    )
    if cfg is None:
        return facts
    facts.update(config=str(cfg.filename), cfg=cfg.pretty_text)
    classes = cfg.get('class_names') or cfg.get('metainfo', {}).get('classes')
    if classes:
        facts['dataset_meta'] = dict(classes=list(classes))
    return facts
