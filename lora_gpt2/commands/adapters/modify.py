"""`adapters copy | rename | remove | restore | rollback | gc`: changing what a store holds."""

from __future__ import annotations

import click

from lora_gpt2.commands.shared import emit, format_bytes, json_option, store_option, suggest_next
from lora_gpt2.core.console import Reporter
from lora_gpt2.store.catalog import Store
from lora_gpt2.store.changes import (
    check_removable,
    collect_garbage,
    copy_adapter,
    remove_adapter,
    rename_adapter,
    restore_adapter,
    roll_back,
)
from lora_gpt2.store.listing import summarise


@click.command("copy")
@click.argument("reference", metavar="NAME[@VERSION]")
@click.argument("name", metavar="NEW")
@store_option
@json_option
def copy(reference: str, name: str, store: Store, as_json: bool) -> None:
    """Copy a version under another name, as that adapter's next version.

    \b
    Example:
      lora-gpt2 adapters copy law@2 law-stable
    """
    manifest = copy_adapter(store, reference, name)
    emit({"adapter": summarise(manifest)}, as_json, lambda: f"copied {reference} to {manifest.reference}")


@click.command("rename")
@click.argument("old")
@click.argument("new")
@store_option
@json_option
def rename(old: str, new: str, store: Store, as_json: bool) -> None:
    """Give an adapter, with all its versions, another name.

    \b
    Example:
      lora-gpt2 adapters rename mine law
    """
    rename_adapter(store, old, new)
    manifest = store.read_manifest(new)
    emit({"adapter": summarise(manifest)}, as_json, lambda: f"'{old}' is now '{new}'")


@click.command("remove")
@click.argument("references", nargs=-1, required=True, metavar="NAME[@VERSION]...")
@store_option
@json_option
@click.pass_obj
def remove(reporter: Reporter, references: tuple[str, ...], store: Store, as_json: bool) -> None:
    """Remove adapters, or versions that are not in use; they come back with 'restore' until 'gc'.

    \b
    Examples:
      lora-gpt2 adapters remove law
      lora-gpt2 adapters remove law@1
    """
    chosen = dict.fromkeys(check_removable(store, reference) for reference in references)  # all, or none is removed
    whole = {each.name for each in chosen if each.version is None}
    references = tuple(each.label for each in chosen if each.version is None or each.name not in whole)
    for reference in references:
        remove_adapter(store, reference)
    emit({"adapters": list(references)}, as_json, lambda: f"removed {', '.join(references)}")
    suggest_next(reporter, "adapters", "restore", references[-1], store=store, title="to undo")


@click.command("restore")
@click.argument("reference", metavar="NAME[@VERSION]")
@store_option
@json_option
def restore(reference: str, store: Store, as_json: bool) -> None:
    """Bring back what was removed last under this name.

    \b
    Example:
      lora-gpt2 adapters restore law
    """
    restore_adapter(store, reference)
    emit({"adapter": summarise(store.read_manifest(reference))}, as_json, lambda: f"restored {reference}")


@click.command("rollback")
@click.argument("name")
@click.option("--to", type=click.IntRange(min=1), metavar="VERSION", help="This version, also a newer one.")
@store_option
@json_option
def rollback(name: str, to: int | None, store: Store, as_json: bool) -> None:
    """Use the newest sound version before the present one, or the one of --to. Nothing is removed.

    \b
    Examples:
      lora-gpt2 adapters rollback law
      lora-gpt2 adapters rollback law --to 3
    """
    manifest = roll_back(store, name, to)
    emit({"adapter": summarise(manifest)}, as_json, lambda: f"'{name}' uses version {manifest.version} now")


@click.command("gc")
@click.option("--keep", type=click.IntRange(min=1), metavar="N", help="Also all but the newest N versions of each.")
@click.option("--dry-run", is_flag=True, help="Say what would go.")
@store_option
@json_option
def gc(keep: int | None, dry_run: bool, store: Store, as_json: bool) -> None:
    """Delete what was removed, what dead processes left, and old versions; never one in use or being read.

    \b
    Examples:
      lora-gpt2 adapters gc --dry-run
      lora-gpt2 adapters gc --keep 3
    """
    found = collect_garbage(store, keep, dry_run)
    verb = "would delete" if dry_run else "deleted"

    def render() -> list[str]:
        lines = [f"{verb} {name}" for name in found.removed] or ["nothing to delete"]
        lines += [f"kept {name}: somebody is reading it" for name in found.kept_in_use]
        return [*lines, f"{format_bytes(found.freed_bytes)} {'to free' if dry_run else 'freed'}"]

    emit(vars(found), as_json, render)


COMMANDS = (copy, rename, remove, restore, rollback, gc)
