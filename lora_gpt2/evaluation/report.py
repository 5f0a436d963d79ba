"""The matrix as a picture and as a page: colours show the perplexity over the base's on the same text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from lora_gpt2.core.chart import CELL_INK, Margins, build_chart, draw_chart, draw_svg
from lora_gpt2.core.pages import embed_svg, render_page
from lora_gpt2.core.printable import printable
from lora_gpt2.core.tables import format_table
from lora_gpt2.store.references import BASE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Cells = Sequence[Mapping[str, Any]]
LIMIT = 4.0  # the ratio to the base at which the colour is full
DARK = 0.6
NOT_METRICS = ("adapter", "source", "warnings", "samples")
COLUMNS = (
    "adapter",
    "text",
    "perplexity",
    "95 % interval",
    "over base",
    "95 % interval",
    "per word",
    "bits per byte",
    "tokens",
    "documents",
)
METHOD = {
    "document": "each document on its own, its first token predicted from EOS",
    "stream": "all text as one sequence, its first token not scored",
}


def find_own(cells: Cells) -> dict[str, Mapping[str, Any]]:
    """Returns each adapter's cell on the source that has its name, with or without a version, and was held out."""
    return {
        cell["adapter"]: cell
        for cell in cells
        if cell["adapter"] != BASE and cell["adapter"].partition("@")[0] == cell["source"].partition("@")[0]
        if not cell.get("documents_trained_on")
    }


def describe_cells(cells: Cells) -> list[str]:
    """Returns a line for each text that an adapter was trained on, and for each adapter on the text of its name."""
    lines = [
        f"! {cell['adapter']} was trained on {cell['documents_trained_on']:,} of {cell['documents']:,} documents of "
        f"{cell['source']}: that figure says nothing about new text"
        for cell in cells
        if cell.get("documents_trained_on")
    ]
    return lines + [f"{name} on {cell['source']}: {describe_gain(cell)}" for name, cell in find_own(cells).items()]


def describe_versions(versions: Mapping[str, Sequence[str]]) -> list[str]:
    """Returns a line with the versions that names stand for, or none if there are no adapters."""
    found = dict.fromkeys(label for labels in versions.values() for label in labels)
    return [f"versions: {', '.join(found)}"] if found else []


def describe_gain(cell: Mapping[str, Any]) -> str:
    """Returns what an adapter gained on a text, in words."""
    if cell["ratio_to_base"] is None:
        return f"perplexity {cell['perplexity']:,.2f}"
    sure = "" if cell["ratio_interval"] is None else " ({:.2f} to {:.2f})".format(*cell["ratio_interval"])
    return f"perplexity {cell['perplexity']:,.2f}, {cell['ratio_to_base']:.2f}{sure} of the base's"


def format_matrix(cells: Cells) -> str:
    """Returns perplexities as adapters × sources; `!` marks text that was trained on, `*` the best of the others."""
    sources = list(dict.fromkeys(cell["source"] for cell in cells))
    adapters = list(dict.fromkeys(cell["adapter"] for cell in cells))
    values = {(cell["adapter"], cell["source"]): cell["perplexity"] for cell in cells}
    trained = {(cell["adapter"], cell["source"]) for cell in cells if cell.get("documents_trained_on")}
    best = {
        source: min(
            (v for a in adapters if (a, source) not in trained and not math.isnan(v := values[a, source])), default=0.0
        )
        for source in sources
    }
    rows = []
    for adapter in adapters:
        marks = ["*" if values[adapter, s] == best[s] and len(adapters) > 1 else " " for s in sources]
        marks = ["!" if (adapter, s) in trained else mark for s, mark in zip(sources, marks, strict=True)]
        rows.append([adapter, *(f"{values[adapter, s]:,.2f}{mark}" for s, mark in zip(sources, marks, strict=True))])
    return format_table(["perplexity", *(f"{source} " for source in sources)], rows)


def build_figure(cells: Cells) -> Figure:
    """Returns the heat map as a figure of matplotlib."""
    size, margins = _measure_map(cells)
    figure: Any = build_chart(lambda axes: _plot(axes, cells), size, margins)
    figure._repr_png_ = lambda: draw_matrix(cells)  # so that a notebook shows it, with or without %matplotlib
    return cast("Figure", figure)


def draw_matrix(cells: Cells, kind: str = "png") -> bytes:
    """Returns the heat map, base first."""
    size, margins = _measure_map(cells)
    return draw_chart(lambda axes: _plot(axes, cells), kind, size, margins)


def _measure_map(cells: Cells) -> tuple[tuple[float, float], Margins]:
    adapters, sources = _names(cells, "adapter"), _names(cells, "source")
    left = 0.4 + 0.085 * max(map(len, adapters))
    top = 0.5 + 0.06 * max(map(len, sources))
    width, height = left + 0.95 * len(sources) + 0.2, top + 0.42 * len(adapters) + 0.45
    return (width, height), (left / width, 1 - 0.2 / width, 1 - top / height, 0.45 / height)


def _names(cells: Cells, key: str) -> list[str]:
    names = dict.fromkeys(cell[key] for cell in cells)
    return sorted(names, key=lambda name: name != BASE) if key == "adapter" else list(names)


