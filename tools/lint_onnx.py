#!/usr/bin/env python
"""Check Q/DQ ONNX files, whoever made them, for what costs INT8 speed or accuracy in TensorRT."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path

from compiler import tell_compiled
from rich.console import Console
from rich.table import Table
from terminal import open_console, run_tool

from mmdet3d_quant.check.compiled import beside
from mmdet3d_quant.check.lint import (
    RULES,
    Finding,
    Graph,
    Layer,
    LintError,
    Reformat,
    layers,
    lint,
    read_graph,
    reformats,
)
from mmdet3d_quant.check.lint.layers import coverage, summary
from mmdet3d_quant.check.lint.picture import draw
from mmdet3d_quant.check.lint.reformat import TO_FLOAT, TO_INT8
from mmdet3d_quant.check.lint.rules import is_quantized
from mmdet3d_quant.engines.tensorrt_rtx import Compiled, compile_onnx
from mmdet3d_quant.engines.tensorrt_rtx.compiler import check_installed
from mmdet3d_quant.export.targets import target_names
from mmdet3d_quant.files.outputs import check_writable, whole

#: Findings of one rule that are shown; the JSON has all.
SHOWN = 8
EXAMPLE = """
examples:
  python tools/lint_onnx.py onnx/int8/camera.backbone.onnx
  python tools/lint_onnx.py onnx/int8/*.onnx --min-coverage 0.99 --json lint.json
  python tools/lint_onnx.py model.onnx --picture model.png --ignore Q11 Q14
  python tools/lint_onnx.py model.onnx --target tensorrt8
  python tools/lint_onnx.py model.onnx --compile
  python tools/lint_onnx.py --rules

exit code: 0 nothing found, or only notes, 1 something found, or refused by the compiler, 2 a file
that cannot be checked; docs/lint.md tells what each engine does about each rule
"""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('files', nargs='*', metavar='FILE', help='ONNX files')
    parser.add_argument(
        '--target',
        choices=target_names(),
        help='engine that the files are for; default: what a file says, else tensorrt, which is '
        'tensorrt8',
    )
    parser.add_argument('--ignore', nargs='+', default=(), metavar='ID', help='rules to leave out')
    parser.add_argument(
        '--min-coverage',
        type=float,
        default=0.0,
        metavar='SHARE',
        help='least share, 0 to 1, of the multiply-accumulates of convolutions in INT8 or FP8',
    )
    parser.add_argument(
        '--allow-float', action='store_true', help='files without Q/DQ are meant to be float'
    )
    parser.add_argument(
        '--compile',
        action='store_true',
        help="ask NVIDIA's compiler too (TensorRT for RTX, needs no GPU); tells what it runs in "
        'another type than expected',
    )
    parser.add_argument('--json', type=Path, help='write all findings and layers here')
    parser.add_argument('--picture', type=Path, help='draw the precision of one FILE as a PNG')
    parser.add_argument('--rules', action='store_true', help='list the rules')
    args = parser.parse_args(argv)
    if not args.files and not args.rules:
        parser.error('name a FILE, or --rules')
    if args.picture and len(args.files) != 1:
        parser.error('--picture draws one FILE')
    if not 0 <= args.min_coverage <= 1:
        parser.error(f'--min-coverage is a share between 0 and 1, not {args.min_coverage}')
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    console = open_console()
    if args.rules:
        list_rules(console)
    for path in (args.json, args.picture):
        if path is not None:
            check_writable(path)
    if args.compile:
        check_installed()
    report, failed = {}, False
    for file in args.files:
        graph = read_graph(file, args.target)
        if not is_quantized(graph) and not args.allow_float:
            raise LintError(
                f'{file} has no Q/DQ: it is a float graph. Export a calibrated model with '
                'tools/export_onnx.py, or say --allow-float'
            )
        findings, convolutions = lint(graph, args.ignore), layers(graph)
        share = coverage(convolutions)
        low = is_quantized(graph) and not math.isnan(share) and share < args.min_coverage
        verdicts = compile_onnx(file) if args.compile else {}
        failed |= any(finding.counts for finding in findings) or low
        between = reformats(graph)
        console.rule(file, align='left')
        tell(console, graph, findings, convolutions, between)
        tell_findings(console, graph, findings, next(iter(verdicts.values()), None))
        if low:
            console.print(f'[red]Less than {args.min_coverage:.1%} in INT8 or FP8 (--min-coverage)')
        report[str(file)] = dict(
            coverage=None if math.isnan(share) else share,
            findings=[finding.as_dict() for finding in findings],
            layers=[dict(name=x.name, macs=x.macs, int8=x.int8, fp8=x.fp8) for x in convolutions],
            reformats=[asdict(x) for x in between],
        )
        if args.compile:
            failed |= not all(verdict.accepted for verdict in verdicts.values())
            tell_compiled(console, graph, verdicts)
            report[str(file)]['compiled'] = {sm: v.summary() for sm, v in verdicts.items()}
        if args.picture:
            with whole(args.picture) as part:
                figure = draw(convolutions, findings, Path(file).name, between)
                figure.savefig(part, format='png', dpi=120)
            console.print(f'Wrote {args.picture}')
    if args.json:
        with whole(args.json) as part:
            Path(part).write_text(json.dumps(report, indent=1))
        console.print(f'Wrote {args.json}')
    return int(failed)


def tell(
    console: Console,
    graph: Graph,
    findings: list[Finding],
    convolutions: list[Layer],
    between: list[Reformat],
) -> None:
    """The layers of one file and the conversions between them, for people."""
    share = coverage(convolutions)
    work = '' if math.isnan(share) else f', {share:.1%} of their multiply-accumulates'
    told = f'; the file says {graph.told}' if graph.told else ''
    console.print(f'for {graph.profile.title}{told}', highlight=False)
    notes = sum(not finding.counts for finding in findings)
    counted = f'{len(findings) - notes} findings{f", {notes} notes" if notes else ""}'
    console.print(f'{summary(convolutions)}{work}; {counted}')
    for kind in (TO_INT8, TO_FLOAT):
        same_kind = [x for x in between if x.kind == kind]
        if same_kind:
            names = [x.tensor for x in same_kind[:SHOWN]] + ['...'] * (len(same_kind) > SHOWN)
            told = f'{len(same_kind)} conversions {kind}: {", ".join(names)}'
            console.print(told, highlight=False)


def tell_findings(
    console: Console, graph: Graph, findings: list[Finding], compiled: Compiled | None
) -> None:
    """What is wrong with one file, what it leads to, and what the compiler makes of it."""
    for rule in RULES:
        same = [finding for finding in findings if finding.rule is rule]
        if not same:
            continue
        table = Table(title=f'{rule.id} {rule.title}', title_justify='left')
        for heading in ('', '', graph.profile.title, *(['compiler'] if compiled else [])):
            table.add_column(heading)
        for finding in same[:SHOWN]:
            effect = f'{finding.severity}: {finding.effect.what} ({finding.effect.seen})'
            runs = [beside(graph, finding, compiled)] if compiled else []
            table.add_row(finding.node, finding.detail, effect, *runs)
        if same[SHOWN:]:
            table.add_row(f'and {len(same) - SHOWN} more', '')
        console.print(table)
        console.print(f'  why:  {rule.why}\n  mend: {rule.mend}', highlight=False)


def list_rules(console: Console) -> None:
    table = Table('id', 'what is wrong', 'why it matters', 'what to do')
    for rule in RULES:
        table.add_row(rule.id, rule.title, rule.why, rule.mend)
    console.print(table)


if __name__ == '__main__':
    run_tool(main, failure=2)
