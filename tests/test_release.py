"""What is released: version, wheel and sdist, models by OpenMMLab's index, licences, images."""

import ast
import email
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata

import pytest
import yaml

import mmdet3d_quant
import mmdet3d_quant_cli
from mmdet3d_quant.files.checkpoint import read_checkpoint
from mmdet3d_quant.runs import from_config as fc
from pages import licences
from tests.small import ROOT
from tests.sources import copied_to

VERSION = mmdet3d_quant.__version__


def test_the_version_is_in_one_place():
    """setup.py reads it from there, and the newest heading of the changelog is its."""
    setup = ast.parse((ROOT / 'setup.py').read_text())
    (given,) = (k.value for n in ast.walk(setup) if isinstance(n, ast.Call)
                for k in n.keywords if k.arg == 'version')  # fmt: skip
    assert not isinstance(given, ast.Constant)
    newest = re.search(r'^## (\S+)', (ROOT / 'CHANGELOG.md').read_text(), re.M)[1]
    assert newest == VERSION and re.fullmatch(r'\d+\.\d+\.\d+', VERSION)
    for name in ('Makefile', 'pyproject.toml', 'mmdet3d_quant_cli.py', 'mmdet3d_quant/__init__.py'):
        assert VERSION not in (ROOT / name).read_text(), name


def test_an_editable_install_tells_the_version_of_its_files(capsys):
    """Its metadata are those of the day it was installed."""
    mmdet3d_quant_cli.main(['--version'])
    assert capsys.readouterr().out == f'{VERSION}\n'


