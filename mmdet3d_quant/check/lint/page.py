"""The page of the rules: what each is, what engines do about it, how well the compiler agrees."""

from __future__ import annotations

from typing import Any

from mmdet3d_quant.check.lint.effects import (
    DEFINED,
    FLOAT,
    MANUAL,
    MEASURED,
    NOTHING,
    OPENVINO,
    PARSER8,
    PARSER10,
    REFUSED,
    SLOWER,
    UNKNOWN,
    UNSEEN,
    WRONG,
    Effect,
)
from mmdet3d_quant.check.lint.profiles import PROFILES
from mmdet3d_quant.check.lint.rules import RULES, Rule

_WORST = (REFUSED, WRONG, FLOAT, SLOWER, UNKNOWN, NOTHING)
_MEANING = {
    REFUSED: 'there is no engine; the compiler may crash',
    WRONG: 'an engine that computes something else than was meant',
    FLOAT: 'the layer does not run in INT8',
    SLOWER: 'INT8, with a kernel or bytes more',
    UNKNOWN: 'makers contradict each other, or nobody tried',
    NOTHING: 'the same engine as without',
}
_SOURCES = {
    MEASURED: 'TensorRT for RTX 1.7.1, for SM86, with FP8 for SM89 '
    '(`benchmarks/lint_agreement.py`): verdict, type of every layer, kernels and bytes; no GPU ran '
    'it, so numbers are not among them',
    PARSER8: "assertions of NVIDIA's ONNX parser, branch `release/8.6-GA`",
    PARSER10: 'the same, branch `release/10.1-GA`',
    MANUAL: '"Working with Quantized Types": where Q/DQ belong, scales known when it builds',
    OPENVINO: 'the same cases, tried once (float32, 8 channels): accepted or not, types of '
    'convolutions, numbers against ONNX Runtime; not speed',
    DEFINED: 'numbers follow from the operators, whatever the engine',
    UNSEEN: 'taken over from the compiler of TensorRT for RTX',
}
#: What is behind a disagreement, by words in the name of the graph.
EXPLAINED: dict[str, str] = {
    'random 199': 'One tensor has two Q/DQ of equal scales, one of shape (1,) (Q38), the other of '
    'shape (). The compiler joins the two and goes by the other; the linter looks at each alone.',
}


def page(agreement: dict[str, Any] | None) -> str:
    """Writes the page in Markdown.

    Args:
        agreement: Result of ``benchmarks/lint_agreement.py``; None leaves it out.

    Raises:
        ValueError: If a disagreement in it has no sentence in :data:`EXPLAINED`.
    """
    columns = ' | '.join(profile.title for profile in PROFILES.values())
    lines = [
        '# Rules of the linter',
        '',
        '`python tools/lint_rules.py --out docs/lint.md` writes this page from the rules.',
        '',
        '`tools/lint_onnx.py FILE [--target NAME]` finds what breaks them, and tells what the',
        'engine does that the file is for. How grave that is follows:',
        '',
        '| it says | what happens | severity |',
        '|---|---|---|',
        *(f'| {w} | {m} | {Effect(w, MEASURED).severity} |' for w, m in _MEANING.items()),
        '',
        'Notes do not fail the tool. That nothing happens is a warning where nobody has seen it.',
        '',
        '| seen | |',
        '|---|---|',
        *(f'| {source} | {text} |' for source, text in _SOURCES.items()),
        '',
        'Others are issues, by project and number.',
        '',
        f'| rule | | {columns} |',
        f'|---|---|{"---|" * len(PROFILES)}',
        *(_row(rule) for rule in RULES),
    ]
    if agreement is not None:
        lines += ['', *_agreement(agreement)]
    for rule in RULES:
        lines += ['', *_section(rule, agreement)]
    return '\n'.join(lines) + '\n'


def _row(rule: Rule) -> str:
    """One rule of the summary: the worst of its cases, by engine."""
    cells = []
    for name in PROFILES:
        found = {case[name].what for case in rule.effects.values() if name in case}
        cells.append(next((what for what in _WORST if what in found), '–'))
    return f'| [{rule.id}](#{rule.id.lower()}) | {rule.title} | {" | ".join(cells)} |'


def _section(rule: Rule, agreement: dict[str, Any] | None) -> list[str]:
    """One rule: what it is, what engines do, what to do."""
    lines = [f'## {rule.id}', '', f'**{_begin(rule.title)}.** {_begin(rule.why)}.', '']
    lines += [f'| case | {" | ".join(p.title for p in PROFILES.values())} |']
    lines += [f'|---|{"---|" * len(PROFILES)}']
    for case, effects in rule.effects.items():
        told = (effects.get(name) for name in PROFILES)
        cells = ('–' if one is None else f'{one.what} ({one.seen})' for one in told)
        lines.append(f'| {case} | {" | ".join(cells)} |')
    lines += ['', f'What to do: {rule.mend}.']
    if agreement is not None:
        lines += ['', _agrees(agreement['rules'].get(rule.id, {}))]
    return lines


def _begin(sentence: str) -> str:
    """Writes the first letter large."""
    return sentence[:1].upper() + sentence[1:]


def _agrees(found: dict[str, int]) -> str:
    """The sentence on how well a rule agrees with the compiler."""
    if not found.get('planted'):
        return 'Agreement: not measured; the compiler has no such rule.'
    same, both = found['agree'] + found['twins_agree'], found['planted'] + found['twins']
    told = [
        f'Agreement: finds {found["found"]} of {found["planted"]} planted defects, and nothing in '
        f'{found["silent"]} of {found["twins"]} graphs without',
        f'verdict and layers as the compiler has them in {same} of {both}',
    ]
    for word, key in (('costs', 'costs'), ('random graphs that break it', 'random')):
        if found.get(key):
            told.append(f'{word}: {found[f"{key}_agree"]} of {found[key]} agree')
    return '; '.join(told) + '.'


def _agreement(result: dict[str, Any]) -> list[str]:
    """The study as a whole, and what is behind each disagreement."""
    totals = result['totals']
    lines = [
        "## Agreement with NVIDIA's compiler",
        '',
        '{graphs} graphs were linted for TensorRT for RTX and compiled by it'.format(**totals),
        '(version {compiler}, {sm}): every planted defect and its clean twin,'.format(**result),
        'of 8 and 32 channels, typed float32 and FP16, and {random} random graphs.'.format(
            **totals
        ),
        'The compiler accepted {accepted}; of {layers} layers {int8} run in INT8.'.format(**totals),
        'The linter says the same (refused or not, type of every layer, costs of twins) of all but',
        f'{len(result["disagreements"])}.',
    ]
    if result['disagreements']:
        lines += ['', '| graph | the two say | what is behind it |', '|---|---|---|']
    for one in result['disagreements']:
        behind = next((text for word, text in EXPLAINED.items() if word in one['graph']), None)
        if behind is None:
            raise ValueError(f'page.EXPLAINED has no sentence on {one["graph"]}: {one["what"]}')
        lines.append(f'| {one["graph"]} | {one["what"]} | {behind} |')
    return lines
