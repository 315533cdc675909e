"""Figures as SVG elements inside of a page."""

from __future__ import annotations

import io
import re
from hashlib import sha256

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure


def to_svg(figure: Figure) -> Markup:
    """Converts a figure to an SVG element."""
    buffer = io.StringIO()
    with rc_context({'svg.fonttype': 'none', 'svg.hashsalt': '0', 'font.size': 9}):
        figure.savefig(buffer, format='svg', metadata={'Date': None, 'Creator': None})
    text = buffer.getvalue()
    text = re.sub(r'<metadata>.*?</metadata>', '', text[text.index('<svg') :], flags=re.DOTALL)
    # Ids must differ between the pictures of a page, or their clips would be each other's.
    mark = f'p{sha256(text.encode()).hexdigest()[:12]}-'
    text = re.sub(r'\bid="([^"]+)"', rf'id="{mark}\1"', text)
    text = re.sub(r'url\(#([^)]+)\)', rf'url(#{mark}\1)', text)
    return Markup(re.sub(r'href="#([^"]+)"', rf'href="#{mark}\1"', text))
