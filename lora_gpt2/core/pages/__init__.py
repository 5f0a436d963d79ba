"""The HTML pages that we write: one file each, without scripts, which loads nothing, for a screen, a phone or paper.

The templates lie beside this module; everything that goes into them is escaped, except for the charts.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment


@cache
def _open_environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["number"] = lambda value: isinstance(value, int)
    return environment


def render_page(template: str, **values: Any) -> str:
    """Returns a page; `template` is a file beside this module."""
    return _open_environment().get_template(template).render(values)


def embed_svg(svg: str) -> Any:
    """Returns a chart of ours for a template, which escapes everything else."""
    from markupsafe import Markup

    return Markup(svg)  # noqa: S704 - drawn by matplotlib, which escapes the text in it
