"""Every backbone and neck of mmdet and mmdet3d, small: config, and arguments to run it on."""

import torch

from tests.models.zoo import HRNET, SWIN, image, pyramid

C = [4, 8, 16]
C4 = [4, 8, 16, 32]
LEVELS = pyramid(*C)
LEVELS4 = pyramid(*C4, size=64)
BEV = torch.randn(1, 4, 16, 16, 8)
NORM = dict(norm_cfg=dict(type='BN'))

#: Arguments by type, and what the forward takes.
MODULES = {
    'mmdet.BFP': (dict(in_channels=8, num_levels=3, refine_type='conv'), pyramid(8, 8, 8)),
    'mmdet.CSPDarknet': (dict(deepen_factor=0.34, widen_factor=0.125), image()),
    'mmdet.CSPNeXt': (dict(deepen_factor=0.34, widen_factor=0.125), image()),
    'mmdet.CSPNeXtPAFPN': (dict(in_channels=[8, 16, 32], out_channels=8, num_csp_blocks=1),
                           pyramid(8, 16, 32)),
    'mmdet.CTResNetNeck': (dict(in_channels=8, num_deconv_filters=(8, 4),
                                num_deconv_kernels=(4, 4), use_dcn=False), [image(8, 16)]),
    'mmdet.ChannelMapper': (dict(in_channels=C, out_channels=8), LEVELS),
    'mmdet.Darknet': (dict(), image()),
    'mmdet.DilatedEncoder': (dict(in_channels=8, out_channels=8, block_mid_channels=4,
                                  num_residual_blocks=2, block_dilations=[1, 2]),
                             [image(8, 16)]),
    'mmdet.DyHead': (dict(in_channels=16, out_channels=16, num_blocks=1), pyramid(16, 16, 16)),
    'mmdet.EfficientNet': (dict(arch='b0', out_indices=(2, 3)), image()),
    'mmdet.FPG': (dict(in_channels=C4, out_channels=8, inter_channels=8, num_outs=4,
                       stack_times=1, paths=['bu'],
                       same_down_trans=dict(type='conv', kernel_size=3, stride=2, padding=1),
                       same_up_trans=dict(type='conv', kernel_size=3, stride=2, padding=1),
                       across_lateral_trans=dict(type='conv', kernel_size=1),
                       across_down_trans=dict(type='interpolation_conv', kernel_size=3),
                       across_up_trans=None, across_skip_trans=dict(type='conv', kernel_size=1),
                       output_trans=dict(type='last_conv', kernel_size=3),
                       skip_inds=[(0,), (), (), ()]), LEVELS4),
    'mmdet.FPN': (dict(in_channels=C, out_channels=8, num_outs=4), LEVELS),
    'mmdet.FPN_DropBlock': (dict(in_channels=C, out_channels=8, num_outs=3,
                                 plugin=dict(type='mmdet.DropBlock', drop_prob=0.3,
                                             block_size=3, warmup_iters=0)), LEVELS),
    'mmdet.HRFPN': (dict(in_channels=C, out_channels=8), LEVELS),
    'mmdet.HRNet': ({k: v for k, v in HRNET.items() if k != 'type'}, image()),
    'mmdet.HourglassNet': (dict(downsample_times=2, num_stacks=1, stage_channels=(16, 16, 24),
                                stage_blocks=(1, 1, 1), feat_channel=16), image()),
    'mmdet.MobileNetV2': (dict(widen_factor=0.25), image()),
    'mmdet.NASFCOS_FPN': (dict(in_channels=C4, out_channels=8, num_outs=4), LEVELS4),
    'mmdet.NASFPN': (dict(in_channels=C, out_channels=8, num_outs=5, stack_times=1), LEVELS),
    'mmdet.PAFPN': (dict(in_channels=C, out_channels=8, num_outs=3), LEVELS),
    'mmdet.PyramidVisionTransformer': (dict(embed_dims=16, num_layers=[1, 1, 1, 1],
                                            num_heads=[1, 2, 4, 8]), image(size=224)),
    'mmdet.PyramidVisionTransformerV2': (dict(embed_dims=16, num_layers=[1, 1, 1, 1],
                                              num_heads=[1, 2, 4, 8]), image()),
    'mmdet.RegNet': (dict(arch='regnetx_400mf'), image()),
    'mmdet.Res2Net': (dict(depth=50, base_channels=16, scales=2, base_width=8), image()),
    'mmdet.ResNeSt': (dict(depth=50, base_channels=8, stem_channels=8), image()),
    'mmdet.ResNeXt': (dict(depth=50, groups=2, base_width=4, base_channels=8), image()),
    'mmdet.ResNet': (dict(depth=50, base_channels=4), image()),
    'mmdet.ResNetV1d': (dict(depth=50, base_channels=4, stem_channels=4), image()),
    'mmdet.SSDNeck': (dict(in_channels=[8, 16], out_channels=[8, 16, 8], level_strides=[2],
                           level_paddings=[1]), pyramid(8, 16)),
    'mmdet.SSDVGG': (dict(depth=11, with_last_pool=False, ceil_mode=True), image()),
    'mmdet.SSH': (dict(num_scales=2, in_channels=[8, 8], out_channels=[8, 8]), pyramid(8, 8)),
    'mmdet.SwinTransformer': ({k: v for k, v in SWIN.items() if k != 'type'}, image()),
    'mmdet.TridentResNet': (dict(depth=50, base_channels=4, num_branch=3, test_branch_idx=1,
                                 trident_dilations=(1, 2, 3), strides=(1, 2, 2),
                                 dilations=(1, 1, 1), num_stages=3, out_indices=(2,)), image()),
    'mmdet.YOLOV3Neck': (dict(num_scales=2, in_channels=[16, 8], out_channels=[8, 4]),
                         pyramid(8, 16)),
    'mmdet.YOLOXPAFPN': (dict(in_channels=[8, 16, 32], out_channels=8, num_csp_blocks=1),
                         pyramid(8, 16, 32)),
    'mmdet3d.DLANet': (dict(depth=34, in_channels=3, **NORM), image()),
    'mmdet3d.DLANeck': (dict(in_channels=C, start_level=0, end_level=3, use_dcn=False,
                             norm_cfg=dict(type='GN', num_groups=2)), LEVELS),
    'mmdet3d.IndoorImVoxelNeck': (dict(in_channels=4, out_channels=4, n_blocks=[1, 1]), BEV),
    'mmdet3d.OutdoorImVoxelNeck': (dict(in_channels=4, out_channels=8),
                                   torch.randn(1, 4, 16, 16, 12)),
    'mmdet3d.NoStemRegNet': (dict(arch='regnetx_400mf'), image(32)),
    'mmdet3d.SECOND': (dict(in_channels=8, out_channels=[8, 16], layer_nums=[1, 1],
                            layer_strides=[1, 2]), image(8, 16)),
    'mmdet3d.SECONDFPN': (dict(in_channels=[8, 16], out_channels=[8, 8],
                               upsample_strides=[1, 2]), pyramid(8, 16)),
}  # fmt: skip

