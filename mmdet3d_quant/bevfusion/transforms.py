"""Image augmentation that records the map from old pixels to new ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from mmcv.transforms import BaseTransform
from PIL import Image, ImageOps

from mmdet3d_quant.core.compat import strict_zip


@dataclass(frozen=True)
class _Augmentation:
    """Parameters of the augmentation of one image, in the order of its steps.

    Attributes:
        resize: Factor of both sides.
        size: Width and height after resizing, pixels.
        crop: Left, upper, right and lower edge, pixels of the resized image.
        flip: Whether to mirror left and right.
        rotate: Counter-clockwise angle about the centre, degrees.
    """

    resize: float
    size: tuple[int, int]
    crop: tuple[int, int, int, int]
    flip: bool
    rotate: float

    def apply(self, image: np.ndarray) -> np.ndarray:
        """Augments an image (H, W, 3) with values 0 to 255; float32."""
        result = Image.fromarray(image.astype(np.uint8)).resize(self.size).crop(self.crop)
        if self.flip:
            result = ImageOps.mirror(result)
        return np.asarray(result.rotate(self.rotate), dtype=np.float32)

    def matrix(self) -> np.ndarray:
        """Computes the map of pixels (column, row, 1), in a (4, 4) identity; float32."""
        left, upper, right, lower = self.crop
        move = np.diag([self.resize, self.resize, 1.0])
        move[:2, 2] = -left, -upper
        if self.flip:
            move = np.array([[-1, 0, right - left], [0, 1, 0], [0, 0, 1.0]]) @ move
        angle = self.rotate / 180 * np.pi
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        centre = np.array([right - left, lower - upper]) / 2
        full = np.eye(4)
        full[:2, :2] = turn @ move[:2, :2]
        full[:2, 3] = turn @ (move[:2, 2] - centre) + centre
        return full.astype(np.float32)


def _uniform(limits: Sequence[float]) -> float:
    """Draws a number between two limits."""
    low, high = limits
    return np.random.uniform(low, high)


class ImageAug3D(BaseTransform):
    """Resizes, crops, mirrors and turns every image; the 3D scene stays as it is.

    Args:
        final_dim: Height and width of the result, pixels.
        resize_lim: Least and greatest resize factor; their mean when testing.
        bot_pct_lim: Least and greatest share of the height cut off at the bottom; their mean
            when testing.
        rot_lim: Least and greatest angle, degrees; none when testing.
        rand_flip: Whether to mirror at random when training.
        is_train: Whether to draw at random.
    """

    def __init__(
        self,
        final_dim: Sequence[int],
        resize_lim: Sequence[float],
        bot_pct_lim: Sequence[float],
        rot_lim: Sequence[float],
        rand_flip: bool,
        is_train: bool,
    ) -> None:
        self.final_dim = final_dim
        self.resize_lim = resize_lim
        self.bot_pct_lim = bot_pct_lim
        self.rot_lim = rot_lim
        self.rand_flip = rand_flip
        self.is_train = is_train

    def _draw(self, shape: Sequence[int]) -> _Augmentation:
        """Chooses the augmentation of an image of height and width ``shape``."""
        height, width = self.final_dim
        train = self.is_train
        resize = _uniform(self.resize_lim) if train else float(np.mean(self.resize_lim))
        size = (int(shape[1] * resize), int(shape[0] * resize))
        bottom = _uniform(self.bot_pct_lim) if train else float(np.mean(self.bot_pct_lim))
        upper = int((1 - bottom) * size[1]) - height
        slack = max(0, size[0] - width)
        left = int(np.random.uniform(0, slack) if train else slack / 2)
        return _Augmentation(
            resize=resize,
            size=size,
            crop=(left, upper, left + width, upper + height),
            flip=bool(train and self.rand_flip and np.random.choice([0, 1])),
            rotate=_uniform(self.rot_lim) if train else 0,
        )

    def transform(self, results: dict) -> dict:
        """Augments the images.

        Args:
            results: Frame with ``img``, N arrays (H, W, 3) with values 0 to 255, and
                ``ori_shape``, their height and width.

        Returns:
            ``results`` with ``img`` replaced by float32 arrays of ``final_dim`` and with
            ``img_aug_matrix``, N (4, 4) float32 arrays that map old pixels to new ones.
        """
        drawn = [self._draw(results['ori_shape']) for _ in results['img']]
        pairs = strict_zip(drawn, results['img'])
        results['img'] = [augmentation.apply(image) for augmentation, image in pairs]
        results['img_aug_matrix'] = [augmentation.matrix() for augmentation in drawn]
        return results
