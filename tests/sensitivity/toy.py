"""A small quantized detector of images: blobs to boxes, with random weights."""

import torch
from mmdet3d.registry import DATASETS, MODELS
from mmdet3d.structures import Det3DDataSample, LiDARInstance3DBoxes
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.structures import InstanceData
from torch import nn
from torch.utils.data import Dataset

import mmdet3d_quant as mq
from mmdet3d_quant.layers import QuantAdd, QuantConcat, QuantConv2d
from mmdet3d_quant.models.base import finish

BOXES = 12
#: How much each block adds.
SHARES = (0.5, 0.1, 2.0, 0.02)


class Blobs(Dataset):
    """Images; the labels are a box in the middle."""

    def __init__(self, count=12):
        generator = torch.Generator().manual_seed(3)
        self.images = torch.randn(count, 3, 24, 24, generator=generator)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        sample = Det3DDataSample()
        box = LiDARInstance3DBoxes(torch.tensor([[12.0, 12, 0, 1, 1, 1, 0]]))
        sample.eval_ann_info = dict(gt_bboxes_3d=box, gt_labels_3d=[0])
        return dict(inputs=self.images[index], data_samples=sample)


class Block(nn.Module):
    """Two convolutions and what they read, added."""

    def __init__(self, channels, share):
        super().__init__()
        self.share = share
        self.conv1 = QuantConv2d(channels, channels, 3, padding=1)
        self.conv2 = QuantConv2d(channels, channels, 3, padding=1)
        self.add = QuantAdd()

    def quant_ties(self):
        return [['conv1._input_quantizer', 'add._input_quantizer']]

    def forward(self, x):
        return self.add(x, self.share * self.conv2(self.conv1(x).relu_())).relu_()


class ToyBackbone(nn.Module):
    """Stem, blocks, and two branches that are joined."""

    def __init__(self, channels=12):
        super().__init__()
        self.stem = QuantConv2d(3, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.blocks = nn.Sequential(*(Block(channels, share) for share in SHARES))
        self.left = QuantConv2d(channels, 4, 1)
        self.right = QuantConv2d(channels, 8, 3, padding=1)
        self.join = QuantConcat()
        self.last = QuantConv2d(12, 8, 3, padding=1)

    def quant_ties(self):
        return [
            ['left._input_quantizer', 'right._input_quantizer'],
            ['join._input_quantizer', 'last._input_quantizer'],
        ]

    def forward(self, x):
        x = self.blocks(self.norm(self.stem(x)).relu_())
        return self.last(self.join([self.left(x), self.right(x).relu()]))


class ToyHead(nn.Module):
    """The highest values of two maps, as boxes."""

    def __init__(self, quantized=False):
        super().__init__()
        self.conv = (QuantConv2d if quantized else nn.Conv2d)(8, 2, 1)

    def forward(self, x):
        return self.conv(x.relu())


class ToyDetector(BaseModel):
    """Backbone and head."""

    def __init__(self, skip=(), quantized_head=False, init_cfg=None):
        super().__init__(init_cfg=init_cfg)
        self.backbone, self.bbox_head = ToyBackbone(), ToyHead(quantized_head)
        finish(self, skip)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        maps = self.bbox_head(self.backbone(torch.stack(list(inputs))))
        if mode == 'tensor':
            return maps
        for sample, scores in zip(data_samples, maps.sigmoid()):
            top, where = scores.flatten().topk(BOXES)
            label, y, x = where // 576, where % 576 // 24, where % 24
            zero, one = torch.zeros(BOXES), torch.ones(BOXES)
            boxes = torch.stack([x.float(), y.float(), zero, one, one, one, zero], 1)
            sample.pred_instances_3d = InstanceData(
                bboxes_3d=LiDARInstance3DBoxes(boxes), labels_3d=label, scores_3d=top
            )
        return data_samples


MODELS.register_module(module=ToyDetector, force=True)
DATASETS.register_module(name='ToyBlobs', module=Blobs, force=True)


def batch_of(frame, data=None):
    """A collated batch of one frame."""
    item = (data or Blobs())[frame]
    return dict(inputs=[item['inputs']], data_samples=[item['data_samples']])


def toy(bits=8, outlier='', calibrate=True, **kwargs):
    """A calibrated detector; with a layer whose range a huge value has spoilt."""
    torch.manual_seed(1)
    model = ToyDetector(**kwargs)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):  # channels and layers of unlike size
                layer.weight *= torch.rand(len(layer.weight), 1, 1, 1) * 2 + 0.2
        model.backbone.left.weight *= 0.3
    model.eval()
    for quantizer in mq.quantizers(model).values():
        quantizer.num_bits = bits
    if calibrate:
        mq.calibrate(model, [batch_of(i) for i in range(4)], 'max')
    if outlier:
        for name, quantizer in mq.quantizers(model).items():
            if name == f'{outlier}._input_quantizer':
                quantizer.amax = quantizer.amax * 100
    return model


def write(folder, count=12, **kwargs):
    """Writes a config of the toy and its checkpoint; returns their paths."""
    loader = dict(
        batch_size=2,
        num_workers=0,
        dataset=dict(type='ToyBlobs', count=count),
        sampler=dict(type='DefaultSampler', shuffle=False),
        collate_fn=dict(type='pseudo_collate'),
    )
    config, checkpoint = folder / 'toy.py', folder / 'int8.pth'
    imports = dict(imports=['tests.sensitivity.toy'], allow_failed_imports=False)
    Config(
        dict(
            default_scope='mmdet3d',
            custom_imports=imports,
            model=dict(type='ToyDetector'),
            calib_dataloader=loader,
        )
    ).dump(config)
    torch.save(dict(state_dict=toy(**kwargs).state_dict()), checkpoint)
    return config, checkpoint
