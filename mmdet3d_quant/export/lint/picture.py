"""A picture of a graph's precision: every convolution, its share of the work, what is wrong."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from mmdet3d_quant.export.lint.layers import Layer, coverage
from mmdet3d_quant.export.lint.rules import Finding

_COLOURS = {'INT8': '#2a9d8f', 'float': '#e9a23b'}


def draw(layers: Sequence[Layer], findings: Sequence[Finding], title: str) -> Figure:
    """Bars in the order of the file; a cross marks convolutions with findings.

    Args:
        layers: Convolutions of the graph.
        findings: Of the same graph.
        title: For example the name of the file.
    """
    figure = Figure(figsize=(9, 0.17 * len(layers) + 1.6), layout='constrained')
    axes = figure.subplots()
    wrong: dict[str, set[str]] = {}
    for finding in findings:
        wrong.setdefault(finding.node, set()).add(finding.rule.id)
    total = sum(layer.macs for layer in layers) or 1
    share = [100 * layer.macs / total for layer in layers]
    colours = [_COLOURS['INT8' if layer.int8 else 'float'] for layer in layers]
    axes.barh(range(len(layers)), share, color=colours, height=0.8)
    for row, layer in enumerate(layers):
        if layer.name in wrong:
            text = ' × ' + ' '.join(sorted(wrong[layer.name]))
            axes.text(share[row], row, text, color='#c0392b', va='center', fontsize=7)
    axes.set_yticks(range(len(layers)), [layer.name for layer in layers], fontsize=6)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.set_xlabel('share of the multiply-accumulates, %')
    axes.set_title(f'{title}: {100 * coverage(layers):.1f} % in INT8, {len(findings)} findings')
    axes.legend(handles=[Patch(color=c, label=n) for n, c in _COLOURS.items()], loc='lower right')
    return figure
