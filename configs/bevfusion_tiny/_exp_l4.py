_base_=['./bevfusion_tiny_lidar-cam_qat_synthetic.py']
custom_hooks=[dict(type='QATHook',freeze_bn=0),dict(type='DistillHook',checkpoint='x',modules={'pts_neck': 1.0, 'bbox_head.heatmap_head': 1.0})]
