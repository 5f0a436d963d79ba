"""How far two adapters are apart in each layer and projection, as a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lora_gpt2.core.chart import CELL_INK, draw_panels
from lora_gpt2.model.config import HEAD
from lora_gpt2.model.lora import layer_of, target_of
from lora_gpt2.store.compare import Distance

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TOTAL = "all"
MOST_WRITTEN = 16  # layers whose cells have their value written in


def draw_difference(rows: Sequence[Distance], names: Sequence[str], kind: str = "png") -> bytes:
    """Returns three panels of layers × projections: the norm of both updates, and their cosine."""
    sites = [row for row in rows if row.site != TOTAL]
    layers = sorted({layer for row in sites if (layer := layer_of(row.site)) is not None})
    labels = [*map(str, layers), *([HEAD] if any(row.site == HEAD for row in sites) else [])]
    targets = list(dict.fromkeys(target_of(row.site) for row in sites if row.site != HEAD)) or [HEAD]

    def find(value: Callable[[Distance], float]) -> list[list[float]]:
        """Returns the values `[layers, projections]`; that of the head stands in the first column of its own row."""
        found = [[float("nan")] * len(targets) for _ in labels]
        for row in sites:
            layer = layer_of(row.site)
            column = targets.index(target_of(row.site)) if layer is not None else 0
            found[labels.index(HEAD if layer is None else str(layer))][column] = value(row)
        return found

    most = max([max(row.norm, row.other_norm) for row in sites], default=1.0) or 1.0
    panels = [
        (f"norm of {names[0]}", find(lambda row: row.norm), "cividis", (0.0, most)),
        (f"norm of {names[1]}", find(lambda row: row.other_norm), "cividis", (0.0, most)),
        ("cosine of both", find(lambda row: row.cosine), "PuOr", (-1.0, 1.0)),
    ]

    def plot(axes: Axes, title: str, values: list[list[float]], colours: str, limits: tuple[float, float]) -> None:
        image = axes.imshow(values, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto")
        for row, cells in enumerate(values if len(values) <= MOST_WRITTEN else ()):
            for column, value in enumerate(cells):
                red, green, blue, _ = image.cmap((value - limits[0]) / (limits[1] - limits[0]))
                is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
                shown = "" if value != value else f"{round(value, 2) + 0.0:.2f}"  # noqa: PLR0124 - NaN: it is not adapted
                axes.text(
                    column, row, shown, ha="center", va="center", fontsize=7, color="white" if is_dark else CELL_INK
                )
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_xticks(range(len(targets)), targets, rotation=30, ha="right")
        axes.set_yticks(range(len(labels)), labels)
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.set_ylabel("layer")

    def bind(panel: tuple[str, list[list[float]], str, tuple[float, float]]) -> Callable[[Axes], None]:
        return lambda axes: plot(axes, *panel)

    return draw_panels([bind(panel) for panel in panels], kind, (11.0, 1.4 + 0.3 * max(4, len(labels))))
