"""How our charts look, and how they become a picture; matplotlib is imported only when something is drawn."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#333333"
CELL_INK = "#222222"  # on a light cell of a heat map, whatever the theme
QUIET, LINE, GROUND = "#999999", "#ececec", "#ffffff"
THEME = {INK: "var(--ink)", QUIET: "var(--quiet)", LINE: "var(--line)", GROUND: "var(--card)"}
"""The colours of a chart, and those of the pages in their place, which follow the dark mode."""
Margins = tuple[float, float, float, float]
MARGINS: Margins = (0.14, 0.97, 0.9, 0.15)


def draw_chart(
    plot: Callable[[Axes], None],
    kind: str,
    size: tuple[float, float] = (5.6, 3.4),
    margins: Margins = MARGINS,
) -> bytes:
    """Returns a chart as `png` or `svg`; see `build_chart`."""
    return _save(build_chart(plot, size, margins), kind)


def draw_panels(plots: Sequence[Callable[[Axes], None]], kind: str, size: tuple[float, float]) -> bytes:
    """Returns charts side by side as `png` or `svg`; size in inches."""
    from matplotlib.figure import Figure

    with _look():
        figure: Figure = Figure(figsize=size, layout="constrained")
        for index, plot in enumerate(plots):
            plot(figure.add_subplot(1, len(plots), index + 1))
    return _save(figure, kind)


def _save(figure: Figure, kind: str) -> bytes:
    out = io.BytesIO()
    with _look():
        figure.savefig(out, format=kind, dpi=130, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return out.getvalue()


def build_chart(plot: Callable[[Axes], None], size: tuple[float, float], margins: Margins = MARGINS) -> Figure:
    """Returns a chart; size in inches, margins (left, right, top, bottom) as shares of it."""
    from matplotlib.figure import Figure

    with _look():
        figure: Figure = Figure(figsize=size)
        left, right, top, bottom = margins
        figure.subplots_adjust(left=left, right=right, top=top, bottom=bottom)  # a layout engine would draw it twice
        plot(figure.add_subplot())
    return figure


def _look() -> AbstractContextManager[None]:
    import matplotlib

    look = {
        "svg.fonttype": "none",
        "svg.hashsalt": "lora-gpt2",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": QUIET,
        "axes.grid": True,
        "grid.color": LINE,
        "text.color": INK,
        "axes.titlecolor": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.axisbelow": True,
        "text.parse_math": False,
    }
    return matplotlib.rc_context(look)


def draw_svg(plot: Callable[[Axes], None], size: tuple[float, float] = (5.6, 3.4), margins: Margins = MARGINS) -> str:
    """Returns a chart as SVG to stand inside a page, in the page's colours."""
    drawn = draw_chart(plot, "svg", size, margins).decode()
    for colour, variable in THEME.items():
        drawn = drawn.replace(f": {colour}", f": {variable}")  # in styles
    return drawn[drawn.index("<svg") :]
