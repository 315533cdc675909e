"""Info files of mmdet3d from nuScenes tables, by mmdet3d's own converter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from mmdet3d_quant.core.errors import QuantError
from mmdet3d_quant.synthetic.tables import VERSION

INFO_FILES = ('nuscenes_infos_train.pkl', 'nuscenes_infos_val.pkl')
#: Runs what ``tools/create_data.py`` runs for nuScenes; objects to paste only on request. A split
#: without scenes, at which the converter would stop, gets no file.
_RUN = """
import os, sys
home, version, max_sweeps, gt_database = sys.argv[1:]
sys.path.insert(0, home)
import mmengine
from tools.dataset_converters.nuscenes_converter import create_nuscenes_infos
from tools.dataset_converters.update_infos_to_v2 import update_pkl_infos
root = './data/nuscenes'
create_nuscenes_infos(root, 'nuscenes', version=version, max_sweeps=int(max_sweeps))
for split in ('train', 'val'):
    path = f'{root}/nuscenes_infos_{split}.pkl'
    if mmengine.load(path)['infos']:
        update_pkl_infos('nuscenes', out_dir=root, pkl_path=path)
    else:
        os.remove(path)
if gt_database == '1':
    from mmengine.registry import init_default_scope
    init_default_scope('mmdet3d')
    from tools.dataset_converters.create_gt_database import create_groundtruth_database
    name = 'nuscenes_infos_train.pkl'
    create_groundtruth_database('NuScenesDataset', root, 'nuscenes', name)
"""


class ConverterError(QuantError):
    """mmdet3d's converter failed."""


def make_infos(
    data_root: str | Path,
    version: str = VERSION,
    max_sweeps: int = 3,
    gt_database: bool = False,
) -> list[Path]:
    """Writes mmdet3d's info files beside the tables.

    The converter reads ``./data/nuscenes`` whatever its arguments, so it runs in a temporary folder
    that has a link of this name.

    Args:
        data_root: Folder with ``v1.0-*``, ``samples`` and ``sweeps``.
        version: Name of the folder with the tables.
        max_sweeps: Most earlier sweeps listed for a key frame; a generated set has 3 by default.
        gt_database: Also cut out the objects, for ``ObjectSample`` in published configs.

    Returns:
        The info files: one for each split that has scenes.

    Raises:
        ConverterError: If the converter fails; carries the end of its output.
    """
    root = Path(data_root).resolve()
    spec = importlib.util.find_spec('mmdet3d')
    locations = spec.submodule_search_locations if spec else None
    home = Path(locations[0] if locations else 'mmdet3d') / '.mim'
    if not (home / 'tools/dataset_converters/nuscenes_converter.py').is_file():
        raise ConverterError(
            f'{home}/tools/create_data.py is missing: install mmdet3d from a wheel or by mim, '
            'which bring its tools'
        )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / 'data').mkdir()
        (Path(folder) / 'data/nuscenes').symlink_to(root, target_is_directory=True)
        arguments = [str(home), version, str(max_sweeps), str(int(gt_database))]
        result = subprocess.run(
            [sys.executable, '-c', _RUN, *arguments],
            cwd=folder,
            env={**os.environ, 'MPLBACKEND': 'Agg'},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    files = [root / name for name in INFO_FILES if (root / name).is_file()]
    if result.returncode or not files:
        end = '\n'.join(result.stdout.splitlines()[-15:])
        raise ConverterError(f"mmdet3d's converter failed on {root}:\n{end}")
    return files
