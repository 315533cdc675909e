"""What runs the commands and notebooks of the documents, and what writes pages from data."""

import ast
import builtins
import json
import os
import re
import shutil
from importlib import import_module

import pytest
import yaml

from pages import floors, notebooks, results, transcripts
from tests.small import ROOT

# Commands with their output.

PAGES = sorted(p for p in (ROOT / 'docs').glob('*.md') if '```console' in p.read_text())
PAGE = """# A page

```console
$ echo new && \\
    pwd
old
$ false
(exit code 1)
```
"""


def test_a_command_gets_the_output_that_it_has_now(tmp_path):
    text = transcripts.rerun(PAGE, tmp_path)
    assert text == PAGE.replace('old', f'new\n{tmp_path}').replace(f'{tmp_path}/', '')
    assert transcripts.rerun(text, tmp_path) == text


def test_commands_share_a_folder_and_come_in_order(tmp_path):
    text = '```console\n$ echo 1 > a\n```\ntext\n```console\n$ cat a\n```\n'
    assert transcripts.rerun(text, tmp_path).endswith('$ cat a\n1\n```\n')


@pytest.mark.parametrize('command, told', [('false', ''), ('true', '(exit code 1)\n')])
def test_another_exit_code_than_the_page_tells_stops_it(tmp_path, command, told):
    with pytest.raises(ValueError, match='exit code'):
        transcripts.rerun(f'```console\n$ {command}\n{told}```\n', tmp_path)


def test_what_is_of_the_moment_is_left_out(tmp_path):
    printed = f'0 %\r50 %\rdone\n\x1b[1mbold\x1b[0m {tmp_path}/a.pth {ROOT}/b.py\n'
    printed += 'Run ━━━ 3/3 0:01\n11/27 11:18:43 - mmengine - INFO - x\n'
    assert transcripts.shown(printed, tmp_path) == 'done\nbold a.pth b.py\n'
    assert transcripts.shown('┏━━┓\n┃ a ┃\n', tmp_path) == '┏━━┓\n┃ a ┃\n'
    table = '11/27 11:18:43 - mmengine - INFO - cars:\n+---+\n| 3 |\n+---+\ndone\n'
    assert transcripts.shown(table, tmp_path) == 'done\n'
    assert transcripts.shown(f'{os.path.relpath(ROOT, tmp_path)}/b.py\n', tmp_path) == 'b.py\n'


def test_every_page_with_commands_is_run_by_make():
    (line,) = re.findall(r'^TRANSCRIPTS := (.+)$', (ROOT / 'Makefile').read_text(), re.M)
    assert set(line.split()) == {p.relative_to(ROOT).as_posix() for p in PAGES}


def silent(text):
    """Commands of a page that have nothing below them, and whose output goes to no file."""
    steps = transcripts.page_steps(text)
    return [s.command for s in steps if not s.output and not re.search(r'[^2]> *\S+$', s.command)]


@pytest.mark.parametrize('path', PAGES, ids=lambda p: p.name)
def test_commands_of_a_page_have_their_output(path):
    assert silent(path.read_text()) == [], 'run `make transcripts`'


def test_a_command_without_its_output_is_found():
    page = '```console\n$ a\n1\n$ b > c\n$ d 2> e\n```\n```console\n$ f\n```\n'
    assert silent(page) == ['d 2> e', 'f']


# Notebooks.

CELLS = {path.stem: notebooks.read(path)['cells'] for path in notebooks.NOTEBOOKS}


def python_of(name):
    """The code of a notebook's cells, in order; lines for the shell are left out."""
    cells = [notebooks.source(c) for c in CELLS[name] if c['cell_type'] == 'code']
    return [re.sub(r'^!.*$', 'pass', cell, flags=re.M) for cell in cells]


def test_there_is_a_notebook_for_each_journey():
    assert set(CELLS) == {'ptq', 'qat', 'sensitivity', 'linter'}


@pytest.mark.parametrize('name', CELLS)
def test_a_notebook_is_valid(name):
    nbformat = pytest.importorskip('nbformat')
    nbformat.validate(notebooks.read(notebooks.FOLDER / f'{name}.ipynb'))


@pytest.mark.parametrize('name', CELLS)
def test_imports_of_a_notebook_are_there(name):
    for node in ast.walk(ast.parse('\n'.join(python_of(name)))):
        if isinstance(node, ast.ImportFrom):
            module = import_module(node.module)
            assert [a.name for a in node.names if not hasattr(module, a.name)] == []
        elif isinstance(node, ast.Import):
            for alias in node.names:
                import_module(alias.name)


