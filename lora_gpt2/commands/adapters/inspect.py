"""`adapters list | show | history | verify`: looking at a store, changing nothing."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_gpt2.commands.shared import base_option, emit, end_as_failed, format_bytes, json_option, store_option
from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import LoraGpt2Error, UsageError
from lora_gpt2.core.files import wrap_os_errors, write_user_file
from lora_gpt2.core.printable import printable
from lora_gpt2.core.tables import format_table
from lora_gpt2.core.user_files import check_output
from lora_gpt2.store.audits import read_audits
from lora_gpt2.store.card import build_card
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.changes import list_history
from lora_gpt2.store.lineage import describe_lineage
from lora_gpt2.store.listing import list_current, summarise
from lora_gpt2.store.manifest import Manifest

if TYPE_CHECKING:
    from lora_gpt2.store.verify import VerificationResult


@click.command("list")
@store_option
@json_option
@click.pass_obj
def list_(reporter: Reporter, store: Store, as_json: bool) -> None:
    """List the adapters: version in use, base, size, training tokens, perplexity against the base's, age.

    Perplexity is on held-out test text, or, marked ~, on validation text cut into blocks.

    \b
    Example:
      lora-gpt2 adapters list --json
    """
    rows, errors = list_current(store)
    for error in errors:
        reporter.message(f"damaged: {error.message}")
    emit({"adapters": rows}, as_json, lambda: _render_list(rows, store))


@click.command("show")
@click.argument("reference", metavar="NAME[@VERSION]")
@store_option
@json_option
def show(reference: str, store: Store, as_json: bool) -> None:
    """Show everything a version says about itself: origin and parents, data, recipe, figures, hashes, libraries.

    \b
    Example:
      lora-gpt2 adapters show shakespeare
    """
    manifest = store.read_manifest(reference)
    content = manifest.to_json()
    content |= {"path": str(store.resolve(reference)), "versions": store.list_versions(manifest.name)}
    content["lineage"] = describe_lineage(store, manifest)
    emit({"adapter": content}, as_json, lambda: _render_show(content))


@click.command("card")
@click.argument("reference", metavar="NAME[@VERSION]")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write it to a file.")
@store_option
@json_option
def card(reference: str, out: Path | None, store: Store, as_json: bool) -> None:
    """Build a version's model card from its manifest and what audits and evaluations found since.

    'audit memorization' and 'evaluate --keep' leave their results for it; 'adapters push' sends it.

    \b
    Examples:
      lora-gpt2 adapters card shakespeare
      lora-gpt2 adapters card mine --out README.md
    """
    check_output(out)
    manifest = store.read_manifest(reference)
    text = build_card(manifest, read_audits(store, manifest))
    if out:
        with wrap_os_errors(f"write {out}"):
            write_user_file(out, text)
    result = {"adapter": manifest.reference, "card": text, "path": str(out) if out else None}
    emit(result, as_json, lambda: [f"written to {out}"] if out else text)


@click.command("history")
@click.argument("name")
@store_option
@json_option
def history(name: str, store: Store, as_json: bool) -> None:
    """List an adapter's versions, oldest first; * is the one in use.

    \b
    Example:
      lora-gpt2 adapters history shakespeare
    """
    rows = []
    for entry in list_history(store, name):
        row: dict[str, Any] = {"version": entry.version, "in_use": entry.in_use}
        is_sound = isinstance(entry.found, Manifest)
        rows.append(row | (summarise(entry.found) if is_sound else {"damaged": entry.found.message}))  # type: ignore[arg-type, union-attr]
    emit({"adapter": {"name": name, "versions": rows}}, as_json, lambda: _render_history(rows))


@click.command("verify")
@click.argument("references", nargs=-1, metavar="[NAME[@VERSION]]...")
@click.option("--files-only", is_flag=True, help="Check bytes only; needs no base.")
@base_option
@store_option
@json_option
@click.pass_obj
def verify(
    reporter: Reporter, references: tuple[str, ...], files_only: bool, base: str | None, store: Store, as_json: bool
) -> None:
    """Check adapters (all if none is named): bytes, base, format, logits against transformers + PEFT, effect.

    Exits with 9 if one fails. An adapter without effect fails too.

    \b
    Examples:
      lora-gpt2 adapters verify
      lora-gpt2 adapters verify law@2 --files-only
    """
    from lora_gpt2.store.verify import verify_files

    for reference in references:
        if not store.has_adapter(reference.partition("@")[0]):
            store.resolve(reference)  # says what is missing
    wanted = references or tuple(store.list_names())
    verdicts: list[VerificationResult] = []
    sound: list[Manifest] = []
    for verdict, manifest in (verify_files(store, reference) for reference in wanted):
        if manifest is None or files_only:
            verdicts.append(verdict)
        else:
            sound.append(manifest)
    with reporter.task("verifying", len(sound), "adapters") as task:
        for name in dict.fromkeys(manifest.base.name for manifest in sound):
            group = [manifest for manifest in sound if manifest.base.name == name]
            for verdict in _verify_group(store, group, base or name):
                verdicts.append(verdict)
                task.advance(1, verdict.reference)
    order = [reference.partition("@")[0] for reference in wanted]
    verdicts.sort(key=lambda verdict: order.index(verdict.reference.partition("@")[0]))
    rows = [vars(verdict) | {"sound": verdict.is_sound} for verdict in verdicts]
    emit({"adapters": rows}, as_json, lambda: _render_verdicts(verdicts, store))
    if broken := [verdict.reference for verdict in verdicts if not verdict.is_sound]:
        end_as_failed(f"not sound: {', '.join(broken)}", "restore them, 'adapters rollback' or train again", as_json)


COMMANDS = (list_, show, card, history, verify)


def _verify_group(store: Store, manifests: list[Manifest], base_name: str) -> list[VerificationResult]:
    from lora_gpt2.model.base import load_base
    from lora_gpt2.model.runtime import choose_runtime
    from lora_gpt2.store.verify import VerificationResult, verify_on_base

    try:
        base = load_base(base_name, choose_runtime("float32"))
    except LoraGpt2Error as error:
        return [
            VerificationResult(reference=m.reference, passed=["files"], failure=f"base: {error.message}")
            for m in manifests
        ]
    return list(verify_on_base(store, manifests, base))


def _render_list(rows: list[dict[str, Any]], store: Store) -> str:
    if not rows:
        return f"no adapters in {printable(str(store.root))}; make one: lora-gpt2 train --data FILE --name NAME"
    header = ["adapter", "version", "base", "size", "tokens", "base ppl", "ppl", "age"]
    return format_table(
        header, [[row["name"], str(row["version"]), row["base"], *_render_figures(row)] for row in rows]
    )


def _render_figures(row: dict[str, Any]) -> list[str]:
    on_test = row["test_perplexity"] is not None
    keys = ("base_test_perplexity", "test_perplexity") if on_test else ("base_perplexity", "validation_perplexity")
    figures = ["" if row[key] is None else f"{'' if on_test else '~'}{row[key]:,.2f}" for key in keys]
    tokens = "" if row["train_tokens"] is None else f"{row['train_tokens']:,}"
    age = max(0.0, (datetime.now(UTC) - datetime.fromisoformat(row["created"])).total_seconds())
    shown = f"{age / 86400:.0f} d" if age >= 86400 else f"{age / 3600:.0f} h" if age >= 3600 else f"{age / 60:.0f} min"
    return [format_bytes(row["size_bytes"]), tokens, *figures, shown]


def _render_history(rows: list[dict[str, Any]]) -> str:
    table = []
    for row in rows:
        mark = f"{row['version']}{'*' if row['in_use'] else ''}"
        table.append([mark, *(_render_figures(row) if "damaged" not in row else ["damaged", "", "", "", ""])])
    return format_table(["version", "size", "tokens", "base ppl", "ppl", "age"], table)


def _render_show(content: dict[str, Any]) -> list[str]:
    rest = {key: value for key, value in content.items() if key not in ("lineage", "parents", "made")}
    return [*_render_tree(rest), "lineage", *_render_lineage(content["lineage"], "  ")]


def _render_lineage(node: dict[str, Any], indent: str) -> list[str]:
    if "made" not in node:
        return [f"{indent}{node['reference']} at {node['weight']:g}: no longer in this store"]
    provenance = ", ".join(f"{key} {value}" for key, value in node["made"].items())
    share = f" at {node['weight']:g}" if "weight" in node else ""
    found = f" (now {node['found']})" if node.get("found", node["reference"]) != node["reference"] else ""
    text = f"; text {', '.join(node['sources'])}" if node["sources"] else ""
    lines = [f"{indent}{node['reference']}{share}{found}: {provenance}{text}"]
    return [*lines, *(line for parent in node["parents"] for line in _render_lineage(parent, indent + "  "))]


def _render_tree(value: Any, indent: str = "") -> list[str]:
    lines = []
    for key, item in value.items():
        if isinstance(item, dict) and item:
            lines += [f"{indent}{key}", *_render_tree(item, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {item}")
    return lines


def _render_verdicts(verdicts: list[VerificationResult], store: Store) -> str:
    if not verdicts:
        raise UsageError(f"there are no adapters in {store.root}", "name a store with --store")
    rows = []
    for verdict in verdicts:
        figures = [f"{x:.1e}" if x is not None else "" for x in (verdict.max_logit_difference, verdict.effect)]
        rows.append([verdict.reference, verdict.failure or "sound", " ".join(verdict.passed), *figures])
    return format_table(["adapter", "", "passed", "from PEFT", "effect"], rows)
