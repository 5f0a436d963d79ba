"""`lora-gpt2 prepare`: what `train` does with text before training, on its own, with a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora_gpt2.commands.shared import base_option, emit, json_option, set_option, skip_bad_option, suggest_next
from lora_gpt2.core.console import Reporter
from lora_gpt2.core.files import wrap_os_errors, write_user_file
from lora_gpt2.core.printable import count_of, printable
from lora_gpt2.core.user_files import check_output
from lora_gpt2.recipe_files import load_recipe

KEYS = (
    "documents_read",
    "documents_kept",
    "rejected",
    "tokens",
    "loss_tokens",
    "documents",
    "fill",
    "rules",
    "pii",
    "tokens_per_document",
    "characters",
    "near_duplicates",
    "num_train_test_overlaps",
    "num_held_out_seen",
    "reading",
)


@click.command("prepare")
@click.argument("sources", nargs=-1, metavar="SOURCE...")
@click.option("--recipe", type=click.Path(path_type=Path), metavar="FILE", help="Take settings from a recipe.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder for the blocks; else the cache.")
@click.option("--preview", type=click.IntRange(0, 100), default=0, metavar="N", help="Show N documents as tokens.")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write the cleaning report as a page.")
@click.option("--text", type=click.Path(path_type=Path), metavar="DIR", help="Write the clean text of each split.")
@skip_bad_option
@base_option
@set_option
@json_option
@click.pass_obj
def command(
    reporter: Reporter,
    sources: tuple[str, ...],
    recipe: Path | None,
    out: Path | None,
    preview: int,
    html: Path | None,
    text: Path | None,
    skip_bad: bool,
    base: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Read, clean, split and tokenise text, and say what each rule changed.

    \b
    Examples:
      lora-gpt2 prepare my_text.txt
      lora-gpt2 prepare site/ --html preparation.html --preview 3
      lora-gpt2 prepare notes/ "more/*.jsonl" --set data.profile=code --json
      lora-gpt2 prepare pairs.csv --set data.prompt='Q: {question} A:' --set data.text_field=answer
      cat *.log | lora-gpt2 prepare - --set data.rules='{urls: mask, pii: mask}'
    """
    check_output(html)
    settings = load_recipe(
        recipe, overrides, {"data.sources": sources, "base": base, "data.skip_bad": skip_bad or None}
    )
    from lora_gpt2.data.clean.report import build_report_page
    from lora_gpt2.data.inspect import preview_documents, write_texts
    from lora_gpt2.data.prepared import describe_amount, prepare_data
    from lora_gpt2.model.checkpoint import Checkpoint

    tokenizer = Checkpoint.open(settings.base).load_tokenizer()
    prepared = prepare_data(settings.data, tokenizer, reporter, out)
    result = {key: prepared.report[key] for key in KEYS}
    result["epochs"] = settings.count_epochs(prepared.train.num_tokens)
    result |= {"fingerprint": prepared.fingerprint, "path": str(prepared.path)}
    if preview:
        result["preview"] = preview_documents(prepared.train, tokenizer, preview)
    with wrap_os_errors("write the page or the text"):
        if html:
            write_user_file(html, build_report_page(prepared.report))
        if text:
            write_texts(prepared, tokenizer, text)
    emit(result, as_json, lambda: _render(result, prepared.report, str(prepared.rejected)))
    if advice := describe_amount(prepared.train.num_tokens):
        reporter.message(advice)
    again: list[str | Path] = [
        *([recipe] if recipe else []),
        *sources,
        *(word for item in overrides for word in ("--set", item)),
    ]
    again += ["--base", base] if base else []
    suggest_next(reporter, "train", *again, *(["--skip-bad"] if skip_bad else []))


def _render(result: dict[str, Any], report: dict[str, Any], rejected: str) -> str:
    from lora_gpt2.data.clean.report import list_figures

    lines = [*report["reading"], *(f"{value:>20}  {label}" for value, label in list_figures(report))]
    lines.append(f"{result['epochs']:>20.1f}  epochs with the steps of the recipe")
    for name, rule in result["rules"].items():
        removed = count_of(rule["characters_removed"], "character")
        lines.append(f"rule {name}: {count_of(rule['documents'], 'document')}, {removed} removed")
        lines += [f"    {example['before']!r} -> {example['after']!r}" for example in rule["examples"]]
    lines += [f"rejected: {count:,} {reason}" for reason, count in result["rejected"].items()]
    for entry in result["near_duplicates"]:
        lines.append(printable(f"    {entry['origin']} is {entry['similarity']:.0%} like {entry['of']}"))
    lines += [f"looks like personal data: {kind} in {count_of(n, 'document')}" for kind, n in result["pii"].items()]
    for document in result.get("preview", []):
        lines.append("document: " + "".join(_show_token(token) for token in document))
    if result["rejected"]:
        lines.append(printable(f"rejected documents and reasons: {rejected}"))
    return "\n".join([*lines, printable(f"written to {result['path']}")])


def _show_token(token: dict[str, Any]) -> str:
    """Shows a token between bars; one without loss in brackets."""
    shown = repr(token["text"])[1:-1]
    return f"{shown}|" if token["loss"] else f"({shown})|"
