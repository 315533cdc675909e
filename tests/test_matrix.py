"""The oldest and the newest Python and torch, in environments of their own."""

import ast
import re
import subprocess
import sys

import pytest

from tests import matrix
from tests.small import ROOT


def test_rows_span_what_the_package_says_it_runs_on():
    """setup.py, and mmdet3d's users: Python 3.8 to 3.12."""
    assert matrix.ROWS['oldest'].python == '3.8' and matrix.ROWS['newest'].python == '3.12'
    assert "python_requires='>=3.8'" in (ROOT / 'setup.py').read_text()


def test_environments_get_what_setup_py_asks_for():
    """Whatever setup() is called with, when setup.py is run."""
    told = 'import setuptools; setuptools.setup = lambda **words: print(words["install_requires"]'
    code = f'{told} + words["extras_require"]["export"]); import setup'
    run = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    asked = ast.literal_eval(run.stdout)
    assert asked == list(matrix.NEEDS[: len(asked)]) and len(asked) > 8


def test_the_table_has_every_row_and_a_reason_for_every_test_that_is_passed_over():
    rows = matrix.TABLE.read_text().partition(matrix.MARK)[2].splitlines()
    cells = [[c.strip() for c in row.strip('|').split('|')] for row in rows if row.startswith('|')]
    assert [c[:2] for c in cells[2:]] == [[r.python, r.torch] for r in matrix.ROWS.values()]
    reasons = [row for row in rows if row[:1].isdigit()]
    numbers = {number for c in cells[2:] for number in re.findall(r'\((\d+)\)', c[-1])}
    assert numbers == {reason.partition('.')[0] for reason in reasons}
    assert not any('no reason' in r for r in reasons)


def test_results_are_counted_by_outcome_and_reason(tmp_path):
    report = tmp_path / 'r.xml'
    report.write_text(
        '<testsuites><testsuite>'
        '<testcase classname="a" name="one"/>'
        '<testcase classname="a" name="two"><failure message="x"/></testcase>'
        '<testcase classname="a" name="three"><skipped message="no GPU"/></testcase>'
        '<testcase classname="b" name="four"><error message="x"/></testcase>'
        '</testsuite></testsuites>'
    )
    passed, failed, skipped = matrix.read(report)
    assert passed == 1 and failed == ['a::two', 'b::four'] and skipped == {'no GPU': 1}


@pytest.mark.slow
@pytest.mark.parametrize('row', ['oldest', 'newest'])
def test_the_tests_pass_at_both_ends(row):
    """Makes the environment if it is not there: 20 minutes; then 10 minutes."""
    command = [sys.executable, str(ROOT / 'tests/matrix.py'), row]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
