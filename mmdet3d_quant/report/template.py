"""Templates of the pages, which may import what several have: ``parts.html``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template


def load(name: str, filters: Mapping[str, Any] | None = None, **known: Any) -> Template:
    """Loads a template of this folder.

    Args:
        name: File of the template.
        filters: Its own filters, by name.
        known: Names that it knows besides what it is rendered with.
    """
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FileSystemLoader(Path(__file__).parent, encoding='utf-8'),
    )
    environment.filters.update(filters or {})
    return environment.get_template(name, globals=known)