WS = dict(conv_cfg=dict(type='ConvAWS'), output_img=True)
SPARSE = dict(in_channels=4, sparse_shape=[41, 16, 16])
#: Types that are refused: arguments, and the reason.
REFUSED = {
    'mmdet.DetectoRS_ResNeXt': (dict(depth=50, groups=2, base_channels=4, **WS), 'standardises'),
    'mmdet.DetectoRS_ResNet': (dict(depth=50, base_channels=4, **WS), 'standardises'),
    'mmdet.FPN_CARAFE': (dict(in_channels=C, out_channels=8, num_outs=3), 'cannot be run'),
    'mmdet.RFP': (dict(in_channels=C4, out_channels=8, num_outs=4, rfp_steps=2,
                       aspp_out_channels=4,
                       rfp_backbone=dict(type='mmdet.DetectoRS_ResNet', depth=50,
                                         base_channels=1, rfp_inplanes=8, output_img=True,
                                         conv_cfg=dict(type='ConvAWS'))), 'cannot be run'),
    'mmdet3d.DGCNNBackbone': (dict(in_channels=9, num_samples=(4, 4, 4),
                                   gf_channels=((8, 8), (8, 8), (8,))), 'cannot be run'),
    'mmdet3d.MultiBackbone': (dict(num_streams=2, backbones=dict(
        type='PointNet2SASSG', in_channels=3, fp_channels=((256, 256), (256, 256)))),
                              'cannot be run'),
    'mmdet3d.PointNet2SAMSG': (dict(in_channels=4, num_points=(64, 32, (16, 16)),
                                    aggregation_channels=(None,) * 3), 'cannot be run'),
    'mmdet3d.PointNet2SASSG': (dict(in_channels=3), 'cannot be run'),
    'mmdet3d.PointNetFPNeck': (dict(fp_channels=((8, 8),)), 'cannot be run'),
    'mmdet3d.PointPillarsScatter': (dict(in_channels=4, output_shape=[4, 4]), 'no layers'),
    'mmdet3d.SparseEncoder': (SPARSE, 'QuantSparseEncoder'),
    'mmdet3d.SparseEncoderSASSD': (SPARSE, 'cannot be run'),
    'mmdet3d.SparseUNet': (SPARSE, 'sparse convolutions'),
    'mmdet3d.VoxelSetAbstraction': (
        dict(num_keypoints=4, fused_out_channel=8, voxel_size=[1, 1, 1],
             point_cloud_range=[0, 0, 0, 4, 4, 4], bev_feat_channel=4),
        'cannot be run',
    ),
}  # fmt: skip
#: Types whose float form needs a package that is not installed.
WITHOUT = {'mmdet3d.Asymm3DSpconv', 'mmdet3d.MinkResNet'}
