"""Checks of a nuScenes folder, real or generated, before long work begins on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Collection, Dict, Iterator, Sequence

from mmdet3d_quant.core.errors import QuantError
from mmdet3d_quant.data.samples import CAMERAS
from mmdet3d_quant.files.checkpoint import load_plain

#: The tables of nuScenes v1.0.
TABLES = (
    'category',
    'attribute',
    'visibility',
    'instance',
    'sensor',
    'calibrated_sensor',
    'ego_pose',
    'log',
    'scene',
    'sample',
    'sample_data',
    'sample_annotation',
    'map',
)
#: The sensors of a key frame.
CHANNELS = (*CAMERAS, 'LIDAR_TOP')
#: Fields that tables use to point at rows of others.
REFERENCES = {
    'instance': {
        'category_token': 'category',
        'first_annotation_token': 'sample_annotation',
        'last_annotation_token': 'sample_annotation',
    },
    'calibrated_sensor': {'sensor_token': 'sensor'},
    'scene': {
        'log_token': 'log',
        'first_sample_token': 'sample',
        'last_sample_token': 'sample',
    },
    'sample': {'scene_token': 'scene', 'prev': 'sample', 'next': 'sample'},
    'sample_data': {
        'sample_token': 'sample',
        'ego_pose_token': 'ego_pose',
        'calibrated_sensor_token': 'calibrated_sensor',
        'prev': 'sample_data',
        'next': 'sample_data',
    },
    'sample_annotation': {
        'sample_token': 'sample',
        'instance_token': 'instance',
        'attribute_tokens': 'attribute',
        'visibility_token': 'visibility',
        'prev': 'sample_annotation',
        'next': 'sample_annotation',
    },
    'map': {'log_tokens': 'log'},
}
_AGAIN = 'unpack or make the data set again'
_CONVERT = (
    "run mmdet3d's tools/create_data.py nuscenes, or make_infos of mmdet3d_quant.synthetic.infos"
)
Tables = Dict[str, Dict[str, Dict[str, Any]]]


class DatasetError(QuantError, ValueError):
    """A data set is incomplete or damaged; says which file or table, and the remedy."""


def check(
    data_root: str | Path,
    version: str | None = None,
    infos: Sequence[str] = ('nuscenes_infos_train.pkl', 'nuscenes_infos_val.pkl'),
    max_files: int = 300,
    tables: bool = True,
    training: Collection[str] = (),
) -> str:
    """Checks that a nuScenes folder can be trained and scored on.

    Args:
        data_root: Folder with ``v1.0-*``, ``samples`` and the info files.
        version: Folder of the tables; default: the only one there.
        infos: Info files that must be there and of that version.
        max_files: How many key frames of each info file have their files looked for, spread
            evenly.
        tables: Whether to read the tables through; else only to see that they are there.
        training: Those of ``infos`` that a model is trained on, which must have objects.

    Returns:
        The version.

    Raises:
        DatasetError: If a table or a file is missing, damaged or does not fit the others.
    """
    root = Path(data_root)
    version = _version(root, version)
    folder = root / version
    samples = None
    if tables:
        rows = read_tables(folder)
        _check_references(rows, folder)
        _check_scenes(rows, folder)
        samples = rows['sample']
    for name in TABLES:
        if not (folder / f'{name}.json').is_file():
            raise DatasetError(f'table {folder / name}.json is missing; {_AGAIN}')
    for name in infos:
        frames = _check_infos(root, name, version, samples, max_files)
        if name in training:
            check_objects(root / name, frames)
    return version


def _version(root: Path, version: str | None) -> str:
    if not root.is_dir():
        raise DatasetError(
            f'{root} does not exist; get nuScenes, or make a data set with '
            f'`mmdet3d-quant make_synthetic_nuscenes --out {root}`'
        )
    versions = sorted(p.name for p in root.glob('v1.0-*') if p.is_dir())
    if version is None and len(versions) == 1:
        return versions[0]
    if version in versions:
        return version
    wanted = f'{version} is not among its versions' if version else 'has not one version'
    raise DatasetError(
        f'{root}: {wanted}, found {", ".join(versions) or "no folder v1.0-*"}; choose another '
        'data_root or version'
    )


def read_tables(folder: Path) -> Tables:
    """Reads the 13 tables, each as rows by token.

    Raises:
        DatasetError: If one is missing, no JSON, or has rows without a token.
    """
    tables: Tables = {}
    for name in TABLES:
        path = folder / f'{name}.json'
        if not path.is_file():
            raise DatasetError(f'table {path} is missing; {_AGAIN}')
        try:
            rows = json.loads(path.read_text())
        except ValueError as err:
            raise DatasetError(f'table {path} is damaged ({err}); {_AGAIN}') from None
        if not isinstance(rows, list) or not all(
            isinstance(r, dict) and 'token' in r for r in rows
        ):
            raise DatasetError(f'table {path} is no list of rows with tokens; {_AGAIN}')
        if not rows and name != 'sample_annotation':
            raise DatasetError(f'table {path} is empty; {_AGAIN}')
        tables[name] = {row['token']: row for row in rows}
        if len(tables[name]) != len(rows):
            raise DatasetError(f'table {path} has the same token twice; {_AGAIN}')
    return tables


def _check_references(tables: Tables, folder: Path) -> None:
    for name, fields in REFERENCES.items():
        path = folder / f'{name}.json'
        for row in tables[name].values():
            for field, target in fields.items():
                if field not in row:
                    raise DatasetError(f'table {path}: {row["token"]} has no {field}; {_AGAIN}')
                tokens = row[field] if isinstance(row[field], list) else [row[field]]
                # An empty token ends a chain; real annotations may lack a visibility.
                may_lack = field in ('prev', 'next', 'visibility_token')
                lost = [t for t in tokens if t not in tables[target] and not (may_lack and not t)]
                if lost:
                    raise DatasetError(
                        f'table {path}: {field} {lost[0]!r} of {row["token"]} is not in '
                        f'{target}.json; {_AGAIN}'
                    )


def _check_scenes(tables: Tables, folder: Path) -> None:
    for scene in tables['scene'].values():
        name, expected = scene.get('name'), scene.get('nbr_samples')
        if not expected:
            raise DatasetError(f'{folder}: {name} has no samples; {_AGAIN}')
        count, token = 0, scene['first_sample_token']
        while token and count <= expected:
            count, token = count + 1, tables['sample'][token]['next']
        if count != expected:
            raise DatasetError(
                f'{folder}: {name} says {expected} samples, its chain has {count}; {_AGAIN}'
            )
    channel = {
        token: tables['sensor'][row['sensor_token']].get('channel')
        for token, row in tables['calibrated_sensor'].items()
    }
    seen: dict[str, set] = {token: set() for token in tables['sample']}
    for row in tables['sample_data'].values():
        if row.get('is_key_frame'):
            seen[row['sample_token']].add(channel[row['calibrated_sensor_token']])
    for token, channels in seen.items():
        lacking = sorted(set(CHANNELS) - channels)
        if lacking:
            raise DatasetError(
                f'{folder}/sample_data.json: sample {token} has no {lacking[0]}; {_AGAIN}'
            )


def read_infos(path: Path) -> dict[str, Any]:
    """Reads an info file of mmdet3d, ``metainfo`` and ``data_list``, without running code.

    Raises:
        DatasetError: If it is missing, damaged, of another kind or empty.
    """
    if not path.is_file():
        raise DatasetError(f'info file {path} is missing; {_CONVERT}')
    try:
        infos = load_plain(path)
    except Exception as err:  # pickle raises almost anything
        raise DatasetError(f'info file {path} is damaged ({err}); {_CONVERT}') from None
    if not isinstance(infos, dict) or not {'metainfo', 'data_list'} <= infos.keys():
        raise DatasetError(f"info file {path} is not of mmdet3d's version 2; {_CONVERT}")
    if not infos['data_list']:
        raise DatasetError(f'info file {path} has no frames; {_AGAIN}')
    return infos


def check_objects(path: Path, frames: Sequence[dict[str, Any]]) -> None:
    """Checks that some frame has an object: mmdet3d's loader draws frames until one has.

    Raises:
        DatasetError: If no frame has an object.
    """
    if not any(frame.get('instances') for frame in frames):
        raise DatasetError(
            f'info file {path} has no objects in {len(frames)} frame(s): a detector cannot be '
            'trained on it. Convert labelled data, or make some with '
            'tools/make_synthetic_nuscenes.py'
        )


def _check_infos(
    root: Path, name: str, version: str, samples: dict | None, max_files: int
) -> list[dict[str, Any]]:
    path = root / name
    infos = read_infos(path)
    infos_version = infos['metainfo'].get('version')
    if infos_version != version:
        raise DatasetError(
            f'info file {path} is of {infos_version}, the tables of {version}; {_CONVERT}'
        )
    frames = infos['data_list']
    strange = [] if samples is None else [f['token'] for f in frames if f['token'] not in samples]
    if strange:
        raise DatasetError(f'info file {path}: {strange[0]} is not in sample.json; {_CONVERT}')
    step = max(1, len(frames) // max_files)
    for frame in frames[::step]:
        for needed in _files(root, frame):
            if not needed.is_file() or not needed.stat().st_size:
                raise DatasetError(f'{needed}, named in {path}, is missing or empty; {_AGAIN}')
    return frames


def _files(root: Path, frame: dict[str, Any]) -> Iterator[Path]:
    """Yields the files of a key frame, where the stock data set looks for them."""
    yield root / 'samples/LIDAR_TOP' / frame['lidar_points']['lidar_path']
    for channel, image in frame['images'].items():
        yield root / 'samples' / channel / image['img_path']
    for sweep in frame.get('lidar_sweeps', []):
        path = Path(sweep['lidar_points']['lidar_path'])
        folder = 'samples' if 'samples' in path.parts else 'sweeps'  # a key frame may be a sweep
        yield root / folder / 'LIDAR_TOP' / path.name
