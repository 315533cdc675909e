"""mit-han-lab's layout of weights, written by hand."""

import re

import numpy as np
import torch


def to_mit_by_hand(state):
    """What mit-han-lab's model of these numbers would store; shares nothing with the package."""
    moves = [
        ('img_backbone', 'encoders.camera.backbone'),
        ('img_neck', 'encoders.camera.neck'),
        ('view_transform', 'encoders.camera.vtransform'),
        ('pts_middle_encoder', 'encoders.lidar.backbone'),
        ('fusion_layer', 'fuser'),
        ('pts_backbone', 'decoder.backbone'),
        ('pts_neck', 'decoder.neck'),
        ('bbox_head', 'heads.object'),
        ('.self_attn.attn.', '.self_attn.'),
        ('.cross_attn.attn.', '.multihead_attn.'),
        ('.ffn.layers.0.0.', '.linear1.'),
        ('.ffn.layers.1.', '.linear2.'),
        ('.norms.0.', '.norm1.'),
        ('.norms.1.', '.norm2.'),
        ('.norms.2.', '.norm3.'),
    ]
    out = {}
    for name, value in state.items():
        for ours, theirs in moves:
            name = name.replace(ours, theirs)
        value = value.clone()
        if value.dim() == 5:  # out, x, y, z, in -> x, y, z, in, out
            value = torch.from_numpy(np.moveaxis(value.numpy(), 0, -1).copy())
        if re.search(r'prediction_heads\.\d\.dim\.1\.', name):  # l, w, h -> w, l, h
            value = torch.stack([value[1], value[0], value[2]])
        if re.search(r'prediction_heads\.\d\.rot\.1\.', name):  # sin, cos of -pi/2 - yaw
            value = torch.stack([-value[1], -value[0]])
        out[name] = value
    return out


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)
