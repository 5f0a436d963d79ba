"""How our charts look, and how they become a picture; matplotlib is imported only when something is drawn."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#333333"
Margins = tuple[float, float, float, float]
MARGINS: Margins = (0.14, 0.97, 0.9, 0.15)


def draw_chart(
    plot: Callable[[Axes], None],
    kind: str,
    size: tuple[float, float] = (5.6, 3.4),
    margins: Margins = MARGINS,
) -> bytes:
    """Returns a chart as `png` or `svg`; see `build_chart`."""
    figure = build_chart(plot, size, margins)
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
        "axes.edgecolor": "#999999",
        "axes.grid": True,
        "grid.color": "#ececec",
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.axisbelow": True,
        "text.parse_math": False,
    }
    return matplotlib.rc_context(look)


def draw_svg(plot: Callable[[Axes], None], size: tuple[float, float] = (5.6, 3.4), margins: Margins = MARGINS) -> str:
    """Returns a chart as SVG to stand inside a page."""
    drawn = draw_chart(plot, "svg", size, margins).decode()
    return drawn[drawn.index("<svg") :]
