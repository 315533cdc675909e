"""Tie groups: exactly those that a camera branch needs, checked against what layers really read."""

import pytest
import torch
from mmdet3d.registry import MODELS
from torch import nn

from mmdet3d_quant import quantizers, set_mode, ties
from mmdet3d_quant.core.modes import keep_float
from mmdet3d_quant.core.ties import unequal_ties
from mmdet3d_quant.layers import QuantConcat, QuantConv2d


class Branch(nn.Module):
    """A camera branch under the detector's names."""

    def __init__(self, depth=50, width=16, **options):
        super().__init__()
        expansion = 4 if depth >= 50 else 1
        self.img_backbone = MODELS.build(
            dict(
                type='QuantResNet',
                depth=depth,
                base_channels=width,
                out_indices=(1, 2, 3),
                **options,
            )
        )
        self.img_neck = MODELS.build(
            dict(
                type='QuantGeneralizedLSSFPN',
                in_channels=[width * expansion * m for m in (2, 4, 8)],
                out_channels=32,
                num_outs=3,
            )
        )
        self.eval()

    def forward(self, x):
        return self.img_neck(self.img_backbone(x))


def resnet50_groups():
    """Written out from the description of the deployed graph."""
    b = 'img_backbone.layer'
    groups = []
    for stage, blocks in enumerate((3, 4, 6, 3), 1):
        for block in range(blocks):
            at = f'{b}{stage}.{block}'
            group = {f'{at}.conv1._input_quantizer'}
            if block:
                group.add(f'{at}.residual_quantizer')
            else:
                group.add(f'{at}.downsample.0._input_quantizer')
            if block == 0 and stage in (3, 4):
                group.add(f'img_neck.concats.{stage - 3}._input_quantizer')
                group.add(f'img_neck.lateral_convs.{stage - 3}.conv._input_quantizer')
            groups.append(group)
    return groups


def test_groups_of_the_resnet50_camera_branch():
    assert [set(g) for g in ties(Branch())] == resnet50_groups()


@pytest.mark.parametrize('depth', [18, 50])
def test_layers_that_read_one_tensor_share_a_group(depth):
    """Independent of the declarations: runs the branch and compares the tensors read."""
    branch = Branch(depth)
    readers = {}
    alive = []  # keeps every tensor, so that no id is used twice

    def note(name):
        def hook(module, args):
            alive.append(args[0])
            readers.setdefault(id(args[0]), set()).add(name)

        return hook

    for name, q in quantizers(branch).items():
        if not name.endswith('_weight_quantizer'):
            q.register_forward_pre_hook(note(name))
    with set_mode(branch, 'float'), torch.no_grad():
        branch(torch.randn(1, 3, 64, 64))
    group_of = {n: i for i, g in enumerate(ties(branch)) for n in g}
    shared = [names for names in readers.values() if len(names) > 1]
    assert len(shared) >= 8
    for names in shared:
        assert len({group_of.get(n, n) for n in names}) == 1, names


def test_backbone_without_declarations_only_means_fewer_groups():
    branch = Branch()
    branch.img_backbone = nn.Identity()
    assert [len(g) for g in ties(branch)] == [2, 2]


def test_last_stage_and_average_pool_have_no_reader_to_tie():
    branch = Branch(avg_down=True)
    (group,) = (g for g in ties(branch) if 'img_backbone.layer3.0.conv1._input_quantizer' in g)
    assert not any('downsample' in name for name in group)


def test_skipped_quantizers_leave_their_group():
    branch = Branch()
    keep_float(branch, 'img_backbone.layer1.1.conv1')
    assert not any('img_backbone.layer1.1.residual_quantizer' in g for g in ties(branch))


def test_second_and_its_fpn_share_what_both_read():
    model = nn.Module()
    model.pts_backbone = MODELS.build(
        dict(
            type='QuantSECOND',
            in_channels=8,
            out_channels=[8, 16],
            layer_nums=[1, 1],
            layer_strides=[1, 2],
        )
    )
    model.pts_neck = MODELS.build(
        dict(
            type='QuantSECONDFPN',
            in_channels=[8, 16],
            out_channels=[8, 8],
            upsample_strides=[1, 2],
        )
    )
    assert ties(model) == [
        ('pts_backbone.blocks.1.0._input_quantizer', 'pts_neck.deblocks.0.0._input_quantizer')
    ]


def test_overlapping_groups_unite_and_unknown_names_are_refused():
    class Chain(nn.Module):
        def __init__(self, groups):
            super().__init__()
            self.groups = groups
            for name in 'abcd':
                self.add_module(name, QuantConcat())

        def quant_ties(self):
            return [[f'{n}._input_quantizer' for n in group] for group in self.groups]

    assert ties(Chain(['ab', 'cd', 'bc'])) == [tuple(f'{n}._input_quantizer' for n in 'abcd')]
    with pytest.raises(ValueError, match='z._input_quantizer'):
        ties(Chain(['az']))


def test_unequal_ranges_are_found():
    class Pair(nn.Sequential):
        def quant_ties(self):
            return [['0._input_quantizer', '1._input_quantizer']]

    pair = Pair(QuantConv2d(2, 2, 1), QuantConv2d(2, 2, 1))
    pair[0]._input_quantizer.amax = 1.0
    assert unequal_ties(pair) == []
    pair[1]._input_quantizer.amax = 2.0
    assert len(unequal_ties(pair)) == 1
