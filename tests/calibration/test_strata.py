"""The report by distance against voxels that are sorted by hand."""

import json
import math

import pytest
import torch
from spconv.pytorch import SparseConvTensor

import mmdet3d_quant as mq
from mmdet3d_quant.calibration.strata import bands_of, by_distance
from mmdet3d_quant.report.calibration import write_ranges
from tests.calibration.nets import Branched, batches
from tests.models.small import KINDS, build, cloud


class Sites:
    """A sparse tensor without values."""

    def __init__(self, indices, shape):
        self.indices, self.spatial_shape = torch.tensor(indices), shape


@pytest.mark.parametrize('height_axis', [0, 2])
def test_bands_are_thirds_of_the_way_to_the_edge(height_axis):
    """Of a grid of 60 x 30: a cell is 1/30 of the way along x, 1/15 along y."""
    found = [
        (30, 15, 0),  # the middle
        (39, 15, 0),  # 9.5 / 30
        (40, 15, 1),  # 10.5 / 30
        (49, 15, 1),
        (50, 15, 2),
        (59, 29, 2),  # the corner
        (30, 20, 1),  # 5.5 / 15
        (10, 15, 1),  # -19.5 / 30
        (0, 15, 2),
    ]
    rows = [(1, 7, y, x) if height_axis == 0 else (1, x, y, 7) for x, y, _ in found]
    sites = Sites(rows, [9, 30, 60] if height_axis == 0 else [60, 30, 9])
    assert bands_of(sites, height_axis).tolist() == [band for *_, band in found]


def test_a_sensor_at_the_edge():
    """As KITTI's, whose grid begins at x = 0."""
    sites = Sites([(0, x, 3, 5) for x in (0, 19, 20, 39, 40, 59)], [60, 7, 9])
    assert bands_of(sites, 2, (0.0, 0.5)).tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize('kind', KINDS)
def test_numbers_are_those_of_the_voxels(kind):
    _, model = build(kind)
    mq.calibrate(model, [cloud(kind)], 'percentile:99')
    feats, coords, batch = cloud(kind, seed=5)
    height_axis = KINDS[kind][0].height_axis
    strata = by_distance(model, (feats, coords, batch))
    names = [n for n in mq.quantizers(model) if n.endswith('0._input_quantizer') or 'conv' in n]
    names = [n for n in names if n.endswith('_input_quantizer') and '.add.' not in n]
    assert [s.name for s in strata] == [n for n in names if not n.startswith('conv_input')]
    assert all(q.mode == 'quant' for n, q in mq.quantizers(model).items() if 'input.0' not in n)

    with mq.set_mode(model, 'float'), torch.no_grad():  # what the first block reads
        x = model.conv_input(SparseConvTensor(feats, coords.int(), model.sparse_shape, batch))
    first = strata[0]
    band = bands_of(Sites(coords.tolist(), model.sparse_shape), height_axis)
    step = first.amax / 127
    for i, found in enumerate(first.bands):
        values = x.features[band == i]
        wrong = (values / step).round().clamp(-128, 127) * step - values
        assert found.num_voxels == len(values) > 20
        assert found.clipped == pytest.approx((values.abs() > first.amax).float().mean().item())
        power = values.double().square().sum() / wrong.double().square().sum()
        assert found.sqnr == pytest.approx(10 * math.log10(power), abs=1e-3)
    assert sum(b.clipped > 0 for s in strata for b in s.bands) > len(strata)


def test_dense_models_have_none():
    model = Branched()
    mq.calibrate(model, batches())
    assert by_distance(model, batches()[0]) == []


def test_bands_without_voxels_become_null(tmp_path):
    _, model = build()
    result = mq.calibrate(model, [cloud()])
    feats, coords, _ = cloud()
    near = (coords[:, 1] - 16).abs() + (coords[:, 2] - 12).abs() < 4
    strata = by_distance(model, (feats[near], coords[near], 2))
    write_ranges(tmp_path / 'r.html', result, {}, strata)
    facts = json.loads((tmp_path / 'r.json').read_text())
    assert [s['name'] for s in facts['strata']] == [s.name for s in strata]
    far = facts['strata'][0]['bands'][2]
    assert far == dict(band='far', num_voxels=0, clipped=None, sqnr=None)
    assert facts['strata'][0]['bands'][0]['sqnr'] > 20
    text = (tmp_path / 'r.html').read_text()
    assert text.count('Near and far') == 1 and 'SQNR' in text
