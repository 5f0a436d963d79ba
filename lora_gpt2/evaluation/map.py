"""Adapters by how far they are apart, as a table and as a picture in two dimensions.

By their updates: the Frobenius norm of the difference, from the factors alone; the base changes nothing, so its
distance to an adapter is the norm of the update. By perplexity: what it costs, in nats per token, to use the one on the
other's text, the mean of both ways. The picture is classical multidimensional scaling (Torgerson 1952), and says how
much of the distances it shows: updates that share no direction are all equally far apart, which no plane can show.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lora_gpt2.core.chart import INK, draw_chart, draw_svg
from lora_gpt2.core.pages import embed_svg, render_page
from lora_gpt2.evaluation.matrix import Cell
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.lora import Adapter
from lora_gpt2.store.compare import compare_adapters
from lora_gpt2.store.references import BASE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

By = Literal["updates", "perplexity"]
SIZE, MARGINS = (4.8, 4.2), (0.03, 0.97, 0.88, 0.03)
FONT, LETTER, MARK = 9, 5.6, 4.0
"""Points: height of a name, width of its letters on average, half the width of a mark."""
LABEL_HEIGHTS = (-3, 4, -11, 11, -18, 18, -25, 25)
POINT, BASE_POINT, LINK = "#0072b2", "#b34700", "#999999"
UNITS: dict[By, str] = {"updates": "norm of the difference of the updates", "perplexity": "nats per token"}


@dataclass(frozen=True, kw_only=True)
class AdapterMap:
    """Distances between adapters and the base.

    Args:
        by: what is compared.
        names: the adapters, and `base` first.
        distances: `[names, names]`, in `UNITS[by]`.
        cosines: `[names, names]` of the updates, 0 for the base; None by perplexity.
        coordinates: `[names, 2]`, the base in the middle.
        shown: fraction of the squared distances that the coordinates show.
    """

    by: By
    names: tuple[str, ...]
    distances: np.ndarray
    cosines: np.ndarray | None
    coordinates: np.ndarray
    shown: float

    def find_nearest(self, index: int) -> int | None:
        """Returns the nearest other adapter, None where there is none."""
        others = [k for k, name in enumerate(self.names) if name != BASE and k != index]
        return min(others, key=lambda k: float(self.distances[index, k]), default=None)

    def to_json(self) -> dict[str, Any]:
        """Returns the result with the keys of `adapters map --json`."""
        cosines = None if self.cosines is None else self.cosines.tolist()
        found = {"by": self.by, "names": self.names, "distances": self.distances.tolist(), "cosines": cosines}
        return found | {"coordinates": self.coordinates.tolist(), "shown": self.shown}


def map_updates(adapters: Mapping[str, Adapter], config: GPT2Config) -> AdapterMap:
    """Returns the map of adapters of one base by their updates."""
    names = (BASE, *adapters)
    distances, cosines = np.zeros((len(names), len(names))), np.eye(len(names))
    cosines[0, 0] = 0.0
    for (i, one), (j, other) in combinations(enumerate(names), 2):
        left, right = (adapters.get(name) or Adapter(updates={}) for name in (one, other))
        total = compare_adapters(left, right, config)[-1]
        distances[i, j] = distances[j, i] = total.difference
        cosines[i, j] = cosines[j, i] = total.cosine
    return _build("updates", names, distances, cosines)


def map_perplexity(cells: Sequence[Cell], adapters: Sequence[str]) -> AdapterMap:
    """Returns the map of adapters by their losses on each other's texts.

    `cells` are of each of them and of the base on a text of each adapter, which has its name.
    """
    nll = {(cell.adapter, cell.source): cell.score.nll_nats_per_token for cell in cells}
    names = (BASE, *adapters)

    def measure_excess(used: str, text: str) -> float:
        return nll[used, text] - nll[text, text]

    distances = np.zeros((len(names), len(names)))
    for (i, one), (j, other) in combinations(enumerate(names), 2):
        ways = [measure_excess(one, other), *([] if one == BASE else [measure_excess(other, one)])]
        distances[i, j] = distances[j, i] = max(0.0, sum(ways) / len(ways))  # a neighbour may be better than oneself
    return _build("perplexity", names, distances, None)


def _build(by: By, names: tuple[str, ...], distances: np.ndarray, cosines: np.ndarray | None) -> AdapterMap:
    coordinates, shown = scale_distances(distances)
    return AdapterMap(
        by=by, names=names, distances=distances, cosines=cosines, coordinates=coordinates - coordinates[0], shown=shown
    )


def scale_distances(distances: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns coordinates `[points, 2]` whose distances are nearest to these, and the fraction that they show.

    Classical scaling: eigenvectors of the doubly centred squared distances. Signs are such that the largest coordinate
    of each axis is positive.
    """
    number = len(distances)
    centre = np.eye(number) - 1 / number
    values, vectors = np.linalg.eigh(-0.5 * centre @ distances**2 @ centre)
    order = np.argsort(values)[::-1][:2]
    kept, axes = np.maximum(values[order], 0.0), vectors[:, order]
    axes = axes * np.where(axes[np.abs(axes).argmax(axis=0), range(axes.shape[1])] < 0, -1.0, 1.0)
    found = np.zeros((number, 2))
    found[:, : len(order)] = axes * np.sqrt(kept)
    total = float(np.abs(values).sum())
    return found, float(kept.sum() / total) if total > 0 else 1.0


