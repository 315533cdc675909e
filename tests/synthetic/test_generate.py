"""The same seed gives the same bytes; nonsense is refused before anything is written."""

import hashlib
import importlib
import json
import sys
from pathlib import Path

import pytest

from mmdet3d_quant.synthetic.generate import MARK, make_synthetic_nuscenes
from mmdet3d_quant.synthetic.infos import ConverterError, make_infos
from mmdet3d_quant.synthetic.record import Settings

ROOT = Path(__file__).resolve().parents[2]
SMALL = Settings(width=160, sweeps=1)


def digests(root):
    """Hashes of the recordings, by path."""
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for folder in ('samples', 'sweeps')
        for p in sorted((root / folder).rglob('*.*'))
    }


def make(root, scenes=('scene-0061', 'scene-0916'), samples=4, settings=SMALL, **options):
    options = dict(dict(workers=1, infos=False), **options)
    return make_synthetic_nuscenes(root, scenes, samples, settings=settings, **options)


@pytest.fixture(scope='module')
def four(tmp_path_factory):
    return make(tmp_path_factory.mktemp('four') / 'data')


def test_workers_do_not_matter(four, tmp_path):
    again = make(tmp_path / 'data', workers=2)
    assert digests(four) == digests(again)
    for name in ('sample_annotation', 'sample_data', 'ego_pose', 'scene'):
        table = f'v1.0-mini/{name}.json'
        assert (four / table).read_bytes() == (again / table).read_bytes()


def test_fewer_are_a_part_of_more(four, tmp_path):
    part = make(tmp_path / 'data', scenes=['scene-0916'], samples=2)
    whole, part = digests(four), digests(part)
    assert len(part) == 2 * (6 + 2) and part.items() <= whole.items()


def test_another_seed_gives_others(four, tmp_path):
    other = make(tmp_path / 'data', settings=SMALL._replace(seed=1))
    assert not set(digests(four).values()) & set(digests(other).values())


def test_progress_and_mark(tmp_path):
    seen = []
    out = make(tmp_path / 'data', samples=2, progress=lambda *a: seen.append(a))
    assert seen == [(2, 4), (4, 4)]
    mark = json.loads((out / MARK).read_text())
    assert mark['samples'] == {'scene-0061': 2, 'scene-0916': 2} and mark['width'] == 160


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(samples=0), 'positive multiple of block'),
        (dict(samples=3), 'positive multiple of block'),
        (dict(val_samples=0), 'positive multiple of block'),
        (dict(val_samples=-2), 'positive multiple of block'),
        (dict(scenes=[]), 'no scenes'),
        (dict(scenes=['scene-0001']), "'scene-0001' is no scene of nuScenes mini"),
        (dict(workers=0), 'workers'),
        (dict(settings=SMALL._replace(block=1)), 'block must be'),
        (dict(settings=SMALL._replace(block=0)), 'block must be'),
        (dict(settings=SMALL._replace(seed=-1)), 'seed'),
        (dict(settings=SMALL._replace(width=700)), 'width must be a multiple of 16'),
        (dict(settings=SMALL._replace(sweeps=-1)), 'sweeps must be'),
        (dict(settings=SMALL._replace(sweeps=5, sweep_interval=0.1)), 'do not fit'),
        (dict(settings=SMALL._replace(sweep_interval=0.0)), 'do not fit'),
        (dict(settings=SMALL._replace(radius=100.0)), 'radius'),
        (dict(settings=SMALL._replace(hours=())), 'hours must be some of'),
        (dict(settings=SMALL._replace(hours=('noon',))), 'hours must be some of'),
    ],
)
def test_nonsense(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path / 'data', **options)
    assert not (tmp_path / 'data').exists()


def test_a_full_folder_is_left_alone(tmp_path):
    (tmp_path / 'v1.0-mini').mkdir()
    (tmp_path / 'samples').mkdir()
    with pytest.raises(FileExistsError, match='not empty; .* --overwrite'):
        make(tmp_path)
    with pytest.raises(FileExistsError, match='no generated data set'):
        make(tmp_path, overwrite=True)
    assert (tmp_path / 'v1.0-mini').is_dir()
    (tmp_path / 'file').touch()
    with pytest.raises(FileExistsError, match='not a folder'):
        make(tmp_path / 'file')


def test_overwrite(tmp_path):
    make(tmp_path, samples=2)
    (tmp_path / 'nuscenes_infos_val.pkl').touch()
    make(tmp_path, scenes=['scene-0061'], samples=2, overwrite=True)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {'v1.0-mini', 'maps', 'samples', 'sweeps', MARK}
    assert not any('0916' in name for name in digests(tmp_path))


def test_nothing_stays_of_a_failure(tmp_path):
    def stop(done, total):
        raise RuntimeError('stop')

    with pytest.raises(RuntimeError, match='stop'):
        make(tmp_path / 'data', progress=stop)
    assert not list((tmp_path / 'data').iterdir())


def test_full_disk(tmp_path, monkeypatch):
    generate = importlib.import_module('mmdet3d_quant.synthetic.generate')
    monkeypatch.setattr(generate.shutil, 'disk_usage', lambda p: type('Disk', (), dict(free=10)))
    with pytest.raises(OSError, match='0.0 GB are free: ask for fewer'):
        make(tmp_path / 'data')
    assert not (tmp_path / 'data').exists()


def test_converter_says_what_is_wrong(tmp_path):
    with pytest.raises(ConverterError, match='Database version not found'):
        make_infos(tmp_path)


def test_tool(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    tool = importlib.import_module('make_synthetic_nuscenes')
    few = ['--scene-names', 'scene-0103', '--samples', '2', '--width', '160', '--workers', '1']
    tool.main(['--out', str(tmp_path / 'data'), *few, '--no-infos'])
    assert 'Wrote' in capsys.readouterr().out
    with pytest.raises(ValueError, match='10 scenes'):
        tool.main(['--out', str(tmp_path / 'more'), '--scenes', '11'])
    sys.modules.pop('make_synthetic_nuscenes')
