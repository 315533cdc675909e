"""A config of the toy for all tools."""

from mmengine.config import Config
from mmengine.registry import DATASETS, METRICS

from tests.qat.toy import Error, Points

for _registry, _type in ((DATASETS, Points), (METRICS, Error)):
    _registry.register_module(name=f'Toy{_type.__name__}', module=_type, force=True)


def config(folder, epochs=1, **changes):
    """A config of the toy for all tools."""
    loader = dict(
        batch_size=4,
        num_workers=0,
        dataset=dict(type='ToyPoints', count=4),
        sampler=dict(type='DefaultSampler', shuffle=False),
    )
    cfg = dict(
        default_scope='mmdet3d',
        model=dict(type='Toy'),
        train_dataloader=loader,
        val_dataloader=loader,
        test_dataloader=loader,
        calib_dataloader=loader,
        val_evaluator=dict(type='ToyError'),
        test_evaluator=dict(type='ToyError'),
        val_cfg=dict(),
        test_cfg=dict(),
        train_cfg=dict(by_epoch=True, max_epochs=epochs, val_interval=9),
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-2)),
        load_from=str(folder / 'int8.pth'),
        log_level='WARNING',
    )
    cfg.update(changes)
    path = folder / 'toy.py'
    Config(cfg).dump(path)
    return path
