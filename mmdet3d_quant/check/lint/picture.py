"""A picture of a graph's precision: every convolution, its share of the work, what is wrong."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from mmdet3d_quant.check.lint.layers import Layer, coverage
from mmdet3d_quant.check.lint.reformat import TO_FLOAT, TO_INT8, Reformat
from mmdet3d_quant.check.lint.rules import Finding

_MARKERS = {TO_INT8: ('^', '#264653'), TO_FLOAT: ('v', '#c0392b')}
_COLOURS = {'INT8': '#2a9d8f', 'FP8': '#3a6ea5', 'float': '#e9a23b'}


def draw(
    layers: Sequence[Layer],
    findings: Sequence[Finding],
    title: str,
    reformats: Sequence[Reformat] = (),
) -> Figure:
    """Bars in the order of the file; a cross marks convolutions with findings.

    Triangles at the left mark conversions: up to INT8 before a convolution, or of its output;
    down to float.

    Args:
        layers: Convolutions of the graph.
        findings: Of the same graph.
        title: For example the name of the file.
        reformats: Conversions of the same graph; those at no convolution are only counted.
    """
    figure = Figure(figsize=(9, 0.17 * len(layers) + 1.6), layout='constrained')
    axes = figure.subplots()
    wrong: dict[str, set[str]] = {}
    for finding in findings:
        wrong.setdefault(finding.node, set()).add(finding.rule.id)
    total = sum(layer.macs for layer in layers) or 1
    share = [100 * layer.macs / total for layer in layers]
    kinds = ['INT8' if x.int8 else 'FP8' if x.fp8 else 'float' for x in layers]
    colours = [_COLOURS[kind] for kind in kinds]
    axes.barh(range(len(layers)), share, color=colours, height=0.8)
    for row, layer in enumerate(layers):
        if layer.name in wrong:
            text = ' × ' + ' '.join(sorted(wrong[layer.name]))
            axes.text(share[row], row, text, color='#c0392b', va='center', fontsize=7)
    rows = {layer.name: row for row, layer in enumerate(layers)}
    for kind, (marker, colour) in _MARKERS.items():
        at = [rows[r.layer] for r in reformats if r.kind == kind and r.layer in rows]
        axes.plot(
            [-0.02 * max(share, default=1)] * len(at),
            at,
            marker,
            color=colour,
            markersize=4,
            clip_on=False,
            label=f'conversion {kind}: {sum(r.kind == kind for r in reformats)}',
        )
    axes.set_yticks(range(len(layers)), [layer.name for layer in layers], fontsize=6)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.set_xlabel('share of the multiply-accumulates, %')
    shown = [name for name in _COLOURS if name != 'FP8' or name in kinds]
    quantized = ' and '.join(shown[:-1])
    axes.set_title(
        f'{title}: {100 * coverage(layers):.1f} % in {quantized}, {len(findings)} findings'
    )
    patches = [Patch(color=c, label=n) for n, c in _COLOURS.items() if n in shown]
    axes.legend(handles=[*patches, *axes.get_lines()], loc='lower right', fontsize=7)
    return figure