def _plot(axes: Axes, cells: Cells) -> None:
    adapters, sources = _names(cells, "adapter"), _names(cells, "source")
    found = {(cell["adapter"], cell["source"]): cell for cell in cells}
    own = {id(cell) for cell in find_own(cells).values()}
    shades = [[_shade(found[a, s]) for s in sources] for a in adapters]
    axes.imshow(shades, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    for row, adapter in enumerate(adapters):
        for column, source in enumerate(sources):
            cell, shade = found[adapter, source], shades[row][column]
            axes.text(
                column,
                row,
                f"{cell['perplexity']:,.1f}{' !' if cell.get('documents_trained_on') else ''}",
                ha="center",
                va="center",
                fontsize=9,
                color="white" if abs(shade) > DARK else CELL_INK,
                fontweight="bold" if id(cell) in own else "normal",
            )
    axes.set_xticks(range(len(sources)), list(map(printable, sources)), rotation=30, ha="left")
    axes.set_yticks(range(len(adapters)), list(map(printable, adapters)))
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    trained = "; !: trained on" if any(cell.get("documents_trained_on") for cell in cells) else ""
    said = f"perplexity; blue: better than base\nred: worse; bold: own text{trained}"
    axes.set_xlabel(said, fontsize=7, loc="left")


def _shade(cell: Mapping[str, Any]) -> float:
    """Returns -1 (a quarter of the base's perplexity) to 1 (four times it)."""
    ratio = cell["ratio_to_base"]
    if not ratio or not math.isfinite(ratio):
        return 0.0 if ratio is None else math.copysign(1, (ratio or 0.5) - 1)
    return max(-1.0, min(1.0, math.log(ratio) / math.log(LIMIT)))


def build_matrix_page(result: Mapping[str, Any]) -> str:
    """Returns the page of a result of `evaluate --json`; it loads nothing."""
    cells: Cells = result["cells"]
    forgetting: Cells = result.get("forgetting", [])
    shown = [*cells, *forgetting]
    size, margins = _measure_map(shown)
    generation: Cells = result.get("generation", [])
    metrics = [key for key in generation[0] if key not in NOT_METRICS] if generation else []
    return render_page(
        "matrix.html",
        title="Adapters × texts",
        base=str(result["base"]),
        figures=_list_figures(cells),
        chart=embed_svg(draw_svg(lambda axes: _plot(axes, shown), size, margins)),
        width_px=round(96 * size[0]),
        gained=[(f"{name} on {cell['source']}", describe_gain(cell)) for name, cell in find_own(cells).items()],
        forgotten=[
            (f"{c['adapter']} on general English", describe_gain(c)) for c in forgetting if c["adapter"] != BASE
        ],
        quality=[
            (row["adapter"], row["source"], *("" if row[key] is None else f"{row[key]:.4g}" for key in metrics))
            for row in generation
        ],
        quality_header=["adapter", "text", *(key.replace("_", " ") for key in metrics)],
        cells=[_list_columns(cell) for cell in shown],
        cells_header=COLUMNS,
        method=f"Perplexity: exp of the mean negative log-likelihood of a token, {METHOD[result['protocol']]}; window "
        f"{result['window']}, stride {result['stride']} tokens, each token scored once. Intervals: bootstrap over "
        "documents; those of the ratio to the base use the same draws for both. "
        + "".join(f"{line.capitalize()}. " for line in describe_versions(result.get("versions", {})))
        + "! marks text that the adapter was trained on." * any(cell.get("documents_trained_on") for cell in shown),
    )


def _list_figures(cells: Cells) -> list[tuple[str, str]]:
    """Returns the figures at the top of the page, each with its label."""
    sources, own = _names(cells, "source"), find_own(cells)
    num_tokens = sum(next(cell["tokens"] for cell in cells if cell["source"] == source) for source in sources)
    figures = [
        (f"{len(_names(cells, 'adapter'))} × {len(sources)}", "adapters and base × texts"),
        (f"{num_tokens:,}", "tokens of these texts, scored under each"),
    ]
    if own:
        figures.append(
            (f"{sum(_is_best(cell, cells) for cell in own.values())} of {len(own)}", "best on their own text")
        )
    return figures


def _list_columns(cell: Mapping[str, Any]) -> tuple[str | int, ...]:
    """Returns a cell as the table shows it, column by column."""
    return (
        cell["adapter"],
        cell["source"],
        f"{cell['perplexity']:,.2f}{' !' if cell.get('documents_trained_on') else ''}",
        _show(cell["perplexity_interval"]),
        "" if cell["ratio_to_base"] is None else f"{cell['ratio_to_base']:.3f}",
        _show(cell["ratio_interval"], 3),
        f"{cell['word_perplexity']:,.1f}",
        f"{cell['bits_per_byte']:.3f}",
        cell["tokens"],
        cell["documents"],
    )


def _is_best(cell: Mapping[str, Any], cells: Cells) -> bool:
    rivals = [c for c in cells if c["source"] == cell["source"] and not c.get("documents_trained_on")]
    return bool(cell["perplexity"] <= min(c["perplexity"] for c in rivals))


def _show(interval: Sequence[float] | None, digits: int = 2) -> str:
    return "" if interval is None else f"{interval[0]:,.{digits}f} – {interval[1]:,.{digits}f}"
