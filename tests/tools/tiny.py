"""The tools that train and test, and configs of theirs for the tiny data set."""

import importlib.util
import sys

from mmengine.config import Config

from tests.small import ROOT

sys.path.insert(0, str(ROOT / 'tools'))  # where they import from each other

TINY = ROOT / 'configs/bevfusion_tiny'


def tool(name):
    """A script of tools/, whose names train and test are Python's own too."""
    spec = importlib.util.spec_from_file_location(f'tool_{name}', ROOT / f'tools/{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TRAIN, TEST = tool('train'), tool('test')
RANDOM = ('BEVFusionGlobalRotScaleTrans', 'BEVFusionRandomFlip3D', 'PointShuffle')


def write_config(path, base, data, **changes):
    """A config for the tiny data set: no worker processes, and no randomness in training."""
    loader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root=f'{data}/'))
    cfg = Config.fromfile(TINY / f'{base}.py')
    cfg.merge_from_dict(
        dict(
            train_dataloader=dict(loader, batch_size=2),
            val_dataloader=loader,
            test_dataloader=loader,
            calib_dataloader=loader,
            val_evaluator=dict(data_root=f'{data}/', ann_file=f'{data}/nuscenes_infos_val.pkl'),
            test_evaluator=dict(data_root=f'{data}/', ann_file=f'{data}/nuscenes_infos_val.pkl'),
            load_from=None,
            train_cfg=dict(max_epochs=2, val_interval=2),
            default_hooks=dict(checkpoint=dict(max_keep_ckpts=5)),
            **changes,
        )
    )
    dataset, attention = cfg.train_dataloader.dataset, dict(dropout=0.0)
    dataset.pipeline = [step for step in dataset.pipeline if step.type not in RANDOM]
    layer = dict(self_attn_cfg=attention, cross_attn_cfg=attention, ffn_cfg=dict(ffn_drop=0.0))
    cfg.merge_from_dict(dict(model=dict(bbox_head=dict(decoder_layer=layer))))
    if cfg.model.img_backbone is not None:
        cfg.model.img_backbone.init_cfg = None
    cfg.dump(path)
    return path
