"""What contributors are handed names commands that there are, and runs what decides."""

import ast
import re
import shlex

import pytest
import yaml

from tests.small import ROOT

FORMS = sorted((ROOT / '.github/ISSUE_TEMPLATE').glob('*.yml'))
YAML = [*FORMS, *(ROOT / '.github/workflows').glob('*.yml'), ROOT / '.pre-commit-config.yaml']
MAKEFILE = (ROOT / 'Makefile').read_text()
TARGETS = set(re.findall(r'^([\w-]+):', MAKEFILE, re.M))
#: Programs of the environment; mypy and ruff are in the lock, as what judges a push.
LOCK = set(re.findall(r'^([\w-]+)==', (ROOT / 'requirements/lock.txt').read_text(), re.M))


def stated(path):
    return yaml.safe_load(path.read_text())


def unknown(command):
    """What of a shell command is not there: a make target, a file, a program of the lock."""
    words = shlex.split(command, comments=True)
    missing = []
    if words[0] == 'make':
        missing += [w for w in words[1:] if '=' not in w and w not in TARGETS]
    elif words[0].startswith('.venv/bin/') and words[0] != '.venv/bin/python':
        missing += {words[0].rpartition('/')[2]} - LOCK
    return missing + [
        w for w in words if re.fullmatch(r'(tools|\.ci)/[\w.]+', w) and not (ROOT / w).is_file()
    ]


@pytest.mark.parametrize('command', ['make tset', 'bash .ci/go', '.venv/bin/blue .'])
def test_a_command_that_is_not_there_is_found(command):
    assert unknown(command)


@pytest.mark.parametrize('path', YAML, ids=lambda p: p.name)
def test_files_are_yaml_and_look_for_nothing_beside_the_checkout(path):
    assert isinstance(stated(path), dict)
    assert '../' not in path.read_text()


def test_the_workflow_runs_what_decides():
    (job,) = [j for j in stated(ROOT / '.github/workflows/ci.yml')['jobs'].values() if 'steps' in j
              and any(s.get('run') == 'bash .ci/run' for s in j['steps'])]  # fmt: skip
    setup = next(s for s in job['steps'] if 'setup-python' in s.get('uses', ''))
    version = setup['with']['python-version']
    assert f'python{version}' in MAKEFILE.partition('\n\n')[2].partition('\n')[0]


def test_commands_of_workflow_and_hooks_are_there():
    jobs = stated(ROOT / '.github/workflows/ci.yml')['jobs'].values()
    runs = [s['run'] for job in jobs for s in job['steps'] if 'run' in s]
    hooks = [h for r in stated(ROOT / '.pre-commit-config.yaml')['repos'] for h in r['hooks']]
    commands = [line for run in runs for line in run.splitlines()]
    commands += [hook['entry'] for hook in hooks]
    assert len(commands) >= 6 and [c for c in commands if unknown(c)] == []


def test_hooks_say_what_make_lint_says():
    hooks = [h for r in stated(ROOT / '.pre-commit-config.yaml')['repos'] for h in r['hooks']]
    entries = ' '.join(hook['entry'] for hook in hooks)
    recipe = re.search(r'^lint:.*\n((?:\t.*\n)+)', MAKEFILE, re.M)[1]
    for program, word in re.findall(r'\$\(BIN\)/(\w+) ?(\w*)', recipe):
        assert f'.venv/bin/{program} {word}'.strip() in entries


@pytest.mark.parametrize('path', FORMS, ids=lambda p: p.name)
def test_issue_forms_ask_for_what_the_doctor_prints(path):
    form = stated(path)
    if path.name == 'config.yml':
        return
    assert {'name', 'description', 'body'} <= set(form)
    fields = {f['id']: f for f in form['body']}
    assert fields['doctor']['validations'] == dict(required=True)
    assert 'mmdet3d-quant doctor' in fields['doctor']['attributes']['label']
    shown = ' '.join(str(f['attributes']) for f in form['body'])
    for tool in re.findall(r'mmdet3d-quant (\w+)', shown):
        script = ROOT / f'tools/{tool}.py'
        assert ast.parse(script.read_text()) and script.read_text().startswith('#!')


def test_contributing_names_targets_that_there_are():
    text = (ROOT / 'CONTRIBUTING.md').read_text()
    named = set(re.findall(r'`make ([\w-]+)', text))
    assert len(named) >= 6 and named <= TARGETS
