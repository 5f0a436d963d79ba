"""`lora-gpt2 prepare`: what `train` does with text before training, on its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora_gpt2.commands.shared import base_option, emit, json_option, set_option
from lora_gpt2.core.console import Reporter
from lora_gpt2.recipe_files import load_recipe


@click.command("prepare")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder for the blocks; else the cache.")
@base_option
@set_option
@json_option
@click.pass_obj
def command(
    reporter: Reporter, sources: tuple[str, ...], out: Path | None, base: str | None, overrides: tuple[str, ...],
    as_json: bool,
) -> None:  # fmt: skip
    """Read, clean, split and tokenise text, and say what each rule changed.

    \b
    Examples:
      lora-gpt2 prepare my_text.txt
      lora-gpt2 prepare notes/ "more/*.jsonl" --set data.profile=code --json
    """
    recipe = load_recipe(None, overrides, data__sources=sources, base=base)
    from lora_gpt2.data.prepared import prepare_data
    from lora_gpt2.model.locate import load_base_tokenizer

    prepared = prepare_data(recipe.data, load_base_tokenizer(recipe.base), reporter, out)
    report = prepared.report
    keys = ("documents_read", "documents_kept", "rejected", "tokens", "documents", "rules")
    result = {key: report[key] for key in keys}
    result |= {"fingerprint": prepared.fingerprint, "path": str(prepared.path)}
    emit(result, as_json, lambda: _render(result))
    reporter.message(f"next: lora-gpt2 train --data {sources[0]} --name NAME")


def _render(result: dict[str, Any]) -> str:
    lines = [f"documents   {result['documents_read']:,} read, {result['documents_kept']:,} kept"]
    lines += [f"rejected    {count:,} {reason}" for reason, count in result["rejected"].items()]
    for part, count in result["tokens"].items():
        lines.append(f"{part:<11} {count:,} tokens in {result['documents'][part]:,} documents")
    for name, rule in result["rules"].items():
        lines.append(f"rule {name}: {rule['documents']:,} documents, {rule['characters_removed']:,} characters removed")
        lines += [f"    {example['before']!r} -> {example['after']!r}" for example in rule["examples"]]
    return "\n".join([*lines, f"written to  {result['path']}"])
