"""The page of a calibration against the tensors it is about."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch

from mmdet3d_quant import calibrate
from mmdet3d_quant.core.fake_quant import fake_quantize
from mmdet3d_quant.core.spec import QuantSpec
from mmdet3d_quant.report.calibration import ADVICE, write_ranges
from tests.calibration.nets import Branched, batches

ABOUT = dict(config='a<b>.py', versions=dict(torch='2.1.2'), score=float(1))


class Page(HTMLParser):
    """Rows of the table and everything that would be loaded from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.links, self.pictures, self._cell = [], [], 0, False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.links += [v for k, v in attrs if k in ('src', 'href') and not v.startswith('#')]
        self.pictures += tag == 'svg'
        if tag == 'tr':
            self.rows.append([])
        self._cell = tag == 'td' and dict(attrs).get('class') == 'name'

    def handle_data(self, data):
        if self._cell and data.strip():
            self.rows[-1].append(data.strip())
            self._cell = False


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """A calibration of a model one of whose layers sees an outlier, and its page."""
    data = batches()
    data[3][0, 0, 0, 0] = 4000.0
    result = calibrate(Branched(), data, ['max', 'c=percentile:50'])
    path = tmp_path_factory.mktemp('ranges') / 'int8.html'
    assert write_ranges(path, result, ABOUT) == path
    return data, result, path


def test_numbers_are_those_of_the_tensors(made):
    data, result, path = made
    facts = json.loads(path.with_suffix('.json').read_text())
    row = next(r for r in facts['ranges'] if r['name'] == 'b._input_quantizer')
    x = torch.cat(data).abs()
    wrong = fake_quantize(x, torch.tensor(row['amax']), QuantSpec()) - x
    expected = 10 * math.log10(float(x.square().sum() / wrong.square().sum()))
    assert row['sqnr'] == pytest.approx(expected, abs=0.3)
    assert row['largest'] == row['amax'] == 4000.0 and row['unsteady'] > 16
    for row in facts['ranges']:
        assert sum(row['histogram']['counts']) == row['num_elements'] and row['num_elements'] > 0
        width, bars = row['histogram']['bin_width'], len(row['histogram']['counts'])
        assert width * (bars - 1) <= row['largest'] < width * bars
    by_name = {r.name: r for r in result.ranges}
    assert {r['name'] for r in facts['ranges']} == set(by_name)
    assert all(r['amax'] == by_name[r['name']].amax for r in facts['ranges'])


def test_worst_first_with_a_picture_each_and_nothing_from_elsewhere(made):
    _, result, path = made
    page = Page(path.read_text(encoding='utf-8'))
    names = [row[0] for row in page.rows if row]
    expected = [r.name for r in sorted(result.ranges, key=lambda r: r.health.sqnr)]
    assert names == expected
    assert page.links == [] and page.pictures == len(names) + 2
    assert 'http' not in ''.join(page.links)


def test_what_is_odd_is_counted_and_explained(made):
    _, _, path = made
    facts, text = json.loads(path.with_suffix('.json').read_text()), path.read_text()
    assert facts['flags']['unsteady'] >= 2 and facts['flags']['clipped'] == 1
    assert all(ADVICE[flag].split(':')[0][:30] in text for flag in facts['flags'])
    assert 'a&lt;b&gt;.py' in text and 'a<b>' not in text


@pytest.mark.parametrize('count', [1, 3, 40])
def test_a_space_follows_a_full_stop(count, tmp_path):
    """Where ranges settled, where they did not, and where nothing tells."""
    data = [x * 2**i for i, x in enumerate(batches())] if count == 3 else batches() * count
    write_ranges(tmp_path / 'page.html', calibrate(Branched(), data[:count], 'max'), ABOUT)
    text = re.sub('<(style|script).*?</\\1>', '', (tmp_path / 'page.html').read_text(), flags=re.S)
    text = re.sub('<[^>]*>', '', text)
    assert 'dB. The ranges' in text or count == 1
    assert re.findall(r'\w+[.,;:](?:[A-Z]|[a-z]{3,} )\w*', text) == []


def test_numbers_without_meaning_become_null(tmp_path):
    result = calibrate(Branched(), [torch.ones(1, 3, 4, 4)], 'max')
    write_ranges(tmp_path / 'one.html', result, {})
    facts = json.loads((tmp_path / 'one.json').read_text())
    assert facts['looks'] == [dict(num_batches=1, median=None, high=None)]
    assert 'constant' in facts['flags']


def test_both_files_or_none(made, tmp_path):
    _, result, _ = made
    (tmp_path / 'x.json').mkdir()
    with pytest.raises(OSError, match='cannot write'):
        write_ranges(tmp_path / 'x.html', result, ABOUT)
    assert [p.name for p in tmp_path.iterdir()] == ['x.json']
