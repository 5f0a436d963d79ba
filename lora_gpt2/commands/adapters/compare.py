"""`adapters diff | map`: how far adapters are apart."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_gpt2.commands.shared import base_option, emit, json_option, set_option, store_option
from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import NotFoundError, ResourceError, UsageError
from lora_gpt2.core.files import wrap_os_errors, write_user_file
from lora_gpt2.core.tables import format_table
from lora_gpt2.core.user_files import PICTURES, check_output
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.lineage import compare_manifests
from lora_gpt2.store.manifest import Manifest

if TYPE_CHECKING:
    from lora_gpt2.evaluation.map import AdapterMap
    from lora_gpt2.model.lora import Adapter
    from lora_gpt2.store.compare import Distance

MOST_COLUMNS = 10
plot_option = click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write a picture: .png or .svg."
)


@click.command("diff")
@click.argument("one", metavar="ONE[@VERSION]")
@click.argument("other", metavar="OTHER[@VERSION]")
@plot_option
@store_option
@json_option
@click.pass_obj
def diff(reporter: Reporter, one: str, other: str, plot: Path | None, store: Store, as_json: bool) -> None:
    """Compare two versions: settings, data, figures, and how far apart their updates are.

    For each projection: the norms of both updates, that of their difference, and their cosine (1 the same direction, 0
    nothing in common, -1 opposite).

    \b
    Examples:
      lora-gpt2 adapters diff law@1 law@2
      lora-gpt2 adapters diff cooking shakespeare --plot diff.png
    """
    check_output(plot, PICTURES)
    manifests = [store.read_manifest(reference) for reference in (one, other)]
    names = [manifest.reference for manifest in manifests]
    result: dict[str, Any] = {"adapters": names, "differences": compare_manifests(*manifests)}
    result["same_weights"] = manifests[0].pin == manifests[1].pin  # and scaled alike
    try:
        updates = _compare_updates(store, manifests)
    except (NotFoundError, ResourceError) as error:
        updates = []
        reporter.message(f"the updates are not compared: {error.message}")
    result["updates"] = [vars(row) for row in updates]
    if plot:
        _draw_difference(updates, names, plot)
        reporter.message(f"written: {plot}")
    emit(result, as_json, lambda: _render_diff(result, names))


@click.command("map")
@click.argument("names", nargs=-1, metavar="[NAME[@VERSION]]...")
@click.option(
    "--by",
    type=click.Choice(["updates", "perplexity"]),
    default="updates",
    show_default=True,
    help="Compare the weights, or the losses on each other's text.",
)
@click.option(
    "--on", "texts", multiple=True, metavar="NAME=PATH,...", help="A text for each adapter; else what was held out."
)
@plot_option
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write a page.")
@base_option
@set_option
@store_option
@json_option
@click.pass_obj
def map_(
    reporter: Reporter,
    names: tuple[str, ...],
    by: str,
    texts: tuple[str, ...],
    plot: Path | None,
    html: Path | None,
    base: str | None,
    overrides: tuple[str, ...],
    store: Store,
    as_json: bool,
) -> None:
    """Show which adapters are alike: all of one base, or those named, and the base in the middle.

    By updates, the distance is the norm of the difference of the weights. By perplexity it is what it costs, in nats
    per token, to use one adapter on the other's text, the mean of both ways.

    \b
    Examples:
      lora-gpt2 adapters map --plot map.png
      lora-gpt2 adapters map law code --by perplexity --on law=law.jsonl,code=code.txt
      lora-gpt2 adapters map --html map.html --json
    """
    check_output(plot, PICTURES)
    check_output(html)
    names = tuple(dict.fromkeys(names))
    if texts and by == "updates":
        raise UsageError("--on is for --by perplexity", "add --by perplexity, or leave --on out")
    manifests = _choose(store, names, base)
    base_name = base or manifests[0].base.name
    if by == "updates":
        from lora_gpt2.evaluation.map import map_updates
        from lora_gpt2.model.checkpoint import Checkpoint

        adapters = dict(zip(_label(manifests, names), _read_adapters(store, manifests, base_name), strict=True))
        found = map_updates(adapters, Checkpoint.open(base_name).config)
    else:
        found = _map_perplexity(_label(manifests, names), texts, store, (base_name, overrides), reporter)
    from lora_gpt2.evaluation.map import build_map_page, draw_map

    with wrap_os_errors("write the picture or the page"):
        if plot:
            write_user_file(plot, draw_map(found, plot.suffix.lower().lstrip(".")))
        if html:
            write_user_file(html, build_map_page(found, base_name))
    for path in filter(None, (plot, html)):
        reporter.message(f"written: {path}")
    emit({"base": base_name, **found.to_json()}, as_json, lambda: _render_map(found))


COMMANDS = (diff, map_)


def _choose(store: Store, names: tuple[str, ...], base: str | None) -> list[Manifest]:
    """Returns the versions to compare, all of one base; raises `UsageError` if they are not, or fewer than two."""
    manifests = [store.read_manifest(name) for name in names or store.list_names()]
    if base is not None:
        from lora_gpt2.model.checkpoint import Checkpoint
        from lora_gpt2.model.stored_weights import fingerprint_base

        wanted = fingerprint_base(Checkpoint.open(base))
    else:
        counts = Counter(manifest.base.fingerprint for manifest in manifests)
        wanted = counts.most_common(1)[0][0] if counts else ""
    alike = [manifest for manifest in manifests if manifest.base.fingerprint == wanted]
    if names and len(alike) < len(manifests):
        other = next(manifest for manifest in manifests if manifest.base.fingerprint != wanted)
        raise UsageError(f"{other.reference} is for another base, {other.base.name}", "name adapters of one base")
    if len(alike) < 2:
        raise UsageError(f"a map needs two adapters of one base, {store.root} has {len(alike)}", "train another one")
    return alike


def _label(manifests: list[Manifest], names: tuple[str, ...]) -> list[str]:
    """Returns the names as they were typed."""
    return list(names) or [manifest.name for manifest in manifests]


def _read_adapters(store: Store, manifests: list[Manifest], base: str) -> list[Adapter]:
    from lora_gpt2.model.checkpoint import Checkpoint
    from lora_gpt2.store.files import read_adapter

    config, adapters = Checkpoint.open(base).config, []
    for manifest in manifests:
        with store.open(manifest.reference) as version:
            adapters.append(read_adapter(version, config))
    return adapters


def _map_perplexity(
    names: list[str], texts: tuple[str, ...], store: Store, how: tuple[str, tuple[str, ...]], reporter: Reporter
) -> AdapterMap:
    from lora_gpt2.evaluation.map import map_perplexity
    from lora_gpt2.evaluation.matrix import LabelledSource
    from lora_gpt2.evaluation.run import evaluate_texts, read_texts
    from lora_gpt2.recipe_files import load_recipe

    base, overrides = how
    given = [LabelledSource.parse(item) for text in texts for item in text.split(",") if item]
    if unknown := [source.label for source in given if source.label not in names]:
        raise UsageError(f"--on {unknown[0]}: that is none of the adapters", f"label a text with {', '.join(names)}")
    known = {source.label: source for source in given}
    settings = load_recipe(None, overrides, {"base": base})
    sources = [known.get(name) or LabelledSource(name, name) for name in names]
    evaluation = evaluate_texts(
        read_texts(sources, store, settings, reporter), names, store, settings, reporter, general=False
    )
    return map_perplexity(evaluation.cells, names)


def _compare_updates(store: Store, manifests: list[Manifest]) -> list[Distance]:
    if manifests[0].base.fingerprint != manifests[1].base.fingerprint:
        return []
    from lora_gpt2.model.checkpoint import Checkpoint
    from lora_gpt2.store.compare import compare_adapters

    base = manifests[0].base.name
    one, other = _read_adapters(store, manifests, base)
    return compare_adapters(one, other, Checkpoint.open(base).config)


def _draw_difference(updates: list[Distance], names: list[str], path: Path) -> None:
    if not updates:
        raise UsageError("there is nothing to draw: the updates cannot be compared", "name two adapters of one base")
    from lora_gpt2.evaluation.difference import draw_difference

    with wrap_os_errors(f"write {path}"):
        write_user_file(path, draw_difference(updates, names, path.suffix.lower().lstrip(".")))


def _render_map(found: AdapterMap) -> str:
    from lora_gpt2.evaluation.map import UNITS, list_distances, list_header, list_rows

    parts = [format_table(list_header(found), list_rows(found))]
    if len(found.names) <= MOST_COLUMNS:
        parts.append(format_table(["distance", *found.names], list_distances(found)))
    return "\n\n".join([*parts, f"distance: {UNITS[found.by]}"])


def _render_diff(result: dict[str, Any], names: list[str]) -> str:
    rows = [
        [f"{section}.{key}", *(_shorten(value) for value in values)]
        for section, changes in result["differences"].items()
        for key, values in changes.items()
    ]
    parts = [format_table(["", *names], rows)]
    if result["same_weights"]:
        parts.append("the weights are the same")
    elif result["updates"]:
        header = ["projection", "norm", "norm of other", "of difference", "cosine"]
        keys = ("norm", "other_norm", "difference", "cosine")
        parts.append(format_table(header, [[r["site"], *(f"{r[key]:.4f}" for key in keys)] for r in result["updates"]]))
    else:
        parts.append("their updates cannot be compared: they belong to different bases, or theirs is not here")
    return "\n\n".join(parts)


def _shorten(value: Any) -> str:
    text = f"{value:.4f}" if isinstance(value, float) else "" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
