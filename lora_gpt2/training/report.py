"""The pages of a trained adapter: `curve.png`, and `report.html`, which is one file and needs no network.

Both are drawn from the records of the metrics file, so they can be drawn again for any version in a store.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_gpt2.core.chart import INK, draw_chart
from lora_gpt2.core.pages import render_page
from lora_gpt2.recipe import Recipe
from lora_gpt2.training.run_reader import Curves, RunReader, describe_curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVE, REPORT = "curve.png", "report.html"
TRAIN, VALIDATION, FAINT = "#0072b2", "#b34700", "#a9cfe6"
MOST_POINTS = 1024
Records = Sequence[Mapping[str, Any]]


def render_report(
    name: str, recipe: Recipe, records: Records, figures: Mapping[str, Any], notes: Sequence[str] = ()
) -> dict[str, bytes]:
    """Returns the pages by file name; `figures` are those of the manifest, `notes` what became of the text."""
    curve = draw_chart(lambda axes: _plot_loss(axes, records), "png", (7.0, 4.2))
    return {CURVE: curve, REPORT: _build_html(name, recipe, records, figures, notes).encode()}


def _column(records: Records, key: str) -> tuple[list[float], list[float]]:
    points = [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float)]
    return [x for x, _ in points], [y for _, y in points]


def _plot_loss(axes: Axes, records: Records) -> None:
    steps, losses = _column(records, "loss")
    axes.plot(steps, losses, color=FAINT, linewidth=0.8)
    axes.plot(steps, _smooth(losses), color=TRAIN, linewidth=1.6, label="training (mean of neighbours)")
    steps, losses = _column(records, "validation_loss")
    axes.plot(steps, losses, color=VALIDATION, marker="o", markersize=3.5, linewidth=1.6, label="validation")
    if losses:
        best = min(range(len(losses)), key=losses.__getitem__)
        said = f"best: {losses[best]:.3f} (perplexity {math.exp(losses[best]):.1f}), step {steps[best]:,.0f}"
        axes.plot(steps[best], losses[best], "o", color=VALIDATION, markersize=9, markerfacecolor="none", label=said)
    axes.margins(y=0.18)
    _label(axes, "loss", "nats per token")
    axes.legend(frameon=False, fontsize=8)


def _label(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
    axes.set_ylabel(unit)
    axes.set_xlabel("step")


def _smooth(values: Sequence[float]) -> list[float]:
    """Returns a centred moving mean over a twentieth of the run."""
    half = max(1, len(values) // 40)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    spans = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in spans]


def _build_html(name: str, recipe: Recipe, records: Records, figures: Mapping[str, Any], notes: Sequence[str]) -> str:
    sections = ("data", "lora", "train", "generate")
    settings = [(f"{s}.{k}", str(v)) for s in sections for k, v in getattr(recipe, s).model_dump(mode="json").items()]
    curves = Curves(most_points=MOST_POINTS)
    curves.add(records)
    shown = {"name": name, "num_steps": figures["steps"], "description": recipe.description}
    run = {"adapters": [shown], "base": recipe.base}
    return render_page(
        "training.html",
        title=name,
        lead=f"{recipe.description or 'A LoRA adapter'} · base {recipe.base}",
        events="",
        verdict=figures["verdict"],
        forgetting=figures["forgetting"],
        figures=_list_figures(figures),
        run=describe_curves(run, {"state": "done"}, {name: curves}),
        notes=notes,
        settings=settings,
    )


def _list_figures(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the figures at the top of the page, each with its label."""
    on_test = []
    if figures["test_perplexity"] is not None:
        shown = f"{figures['base_test_perplexity']:.2f} → {figures['test_perplexity']:.2f}"
        on_test = [(shown, "on test text, kept back")]
    before = [figures["base_perplexity"], figures.get("parent_perplexity"), figures["validation_perplexity"]]
    named = "base, parent, adapter" if before[1] is not None else ""
    return [
        (
            " → ".join(f"{value:.2f}" for value in before if value is not None),
            f"perplexity on validation text{f' ({named})' if named else ''}",
        ),
        *on_test,
        (f"{figures['base_general_perplexity']:.1f} → {figures['general_perplexity']:.1f}", "on general English"),
        (f"{figures['best_step']:,} of {figures['steps']:,}", "best step"),
        (f"{figures['train_tokens']:,}", "tokens trained on"),
        (f"{figures['tokens_per_second']:,.0f}", "tokens per second"),
        (f"{figures['peak_memory_bytes'] / 1e9:.2f} GB", "peak memory of the process"),
        (f"{figures['trained_parameters']:,}", "trained parameters"),
        (f"{figures['seconds'] / 60:,.1f} min", "training time"),
    ]


def render_run(reader: RunReader, is_live: bool) -> str:
    """Returns the page of a run: one that listens, or a file that is whole in itself."""
    names = reader.names
    run = reader.description
    return render_page(
        "training.html",
        linked=is_live,
        title=names[0] if len(names) == 1 else f"{len(names)} adapters",
        lead=f"base {run.get('base')} on {run.get('device')} in {run.get('dtype')}, begun {run.get('started')}",
        events="events" if is_live else "",
        stop="stop",
        verdict="",
        figures=[],
        notes=[],
        settings=[],
        run={} if is_live else reader.to_json(),
    )
