"""Box coder, image augmentation and loading, each against an independent calculation."""

import math

import numpy as np
import pytest
import torch

from mmdet3d_quant.bevfusion import BEVLoadMultiViewImageFromFiles, ImageAug3D, TransFusionBBoxCoder
from mmdet3d_quant.data.samples import CAMERAS, make_frame

CODER = dict(pc_range=[-54.0, -54.0], out_size_factor=8, voxel_size=[0.075, 0.075], code_size=10)


def test_box_coder_round_trip_and_filter():
    coder = TransFusionBBoxCoder(
        **CODER, post_center_range=[-61.2, -61.2, -10.0, 61.2, 61.2, 10.0], score_threshold=0.1
    )
    boxes = torch.tensor(
        [
            [10.0, -20.0, -1.0, 4.0, 2.0, 1.5, 0.7, 1.0, 2.0],
            [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, -3.0, 0.0, 0.0],
            [99.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0],
        ]
    )
    code = coder.encode(boxes).T[None]
    scores = torch.tensor([[[0.9, 0.05, 0.9], [0.2, 0.01, 0.3]]])
    parts = dict(
        heatmap=scores,
        center=code[:, :2],
        height=code[:, 2:3],
        dim=code[:, 3:6],
        rot=code[:, 6:8],
        vel=code[:, 8:],
    )
    (everything,) = coder.decode(**parts)
    assert torch.allclose(everything['bboxes'], boxes, atol=1e-4)
    (kept,) = coder.decode(**parts, filter=True)  # the second is unlikely, the third far away
    assert torch.allclose(kept['bboxes'], boxes[:1], atol=1e-4) and kept['labels'].tolist() == [0]


@pytest.mark.parametrize('is_train', [False, True])
def test_augmentation_matrix_follows_a_spot(is_train):
    """A bright spot in the image lands where the matrix says."""
    np.random.seed(3)
    spot = (700, 400)  # column, row
    image = np.zeros((900, 1600, 3), np.float32)
    image[spot[1] - 6 : spot[1] + 7, spot[0] - 6 : spot[0] + 7] = 255
    augment = ImageAug3D(
        final_dim=[256, 704],
        resize_lim=[0.38, 0.55] if is_train else [0.48, 0.48],
        bot_pct_lim=[0.0, 0.0],
        rot_lim=[-5.4, 5.4],
        rand_flip=True,
        is_train=is_train,
    )
    moved = 0
    for _ in range(8):
        out = augment.transform(dict(img=[image.copy()], ori_shape=(900, 1600)))
        (result,), (matrix,) = out['img'], out['img_aug_matrix']
        assert result.shape == (256, 704, 3) and result.dtype == np.float32
        expected = np.asarray(matrix)[:2, :2] @ spot + np.asarray(matrix)[:2, 3]
        rows, cols = np.nonzero(result[..., 0] > 100)
        if len(rows) == 0:
            continue  # cropped away
        assert math.dist(expected, (cols.mean(), rows.mean())) < 1.5
        moved += 1
    assert moved


def test_loading_gives_matrices_that_invert_each_other(tmp_path):
    folder = make_frame(tmp_path)
    import pickle

    info = pickle.loads((folder / 'frame.pkl').read_bytes())['data_list'][0]
    for camera in info['images'].values():
        camera['img_path'] = str(folder / camera['img_path'])
    load = BEVLoadMultiViewImageFromFiles(to_float32=True, color_type='color')
    out = load.transform(dict(images=info['images']))
    assert len(out['img']) == len(CAMERAS) and out['img'][0].shape == (900, 1600, 3)
    for i, camera in enumerate(info['images'].values()):
        lidar2cam = np.array(camera['lidar2cam'])
        assert np.allclose(out['cam2lidar'][i] @ lidar2cam, np.eye(4), atol=1e-5)
        point = np.array([1.0, 2.0, 0.5, 1.0])
        pixel = np.array(camera['cam2img']) @ (lidar2cam @ point)[:3]
        assert np.allclose((out['lidar2img'][i] @ point)[:3], pixel, atol=1e-3)


def test_generated_frames_are_reproducible(tmp_path):
    a, b, c = (make_frame(tmp_path / n, seed) for n, seed in (('a', 0), ('b', 0), ('c', 1)))
    for file in a.iterdir():
        assert (b / file.name).read_bytes() == file.read_bytes()
    assert (c / 'LIDAR_TOP.bin').read_bytes() != (a / 'LIDAR_TOP.bin').read_bytes()
