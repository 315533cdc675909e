"""The page: well-formed, complete, self-contained, and there as a whole or not at all."""

import base64
import json
import re
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

from mmdet3d_quant.core.compat import removeprefix
from mmdet3d_quant.report import render, write_report
from mmdet3d_quant.report.page import verdict

VOID = {'meta', 'img', 'br'}
PNG = b'\x89PNG\r\n'


class Page(HTMLParser):
    """Elements of a page; fails where they are not nested well."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tables, self.images, self.attributes, self.text = [], {}, [], [], ''
        self.feed(text)
        self.close()
        assert self.open == [], f'{self.open} are not closed'

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.attributes += [(tag, *item) for item in attrs.items()]
        if tag == 'img':
            self.images.append(attrs)
        if tag == 'table':
            self.table = self.tables.setdefault(attrs['id'], [])
        if tag == 'tr':
            self.table.append([])
        if tag in ('td', 'th'):
            self.table[-1].append('')
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f'</{tag}> closes something else'

    def handle_data(self, data):
        if 'style' not in self.open:
            self.text += data
        if {'td', 'th'} & set(self.open):
            self.table[-1][-1] += ' '.join(data.split())


def scores(shift):
    ap = dict(car=0.81234 + shift, bus=0.4 - shift)
    errors = dict(mATE=0.3456 + shift, mASE=0.2, mAOE=None, mAVE=1.25, mAAE=0.1)
    return dict(mAP=0.61234 + shift, NDS=0.5 - shift, **errors, ap=ap)


@pytest.fixture
def facts():
    return dict(
        title='A title',
        scores={'float': scores(0.0), 'INT8': scores(-0.0123)},
        data=dict(frames=80, scenery=40, boxes=dict(car=321, bus=45)),
        differences={'INT8': dict(difference=-0.0123, low=-0.02, high=-0.001, scenery=40)},
        latency={
            'a.onnx': dict(float=0.1234, int8=0.0411),
            'b.onnx': dict(float=0.0100, int8=0.0200),
        },
        engine='An engine',
        int8_convolutions={'a.onnx': [63, 64], 'b.onnx': [0, 3]},
        sizes={'a.onnx': dict(float=7_180_000, int8=7_390_000)},
        weights=dict(float=4_560_000, int8=1_140_000),
        calibration=dict(
            method='mse',
            num_batches=17,
            loader='calib_dataloader',
            activation_quantizers=92,
            weight_quantizers=74,
            groups=[['one', 'two']],
            kept_float={'conv1': 'skipped by name'},
            coverage=dict(text='73 of 74 layers quantized', lines=['float: conv1: too wide']),
        ),
        seconds={'first step': 12.4},
        provenance=dict(
            config='configs/some.py',
            checkpoint=dict(name='some.pth', sha256='0123abcd'),
            command='python tools/demo.py',
            versions=dict(torch='2.1.2'),
            machine=dict(
                processor='A processor', cores=2, int8_instructions=[], system='S', python='3.11.9'
            ),
        ),
    )


def test_every_number_is_in_its_place(facts):
    page = Page(render(facts))
    rows = {row[0]: row[1:] for row in page.tables['scores']}
    assert rows['mAP, %'] == ['61.23', '60.00', '−1.23']
    assert rows['NDS, %'] == ['50.00', '51.23', '+1.23']
    assert rows['mATE'] == ['0.3456', '0.3333', '-0.0123']
    assert rows['mAOE'] == ['–', '–', '–']
    assert rows['mAVE'] == ['1.2500', '1.2500', '+0.0000']
    rows = {row[0]: row[1:] for row in page.tables['ap']}
    assert rows['car'] == ['321', '81.23', '80.00', '−1.23']
    assert rows['bus'] == ['45', '40.00', '41.23', '+1.23']
    rows = {row[0]: row[1:] for row in page.tables['latency']}
    assert rows['a.onnx'] == ['123.4', '41.1', '3.00x', '63 of 64']
    assert rows['b.onnx'] == ['10.0', '20.0', '0.50x', '0 of 3']
    assert rows['all files'] == ['133.4', '61.1', '2.18x', '']
    assert [row[1:] for row in page.tables['sizes'][1:]] == [['7.18', '7.39'], ['4.56', '1.14']]
    calibration = ' '.join(sum(page.tables['calibration'], []))
    for told in (
        'mse',
        '17 batches',
        '92 of activations',
        '74 of weights',
        'two',
        'by name',
        '73 of 74',
    ):
        assert told in calibration
    source = ' '.join(sum(page.tables['provenance'], []))
    for told in ('configs/some.py', 'some.pth', '0123abcd', 'tools/demo.py', 'torch 2.1.2'):
        assert told in source
    for told in ('A processor', '2 cores', '3.11.9', 'first step: 12 s'):
        assert told in source
    assert '80 frames of 40 sceneries' in page.text and '366 labelled' in page.text
    assert 'A title' in page.text and 'An engine' in page.text
    assert verdict('INT8', facts['differences']['INT8']) in page.text


def test_a_space_follows_a_full_stop(facts):
    assert re.findall(r'[a-z0-9%)]+[.,;](?:[A-Z]|[a-z]{3,} )\w*', Page(render(facts)).text) == []


def test_columns_are_headed_by_their_model(facts):
    page = Page(render(facts))
    assert page.tables['scores'][0] == ['', 'float', 'INT8', 'INT8minus float']
    assert page.tables['ap'][0] == ['class', 'objects', 'float', 'INT8', 'INT8minus float']


@pytest.mark.parametrize(
    'fact, table',
    [
        ('scores', 'scores'),
        ('latency', 'latency'),
        ('sizes', 'sizes'),
        ('calibration', 'calibration'),
        ('provenance', 'provenance'),
    ],
)
def test_what_is_missing_is_left_out(facts, fact, table):
    everything = set(Page(render(facts)).tables)
    del facts[fact]
    assert everything - set(Page(render(facts)).tables) == {table} | (
        {'ap'} if fact == 'scores' else set()
    )


def test_details_that_are_missing_are_left_out(facts):
    for name in ('data', 'differences', 'engine', 'int8_convolutions', 'weights', 'seconds'):
        del facts[name]
    page = Page(render(facts))
    assert page.tables['ap'][1] == ['car', '81.23', '80.00', '−1.23']
    assert page.tables['latency'][1] == ['a.onnx', '123.4', '41.1', '3.00x']
    assert len(page.tables['sizes']) == 2 and 'labelled' not in page.text
    assert 'first step' not in page.text and 'luck' not in page.text
    only_title = Page(render(dict(title='Nothing else')))
    assert only_title.tables == {} and only_title.text.split() == ['Nothing', 'else'] * 2


def test_names_are_escaped_everywhere(facts):
    evil = '<script>alert("1")</script>&\''
    text = json.dumps(facts).replace('A title', 'T')
    for word in ('INT8"', 'a.onnx"', 'some.pth', 'one', 'skipped by name', 'T"', 'An engine'):
        quote = '"' if word.endswith('"') else ''
        text = text.replace(word, json.dumps(evil + word.strip('"'))[1:-1] + quote)
    told = json.loads(text)
    html = render(told, {'frame_1': PNG}, {'frame_1': evil})
    assert '<script' not in html
    page = Page(html)
    assert page.text.count(evil) > 10
    assert page.images[-1]['alt'] == evil


def test_the_page_needs_nothing_else(facts):
    html = render(facts, {'ap': PNG, 'frame_1': PNG + b'1'}, {'frame_1': 'a caption'})
    page = Page(html)
    assert len(page.images) == 2 and 'a caption' in page.text
    kept = [base64.b64decode(removeprefix(i['src'], 'data:image/png;base64,')) for i in page.images]
    assert kept == [PNG, PNG + b'1']
    for tag, name, value in page.attributes:
        assert name not in ('href', 'action', 'srcset') and tag not in ('link', 'script', 'iframe')
        assert name != 'src' or value.startswith('data:')
    style = re.search('<style>(.*)</style>', html, re.S)[1]
    assert 'url(' not in style and '@import' not in style and '//' not in style


def verdict_of(low, high, scenery=40):
    found = dict(difference=(low + high) / 2, low=low, high=high, scenery=scenery)
    return verdict('INT8', found)


def test_the_verdict_says_what_the_interval_does():
    assert 'changes by −1.00 points' in verdict_of(-0.02, 0.0 - 1e-9)
    assert 'all below zero' in verdict_of(-0.02, -0.001)
    assert 'between +0.10 and +2.00' in verdict_of(0.001, 0.02)
    assert 'all above zero' in verdict_of(0.001, 0.02)
    assert 'may be luck' in verdict_of(-0.01, 0.01) and 'may be luck' in verdict_of(0.0, 0.0)
    few = verdict_of(-0.02, -0.01, scenery=4)
    assert '4 sceneries are too few' in few and 'between' not in few


def picture():
    figure = Figure(figsize=(1, 1))
    figure.subplots().plot([0, 1])
    return figure


class Broken(Figure):
    def savefig(self, *args, **kwargs):
        raise OSError('the picture failed')


def test_the_folder_holds_page_numbers_and_pictures(facts, tmp_path):
    path = write_report(tmp_path / 'out', facts, {'first': picture(), 'second': picture()})
    names = {file.name for file in path.parent.iterdir()}
    assert names == {'report.html', 'report.json', 'ap.png', 'frame_1.png', 'frame_2.png'}
    assert json.loads((tmp_path / 'out/report.json').read_text()) == facts
    page = Page(path.read_text(encoding='utf-8'))
    images = [base64.b64decode(image['src'].partition(',')[2]) for image in page.images]
    files = [path.with_name(f'{name}.png').read_bytes() for name in ('ap', 'frame_1', 'frame_2')]
    assert images == files
    assert [image['alt'] for image in page.images[1:]] == ['first', 'second']


def test_a_picture_that_fails_leaves_what_was_there(facts, tmp_path):
    del facts['scores']  # and its picture
    pictures = {'good': picture(), 'bad': Broken()}
    with pytest.raises(OSError, match='picture failed'):
        write_report(tmp_path, facts, pictures)
    assert list(tmp_path.iterdir()) == []
    write_report(tmp_path, facts, {'good': picture()})
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(OSError, match='picture failed'):
        write_report(tmp_path, dict(facts, title='Other'), pictures)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_numbers_that_json_lacks_are_refused_and_nothing_is_written(facts, tmp_path):
    del facts['scores']  # and its picture
    facts['seconds']['never'] = float('nan')
    with pytest.raises(ValueError, match='JSON'):
        write_report(tmp_path, facts)
    assert list(tmp_path.iterdir()) == []


def test_pictures_of_an_earlier_report_do_not_stay(facts, tmp_path):
    del facts['scores']  # and its picture
    write_report(tmp_path, facts, {'1': picture(), '2': picture()})
    (tmp_path / 'notes.png').write_bytes(b'mine')
    write_report(tmp_path, facts, {'1': picture()})
    assert not (tmp_path / 'frame_2.png').exists() and (tmp_path / 'frame_1.png').exists()
    assert (tmp_path / 'notes.png').exists()
