"""What is checked of a Markdown document: its links, and that its code could be run."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import textwrap
from importlib import import_module
from pathlib import Path

from tests.small import ROOT

DOCUMENTS = sorted((ROOT / 'docs').glob('*.md'))
DOCUMENTS += [ROOT / name for name in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md')]
DOCUMENTS += [ROOT / 'checkpoints/README.md']
FENCE = re.compile(r'^([ ]*)```([\w.-]*)\n(.*?)^\1```[ ]*$', re.M | re.S)
LINK = re.compile(r'(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)')
SPAN = re.compile(r'(?<!`)`([^`\n]+)`(?!`)')
#: Folders whose scripts are named in commands.
SCRIPTS = ('tools', 'benchmarks', 'tests', 'pages')


def blocks(text: str) -> list[tuple[str, str]]:
    """Lists the fenced blocks of a document, each a language and its code."""
    return [(m[2], textwrap.dedent(m[3])) for m in FENCE.finditer(text)]


def anchors(text: str) -> set[str]:
    """Lists what a link may name behind ``#``: what GitHub and MkDocs both make of headings."""
    found: set[str] = set()
    for title in re.findall(r'^#{1,6} (.+?)\s*#*$', FENCE.sub('', text), re.M):
        plain = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', title).replace('`', '').strip().lower()
        github = re.sub(r'[^\w\- ]', '', plain).replace(' ', '-')
        mkdocs = re.sub(r'[-\s]+', '-', re.sub(r'[^\w\s-]', '', plain).strip())
        found |= {github} & {mkdocs}
    return found


def dead_links(path: Path, text: str) -> list[str]:
    """Lists the links of a document that lead to no file, or to no heading."""
    dead = []
    for match in LINK.finditer(FENCE.sub('', text)):
        link = match[1] or match[2]
        if re.match(r'https?://|mailto:', link):
            continue
        file, _, anchor = link.partition('#')
        target = path.parent / file if file else path
        if not target.exists():
            dead.append(link)
            continue
        here = text if target == path else target.read_text() if target.suffix == '.md' else ''
        if anchor and anchor not in anchors(here):
            dead.append(link)
    return dead


def commands(text: str) -> list[str]:
    """Lists the commands of a document: lines of its shell blocks, and spans that are commands."""
    lines = [
        line.strip()
        for language, code in blocks(text)
        if language in ('bash', 'sh')
        for line in code.replace('\\\n', ' ').splitlines()
    ]
    lines += [
        line
        for language, code in blocks(text)
        if language == 'console'
        for line in re.findall(r'^\$ (.+)$', code.replace('\\\n', ' '), re.M)
    ]
    spans = SPAN.findall(FENCE.sub('', text))
    lines += [s for s in spans if re.match(r'(python |mmdet3d-quant |make |tools/\S+\.py )', s)]
    return [line for line in lines if line and not line.startswith('#')]


def faults(command: str) -> list[str]:
    """Lists what a command names that is not there: a script, an option, a target of make."""
    try:
        words = shlex.split(command, comments=True)
    except ValueError as err:
        return [f'{command}: {err}']
    while words and re.match(r'\w+=', words[0]):
        del words[0]
    if not words:
        return []
    if words[0] == 'make':
        named = [w for w in words[1:] if re.fullmatch(r'[a-z][\w-]*', w)]
        return [f'make {w}' for w in named[:1] if w not in targets()]
    script = named_script(words)
    if script is None:
        return []
    if not (ROOT / script).is_file():
        return [script]
    known = options(ROOT / script)
    given = [w.partition('=')[0] for w in words if re.match(r'--[a-z]', w)]
    return [f'{script} {w}' for w in given if w not in known]


def named_script(words: list[str]) -> str | None:
    """Finds the script of ours that a command runs, by its path; None if it runs none."""
    if words[0] == 'mmdet3d-quant' and len(words) > 1 and re.match(r'[a-z]', words[1]):
        return f'tools/{words[1].replace("-", "_")}.py'
    if '-m' in words[:-1] and words[0].endswith(('python', 'python3')):
        module = words[words.index('-m') + 1].replace('.', '/')
        return f'{module}.py' if module.partition('/')[0] in SCRIPTS else None
    found = [w for w in words if re.fullmatch(rf'(?:{"|".join(SCRIPTS)})/[a-z_]+\.py', w)]
    return found[0] if found else None


def targets() -> set[str]:
    """Lists the targets of the Makefile."""
    return set(re.findall(r'^([a-z][\w-]*):', (ROOT / 'Makefile').read_text(), re.M))


def options(script: Path) -> set[str]:
    """Lists the options of a script: what it adds to its parser, and what it has others add."""
    tree = ast.parse(script.read_text())
    found = {'--help'}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.keywords:  # add_argument, by whatever name
            texts = [a.value for a in node.args if isinstance(a, ast.Constant)]
            found |= {t for t in texts if isinstance(t, str) and t.startswith('--')}
        elif isinstance(node, ast.ImportFrom) and node.module:
            if any(alias.name == 'STEPS' for alias in node.names):  # options from a table
                found |= {step.option for step in import_module(node.module).STEPS}
            adds = any(alias.name.startswith('add_') for alias in node.names)
            near = script.parent / f'{node.module}.py'
            for other in (near, ROOT / f'{node.module.replace(".", "/")}.py') if adds else ():
                found |= options(other) if other.is_file() else set()
    return found


def broken_code(language: str, code: str) -> str:
    """Says why a block could not be run; empty if it could."""
    if language == 'python':
        try:
            compile(code, 'block', 'exec')
        except SyntaxError as err:
            return f'{err}: {code}'
    elif language in ('bash', 'sh') and not code.startswith('#!'):
        run = subprocess.run(['bash', '-n'], input=code, capture_output=True, text=True)
        return f'{run.stderr}: {code}' if run.returncode else ''
    return ''
