"""The data is as hard for INT8 as it is meant to be: long tails, and colours that tell nothing."""

import cv2
import numpy as np
import pytest

from mmdet3d_quant.core.compat import strict_zip
from mmdet3d_quant.synthetic.kinds import CLASSES, KINDS
from mmdet3d_quant.synthetic.layout import LEAD
from mmdet3d_quant.synthetic.light import HOURS, make_light
from mmdet3d_quant.synthetic.record import Settings, generators, make_layout
from mmdet3d_quant.synthetic.solid import GLOWS

BLOCKS = 30


@pytest.fixture(scope='module')
def layouts():
    return [make_layout(Settings(), 'scene-0553', k) for k in range(BLOCKS)]


def test_counts(layouts):
    counts = [[sum(t.kind == name for t in b.things) for name in CLASSES] for b in layouts]
    total = np.sum(counts, axis=1)
    assert 20 <= total.mean() <= 35 and total.min() >= 12
    present = (np.array(counts) > 0).mean(axis=0)
    assert present.min() > 0.5, dict(strict_zip(CLASSES, present))


def test_things_are_apart_and_within_reach(layouts):
    for block in layouts:
        for thing in block.things:
            for time in (-LEAD, 0.0, 0.5):
                pose, ego = thing.at(time), block.ego(time)
                assert np.hypot(pose.x - ego.x, pose.y - ego.y) > 1.5
            assert not thing.labelled or np.hypot(thing.at(0.25).x, thing.at(0.25).y) < 36


def test_solids_fill_their_boxes(layouts):
    """Inside the box with room for noise; all of it but for the stride of who stands still."""
    for thing in layouts[0].things + layouts[1].things:
        width, length, height = thing.size
        room = np.array([length / 2, width / 2, height]) - [0.03, 0.03, 0.06]
        solid = thing.solid
        assert (solid.low >= [-room[0] - 1e-6, -room[1] - 1e-6, -1e-6]).all(), thing.kind
        assert (solid.high <= room + 1e-6).all(), thing.kind
        assert (solid.high > solid.low).all(), thing.kind
        if thing.labelled:
            span = solid.high.max(axis=0) - solid.low.min(axis=0)
            least = [0.95, 1.8, 0.9] if thing.kind == 'pedestrian' else [1.8, 1.8, 0.9]
            assert (span > room * least).all(), (thing.kind, span / room)


def test_colour_does_not_tell_the_class(layouts):
    """The share of the variance of main colours that lies between classes is that of chance."""
    colours = {name: [] for name in CLASSES}
    for block in layouts:
        for thing in block.things:
            if thing.labelled:
                solid = thing.solid
                sides = np.linalg.norm(solid.quads[:, 2] - solid.quads[:, 0], axis=1)
                bright = (solid.albedo.max(axis=1) > 0.08) & (solid.glow == GLOWS['none'])
                largest = np.argmax(sides * bright)
                colours[thing.kind].append(solid.albedo[largest])
    everything = np.concatenate([np.array(c) for c in colours.values()])
    between = sum(
        len(c) * (np.mean(c, axis=0) - everything.mean(axis=0)) ** 2 for c in colours.values()
    )
    share = between / ((everything - everything.mean(axis=0)) ** 2).sum(axis=0)
    assert (share < 0.06).all(), share


def test_intensities_have_a_long_tail(tiny_nuscenes):
    scans = (tiny_nuscenes / 'samples/LIDAR_TOP').iterdir()
    points = np.concatenate([np.fromfile(p, np.float32).reshape(-1, 5) for p in scans])
    assert points[:, 3].min() >= 0 and points[:, 3].max() == 255
    assert np.percentile(points[:, 3], 99.9) > 15 * np.median(points[:, 3])
    assert set(np.unique(points[:, 4])) <= set(range(32))


def test_pictures_are_dark_and_bright(tiny_nuscenes):
    levels = [cv2.imread(str(p), 0) for p in tiny_nuscenes.glob('samples/CAM_*/*.jpg')]
    means = [image.mean() for image in levels]
    assert len(means) == 24 and max(means) - min(means) > 40
    pixels = np.concatenate([image.ravel() for image in levels])
    assert np.percentile(pixels, 0.1) < 40 and np.percentile(pixels, 99.9) > 245


def test_hours():
    lights = [make_light(generators(Settings(), 'scene-0553', k)[1]) for k in range(200)]
    for hour, share in HOURS.items():
        assert abs(np.mean([light.hour == hour for light in lights]) - share) < 0.1


def test_chosen_hours():
    hours = ('day', 'dusk')
    lights = [make_light(generators(Settings(), 'scene-0553', k)[1], hours) for k in range(200)]
    for hour in hours:
        share = HOURS[hour] / sum(HOURS[h] for h in hours)
        assert abs(np.mean([light.hour == hour for light in lights]) - share) < 0.1


def test_kinds_are_the_detection_classes():
    assert len(KINDS) == 10 and all(kind.category for kind in KINDS.values())