def unknown_names(cells):
    """Names that a cell reads and neither it nor one before it makes."""
    made, unknown = set(dir(builtins)), set()
    for cell in cells:
        nodes = list(ast.walk(ast.parse(cell)))
        for node in nodes:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                made |= {(a.asname or a.name).partition('.')[0] for a in node.names}
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                made.add(node.name)
            elif isinstance(node, ast.arg):
                made.add(node.arg)
            elif isinstance(node, ast.ExceptHandler) and node.name:
                made.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                made.add(node.id)
        unknown |= {n.id for n in nodes if isinstance(n, ast.Name) and n.id not in made}
    return unknown


@pytest.mark.parametrize('name', CELLS)
def test_names_of_a_notebook_are_made_before_they_are_read(name):
    assert unknown_names(python_of(name)) == set()


def test_a_name_that_comes_too_late_is_found():
    assert unknown_names(['print(a)', 'a = 1']) == {'a'}


@pytest.mark.parametrize('name', CELLS)
def test_outputs_of_a_notebook_are_of_one_run(name):
    """From top to bottom, without an error; or there are none."""
    cells = [c for c in CELLS[name] if c['cell_type'] == 'code']
    counts = [c['execution_count'] for c in cells]
    assert counts in ([None] * len(cells), list(range(1, 1 + len(cells))))
    assert 'error' not in {o['output_type'] for c in cells for o in c['outputs']}


def cell(text):
    return dict(cell_type='code', metadata={}, source=[text], outputs=[], execution_count=None)


def notebook(*texts):
    return dict(cells=[cell(text) for text in texts], metadata={}, nbformat=4, nbformat_minor=4)


def test_cells_run_in_one_namespace_and_leave_their_outputs(tmp_path):
    path = tmp_path / 'a.ipynb'
    path.write_text(json.dumps(notebook('a = 20', 'print(a + 1)\na + 2', '!echo {a + 3}')))
    notebooks.rerun(path, tmp_path)
    text = notebooks.as_markdown(notebooks.read(path), 'a.ipynb')
    shown = re.findall(r'```text\n(.*?)\n```', text, re.S)
    assert [word for block in shown for word in block.split()] == ['21', '22', '23']


def test_a_cell_that_fails_is_told(tmp_path):
    path = tmp_path / 'a.ipynb'
    path.write_text(json.dumps(notebook('1 / 0')))
    with pytest.raises(notebooks.CellError, match='division by zero'):
        notebooks.rerun(path, tmp_path)
    assert notebooks.read(path)['cells'][0]['execution_count'] is None


@pytest.mark.slow
@pytest.mark.parametrize('path', notebooks.NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_run(path, tmp_path):
    copied = shutil.copy(path, tmp_path / path.name)
    notebooks.rerun(copied, tmp_path)
    cells = [c for c in notebooks.read(copied)['cells'] if c['cell_type'] == 'code']
    assert [c['execution_count'] for c in cells] == list(range(1, 1 + len(cells)))


# Pages from data.


def test_the_page_of_results_is_up_to_date():
    assert results.PAGE.read_text() == results.page(results.read()), 'run `make pages`'


@pytest.mark.parametrize('name', results.read())
def test_results_agree_with_the_metafiles(name):
    """The float scores of a benchmark are those of the checkpoint's metafile."""
    told = results.read()[name]
    files = [yaml.safe_load(p.read_text()) for p in (ROOT / 'configs').rglob('metafile.yml')]
    (model,) = (m for f in files for m in f['Models'] if m['Name'] == f'{name}_synthetic')
    assert told['provenance']['checkpoint']['name'] in model['Weights']
    frames = told['data']['frames']
    near = 0.05 if frames == 160 else 1  # points; the metafile's are of 160 frames
    wanted = model['Results'][0]['Metrics']['mAP']
    assert 100 * told['scores']['float']['mAP'] == pytest.approx(wanted, abs=near)


@pytest.mark.parametrize('name', results.read())
def test_differences_of_results_are_those_of_their_scores(name):
    told = results.read()[name]
    for row, apart in told['differences'].items():
        change = told['scores'][row]['mAP'] - told['scores']['float']['mAP']
        assert apart['difference'] == pytest.approx(change, abs=1e-9)
        assert apart['low'] <= change <= apart['high']


def test_a_row_that_nobody_explained_is_refused():
    with pytest.raises(ValueError, match="row 'INT4'"):
        results.kind('INT4')


def test_the_house_is_drawn_as_it_is():
    assert floors.PICTURE.read_text() == floors.house(), 'run `make pages`'


def test_imports_of_a_room_are_those_of_its_text():
    """By the lines of its files instead of by their syntax."""
    used = floors.uses()
    for room in ('engines', 'export', 'jobs'):
        text = '\n'.join(p.read_text() for p in (floors.PACKAGE / room).rglob('*.py'))
        found = set(re.findall(r'^ *(?:from|import) mmdet3d_quant\.(\w+)', text, re.M))
        found |= set(re.findall(r'^ *from mmdet3d_quant import (\w+)', text, re.M))
        assert used[room] == (found - {room}) & set(used)