def built(kind, source, folder):
    """A distribution, as a frontend of PEP 517 has it built, without one."""
    code = f'from setuptools import build_meta as b; print(b.build_{kind}({str(folder)!r}))'
    run = subprocess.run([sys.executable, '-c', code], cwd=source, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return folder / run.stdout.strip().splitlines()[-1]


@pytest.fixture(scope='module')
def distributions(tmp_path_factory):
    """A wheel of the checkout, an sdist of it, and the wheel that is built of the sdist."""
    folder = tmp_path_factory.mktemp('release')
    source = copied_to(folder / 'source')
    sdist = built('sdist', source, folder)
    wheel = built('wheel', source, folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / 'unpacked')
    (unpacked,) = (folder / 'unpacked').iterdir()
    (folder / 'again').mkdir()
    return zipfile.ZipFile(wheel), zipfile.ZipFile(built('wheel', unpacked, folder / 'again'))


def test_the_sdist_builds_the_same_wheel(distributions):
    wheel, again = ({n: z.read(n) for n in z.namelist()} for z in distributions)
    (record,) = (name for name in wheel if name.endswith('/RECORD'))
    del wheel[record], again[record]
    assert wheel == again


def test_the_wheel_has_the_package_and_what_tools_need(distributions):
    names = set(distributions[0].namelist())
    wanted = [p for p in (ROOT / 'mmdet3d_quant').rglob('*') if p.suffix in ('.py', '.html')]
    here = {p.relative_to(ROOT).as_posix() for p in wanted if '.mim' not in p.parts}
    assert here | {'mmdet3d_quant/py.typed', 'mmdet3d_quant_cli.py'} <= names
    carried = [*(ROOT / 'tools').glob('*.py'), *(ROOT / 'configs').rglob('*.py')]
    carried += [*(ROOT / 'configs').rglob('metafile.yml'), ROOT / 'model-index.yml']
    assert {f'mmdet3d_quant/.mim/{p.relative_to(ROOT)}' for p in carried} <= names
    top = {name.partition('/')[0] for name in names}
    assert top == {
        'mmdet3d_quant', 'mmdet3d_quant_cli.py', f'mmdet3d_quant-{VERSION}.dist-info'
    }  # fmt: skip


def test_the_wheel_tells_version_and_licence(distributions):
    (name,) = (n for n in distributions[0].namelist() if n.endswith('/METADATA'))
    told = email.message_from_bytes(distributions[0].read(name))
    assert told['Version'] == VERSION
    assert 'Apache-2.0' in (told['License'], told['License-Expression'])
    assert told['Description-Content-Type'] == 'text/markdown'
    assert told.get_payload().startswith('# mmdet3d-quant')


# Models, as OpenMMLab's tools find them.

INDEX = yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']
FILES = [yaml.safe_load((ROOT / name).read_text()) for name in INDEX]
MODELS = {model['Name']: model for file in FILES for model in file['Models']}
SCORED = {name: m for name, m in MODELS.items() if 'Weights' in m}


def scores():
    """Rows of the table in checkpoints/README.md: mAP and NDS by file."""
    text = (ROOT / 'checkpoints/README.md').read_text()
    rows = re.findall(r'^\| `(\S+\.pth)` \|.*\| ([\d.]+) \| ([\d.]+) \| [\d.]+ \|$', text, re.M)
    return {name: (float(m), float(n)) for name, m, n in rows}


def test_every_metafile_is_in_the_index():
    there = {p.relative_to(ROOT).as_posix() for p in (ROOT / 'configs').rglob('metafile.yml')}
    assert there == set(INDEX)
    collections = {c['Name'] for file in FILES for c in file['Collections']}
    assert {model['In Collection'] for model in MODELS.values()} <= collections


@pytest.mark.parametrize('name', MODELS)
def test_configs_of_the_index_are_there_by_their_name(name):
    model = MODELS[name]
    path = ROOT / model['Config']
    assert path.stem == name and fc.read_config(path).model.type
    parent = model['Metadata'].get('Float Model')
    assert parent is None or parent in MODELS
    assert (parent is None) == (model['Metadata']['Precision'] == 'float')


@pytest.mark.parametrize('name', SCORED)
def test_weights_of_the_index_fit_their_config(name):
    cfg = fc.read_config(ROOT / MODELS[name]['Config'])
    state = read_checkpoint(ROOT / MODELS[name]['Weights'])
    weights = state.get('state_dict', state)
    model = fc.build_model(cfg)
    wanted = model.state_dict()
    assert set(wanted) == set(weights)
    assert all(wanted[key].shape == weights[key].shape for key in wanted)


@pytest.mark.parametrize('name', SCORED)
def test_scores_of_the_index_are_those_of_the_table(name):
    (result,) = SCORED[name]['Results']
    told = scores()[SCORED[name]['Weights'].rpartition('/')[2]]
    assert (result['Metrics']['mAP'], result['Metrics']['NDS']) == pytest.approx(
        tuple(100 * value for value in told)
    )


# Licences.


def test_every_package_of_the_lock_has_its_licence():
    text = licences.PAGE.read_text().partition('## All')[2]
    rows = re.findall(r'^\| (\S+) \| (\S+) \| (.+?) \| (.+) \|$', text, re.M)
    told = {name: version for name, version, *_ in rows if name != 'package'}
    lines = (ROOT / 'requirements/lock.txt').read_text().splitlines()
    lines += (ROOT / 'requirements/compiler.txt').read_text().splitlines()
    locked = dict(line.split('==') for line in lines if re.match(r'[\w-]+==', line))
    assert len(locked) > 150 and told == locked, 'run `make pages`'


def test_the_page_is_what_the_packages_here_say():
    locked = licences.locked()
    here = {}
    for name in locked:
        try:
            here[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if here != locked:
        pytest.skip('another environment than that of the lock file')
    assert licences.page() == licences.PAGE.read_text(), 'run `make pages`'


@pytest.mark.parametrize(
    'lines, told',
    [
        (['License-Expression: MIT', 'License: X'], 'MIT'),
        (['Classifier: License :: OSI Approved :: BSD License', 'License: BSD-3'],
         'BSD License / BSD-3'),
        (['Classifier: Topic :: A', 'License: Apache 2.0'], 'Apache 2.0'),
        (['Classifier: License :: Free for non-commercial use', 'License: long\n text'],
         'Free for non-commercial use'),
    ],
)  # fmt: skip
def test_a_licence_is_read_from_what_metadata_has(lines, told):
    assert licences.licence(email.message_from_string('\n'.join(['Name: a', *lines]))) == told


def test_a_package_that_tells_none_is_no_blank():
    with pytest.raises(ValueError, match='b tells no licence'):
        licences.licence(email.message_from_string('Name: b\nLicense: UNKNOWN'))


@pytest.mark.parametrize('name', ['plyfile', 'nuscenes-devkit', 'lyft-dataset-sdk'])
def test_what_is_not_free_for_all_is_told_first(name):
    assert f'| {name} |' in licences.PAGE.read_text().partition('## All')[0]


# Images.


@pytest.mark.parametrize('name', ['cpu', 'gpu'])
def test_images_are_made_by_the_steps_of_the_documentation(name):
    """Whatever is not of the operating system is a line of docs/install.md."""
    text = (ROOT / f'docker/Dockerfile.{name}').read_text()
    steps = [line for line in text.replace('\\\n', ' ').splitlines() if line.startswith('RUN ')]
    told = (ROOT / 'docs/install.md').read_text().splitlines()
    told = {line.partition(' #')[0].strip() for line in told}
    told |= {re.split(r'\s{2,}', line)[0] for line in told}
    ours = [s[4:].strip() for s in steps if not s.startswith('RUN apt-get ')]
    assert ours and [step for step in ours if step not in told] == []
    for line in re.findall(r'^#   (docker .*)$', text, re.M):
        assert line in told
    (command,) = re.findall(r'^CMD (\[.*\])$', text, re.M)
    assert ast.literal_eval(command) in (['make', 'demo'], ['mmdet3d-quant', 'doctor'])