def draw_map(found: AdapterMap, kind: str = "png") -> bytes:
    """Returns the picture as `png` or `svg`."""
    return draw_chart(lambda axes: _plot(axes, found), kind, SIZE, MARGINS)


def _plot(axes: Axes, found: AdapterMap) -> None:
    points = found.coordinates
    for index, name in enumerate(found.names):
        nearest = found.find_nearest(index)
        if name != BASE and nearest is not None:
            axes.plot(*zip(points[index], points[nearest], strict=True), color=LINK, linewidth=0.8, zorder=1)
    for index, name in enumerate(found.names):
        is_base = name == BASE
        axes.plot(
            *points[index], "s" if is_base else "o", color=BASE_POINT if is_base else POINT, markersize=8, zorder=2
        )
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.12)
    axes.autoscale_view()
    axes.apply_aspect()
    scale = 72 / axes.figure.dpi
    window = np.array(axes.get_window_extent().extents) * scale
    for index, offset in enumerate(choose_label_offsets(axes.transData.transform(points) * scale, found.names, window)):
        near: dict[str, Any] = {"xytext": offset, "textcoords": "offset points"}
        axes.annotate(found.names[index], points[index], **near, color=INK, fontsize=FONT, annotation_clip=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelleft=False, labelbottom=False)
    axes.set_title(
        f"distance: {UNITS[found.by]}\nthe plane shows {found.shown:.0%} of it; lines lead to the nearest",
        loc="left",
        fontsize=8,
        color=INK,
    )


def choose_label_offsets(points: np.ndarray, names: Sequence[str], window: np.ndarray) -> list[tuple[float, float]]:
    """Returns where each name begins, from its point: where it covers least of the points, other names and the rim.

    `points` are `[names, 2]` and `window` is left, bottom, right, top, all in typographic points.
    """
    taken = [(x - MARK, y - MARK, x + MARK, y + MARK) for x, y in points]
    offsets: list[tuple[float, float]] = []
    for (x, y), name in zip(points, names, strict=True):
        width = LETTER * len(name)
        tried = [
            (float(side), float(height))
            for height in LABEL_HEIGHTS
            for side in (MARK + 2, -MARK - 2 - width, -width / 2)
        ]
        boxes = [(x + side, y + height, x + side + width, y + height + FONT) for side, height in tried]
        covered = [
            sum(measure_overlap(box, other) for other in taken) + width * FONT - measure_overlap(box, window)
            for box in boxes
        ]
        best = int(np.argmin(np.round(covered, 6)))
        taken.append(boxes[best])
        offsets.append(tried[best])
    return offsets


def measure_overlap(box: Sequence[float], other: Sequence[float] | np.ndarray) -> float:
    """Returns the area that two rectangles have in common; each is left, bottom, right, top."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    return float(max(0.0, width) * max(0.0, height))


def list_rows(found: AdapterMap) -> list[list[str]]:
    """Returns a row for each adapter: its distance from the base, the nearest other, and how far that is."""
    rows = []
    for index, name in enumerate(found.names):
        if name == BASE:
            continue
        nearest = found.find_nearest(index)
        row = [name, f"{found.distances[index, 0]:.3f}"]
        row += ["", ""] if nearest is None else [found.names[nearest], f"{found.distances[index, nearest]:.3f}"]
        if found.cosines is not None:
            row.append("" if nearest is None else f"{found.cosines[index, nearest]:.4f}")
        rows.append(row)
    return rows


def list_header(found: AdapterMap) -> list[str]:
    """Returns the header of `list_rows`."""
    cosine = ["cosine"] if found.cosines is not None else []
    return ["adapter", "from base", "nearest", "from nearest", *cosine]


def list_distances(found: AdapterMap) -> list[list[str]]:
    """Returns the rows of the table of all distances, each with its name."""
    return [
        [name, *("" if i == j else f"{found.distances[i, j]:.3f}" for j in range(len(found.names)))]
        for i, name in enumerate(found.names)
    ]


def build_map_page(found: AdapterMap, base: str) -> str:
    """Returns the page of a map; it loads nothing."""
    chart = draw_svg(lambda axes: _plot(axes, found), SIZE, MARGINS)
    count = len(found.names) - 1
    spread = [found.distances[i, j] for i, j in combinations(range(1, count + 1), 2)]
    figures = [(str(count), "adapters"), (f"{found.shown:.0%}", "of the distances are shown in the plane")]
    if spread and math.isfinite(sum(spread)):
        shown = f"{min(spread):.3f}" if len(spread) == 1 else f"{min(spread):.3f} – {max(spread):.3f}"
        figures.append((shown, f"between adapters: {UNITS[found.by]}"))
    return render_page(
        "map.html",
        title=f"Adapters by {found.by}",
        base=base,
        figures=figures,
        chart=embed_svg(chart),
        rows=list_rows(found),
        header=list_header(found),
        distances=list_distances(found),
        distances_header=["", *found.names],
    )
