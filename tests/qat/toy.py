"""A quantized model that trains in seconds, and a Runner for it."""

import torch
from mmdet3d.registry import MODELS
from mmengine.config import Config
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

import mmdet3d_quant as mq
import mmdet3d_quant.qat  # noqa: F401
import mmdet3d_quant.qat.optim  # noqa: F401
from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.layers import QuantConcat, QuantConv2d
from mmdet3d_quant.models.base import finish


class Points(Dataset):
    """Images and the numbers to be told from them, always the same."""

    def __init__(self, count=16):
        generator = torch.Generator().manual_seed(3)
        self.images = torch.randn(count, 3, 8, 8, generator=generator)
        self.images *= 1 + torch.rand(count, 1, 1, 1, generator=generator)
        self.wanted = self.images.mean((2, 3))[:, :2].tanh()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return dict(inputs=self.images[index], data_samples=self.wanted[index])


class Toy(BaseModel):
    """Two convolutions that read one tensor, a concat, batch norm, dropout and a head."""

    def __init__(self, learn_amax=False, dropout=0.0, init_cfg=None):
        super().__init__(init_cfg=init_cfg)
        self.a = QuantConv2d(3, 4, 3, padding=1)
        self.b = QuantConv2d(3, 4, 1)
        self.join = QuantConcat()
        self.norm = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(dropout)
        self.head = QuantConv2d(8, 2, 1)
        finish(self, (), learn_amax)

    def quant_ties(self):
        return [['a._input_quantizer', 'b._input_quantizer']]

    def forward(self, inputs, data_samples=None, mode='tensor'):
        x = torch.stack(list(inputs))
        x = self.norm(self.join([self.a(x).relu(), self.b(x)]))
        y = self.head(self.dropout(x.relu())).mean((2, 3))
        if mode == 'loss':
            return dict(loss=(y - torch.stack(list(data_samples))).square().mean())
        return list(y) if mode == 'predict' else y


class Error(BaseMetric):
    """Mean squared error."""

    def process(self, data_batch, data_samples):
        for got, wanted in strict_zip(data_samples, data_batch['data_samples']):
            self.results.append(float((got - wanted).square().mean()))

    def compute_metrics(self, results):
        return dict(error=sum(results) / len(results))


for _type in (Toy,):
    MODELS.register_module(module=_type, force=True)


def calibrated(path, **kwargs):
    """Writes a checkpoint of the toy with ranges."""
    torch.manual_seed(0)
    model = Toy(**kwargs)
    data = Points()
    mq.calibrate(model, [data.images[:8], data.images[8:]])
    torch.save(dict(state_dict=model.state_dict(), meta={}), path)
    return path


def runner(
    work,
    load_from,
    hooks,
    epochs=2,
    model=None,
    batch=4,
    resume=False,
    val=False,
    wrapper=None,
    compile=None,
    **kw,
):
    """A Runner that trains the toy."""
    loader = dict(
        batch_size=batch,
        num_workers=0,
        dataset=Points(),
        sampler=dict(type='DefaultSampler', shuffle=True),
    )
    cfg = dict(
        model=dict(dict(type='Toy'), **(model or {})),
        work_dir=str(work),
        train_dataloader=loader,
        train_cfg=dict(by_epoch=True, max_epochs=epochs, val_interval=1),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-2)),
        custom_hooks=hooks,
        load_from=None if load_from is None else str(load_from),
        resume=resume,
        default_scope='mmdet3d',
        randomness=dict(seed=1),
        log_level='WARNING',
        experiment_name=work.name,
    )
    if val:
        cfg.update(
            val_dataloader=dict(loader, sampler=dict(type='DefaultSampler', shuffle=False)),
            val_cfg=dict(),
            val_evaluator=Evaluator(Error()),
        )
    extra = {} if wrapper is None else dict(model_wrapper_cfg=wrapper)
    if compile is not None:
        extra['compile'] = compile
    cfg.update(kw)
    return Runner(**cfg, cfg=Config(dict(model=cfg['model'], **extra)))


QAT = dict(type='QATHook')
