"""`lora-gpt2 adapters`: the store."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from lora_gpt2.commands.shared import (
    base_option,
    emit,
    format_bytes,
    format_table,
    json_option,
    name_store,
    store_option,
)
from lora_gpt2.core.console import Reporter
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.manifest import Manifest


@click.group("adapters")
def command() -> None:
    """List, show and import adapters of the store."""


@command.command("list")
@store_option
@json_option
@click.pass_obj
def list_(reporter: Reporter, store: Store, as_json: bool) -> None:
    """List the adapters: version in use, base, size, training tokens, perplexity against the base's, age.

    \b
    Example:
      lora-gpt2 adapters list --json
    """
    entries = list(store.iter_current())
    manifests = [entry for entry in entries if isinstance(entry, Manifest)]
    for entry in entries:
        if not isinstance(entry, Manifest):
            reporter.message(f"damaged: {entry.message}")
    rows = [_summarise(manifest) for manifest in manifests]
    emit({"adapters": rows}, as_json, lambda: _render_list(rows, store))


@command.command("show")
@click.argument("reference", metavar="NAME[@VERSION]")
@store_option
@json_option
def show(reference: str, store: Store, as_json: bool) -> None:
    """Show everything a version says about itself: data, recipe, figures, hashes, libraries.

    \b
    Example:
      lora-gpt2 adapters show shakespeare
    """
    manifest = store.read_manifest(reference)
    content = manifest.model_dump(mode="json", by_alias=True)
    content |= {"path": str(store.resolve(reference)), "versions": store.list_versions(manifest.name)}
    emit({"adapter": content}, as_json, lambda: "\n".join(_render_tree(content)))


@command.command("import")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--name", required=True, metavar="N", help="Name in the store.")
@base_option
@store_option
@json_option
@click.pass_obj
def import_(reporter: Reporter, folder: Path, name: str, base: str | None, store: Store, as_json: bool) -> None:
    """Import a LoRA adapter that PEFT saved in FOLDER, for the base it was trained on.

    \b
    Example:
      lora-gpt2 adapters import ./peft_output --name legal --base gpt2
    """
    from lora_gpt2.model.base import load_base
    from lora_gpt2.model.runtime import choose_runtime
    from lora_gpt2.recipe import Recipe
    from lora_gpt2.store.files import Origin, publish_adapter
    from lora_gpt2.store.interop import read_peft_folder

    loaded = load_base(base or Recipe().base, choose_runtime("float32"))
    adapter = read_peft_folder(folder, loaded.config)
    origin = Origin(data={"sources": [], "imported_from": folder.name})
    manifest = publish_adapter(store, name, adapter, loaded, origin)
    row = _summarise(manifest)
    emit({"adapter": row}, as_json, lambda: f"imported {manifest.reference}")
    reporter.message(f'next: lora-gpt2 generate "..." --adapter {name}{name_store(store)}')


def _summarise(manifest: Manifest) -> dict[str, Any]:
    return {
        "name": manifest.name, "version": manifest.version, "base": manifest.base.name,
        "size_bytes": manifest.size_bytes, "num_parameters": manifest.num_parameters,
        "train_tokens": manifest.figures.get("train_tokens"),
        "base_perplexity": manifest.figures.get("base_perplexity"),
        "validation_perplexity": manifest.figures.get("validation_perplexity"), "created": manifest.created.isoformat(),
    }  # fmt: skip


def _render_list(rows: list[dict[str, Any]], store: Store) -> str:
    if not rows:
        return f"no adapters in {store.root}; make one: lora-gpt2 train --data FILE --name NAME"
    header = ["adapter", "version", "base", "size", "tokens", "base ppl", "validation ppl", "age"]
    now = datetime.now(UTC)
    table = []
    for row in rows:
        figures = [
            "" if row[key] is None else f"{row[key]:,.2f}" for key in ("base_perplexity", "validation_perplexity")
        ]
        tokens = "" if row["train_tokens"] is None else f"{row['train_tokens']:,}"
        age = f"{max(0, (now - datetime.fromisoformat(row['created'])).days)} d"
        size = format_bytes(row["size_bytes"])
        table.append([row["name"], str(row["version"]), row["base"], size, tokens, *figures, age])
    return format_table(header, table)


def _render_tree(value: Any, indent: str = "") -> list[str]:
    lines = []
    for key, item in value.items():
        if isinstance(item, dict) and item:
            lines += [f"{indent}{key}", *_render_tree(item, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {item}")
    return lines
