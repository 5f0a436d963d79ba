"""The HTML pages that we write: one file each, which loads nothing, for a screen, a phone or paper.

The templates lie beside this module, with their style and script; everything that goes into them is escaped, except for
the charts. Where a server gives a page out, style and script are linked, so that it can forbid all other scripts.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment


FOLDER = Path(__file__).parent
STYLE = "layout.css"


@cache
def _open_environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["number"] = lambda value: isinstance(value, int)
    return environment


def render_page(template: str, linked: bool = False, **values: Any) -> str:
    """Returns a page; `template` is a file beside this module, its script has the same name.

    A page with `linked` style and script is given out by a server, with both (see `read_asset`).
    """
    from markupsafe import Markup

    script = Path(template).with_suffix(".js").name
    if linked:
        style, code = f'<link rel="stylesheet" href="{STYLE}">', f'<script src="{script}"></script>'
    else:
        style = f"<style>\n{read_asset(STYLE)}</style>"
        code = f"<script>\n{read_asset(script)}</script>" if (FOLDER / script).exists() else ""
    own = {"style": Markup(style), "script": Markup(code)}  # noqa: S704 - files of ours
    return _open_environment().get_template(template).render(linked=linked, **own, **values)


def read_asset(name: str) -> str:
    """Returns the style sheet of all pages, or the script of one."""
    return (FOLDER / name).read_text(encoding="utf-8")


def embed_svg(svg: str) -> Any:
    """Returns a chart of ours for a template, which escapes everything else."""
    from markupsafe import Markup

    return Markup(svg)  # noqa: S704 - drawn by matplotlib, which escapes the text in it
