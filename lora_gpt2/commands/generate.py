"""`lora-gpt2 generate`: continue a prompt."""

from __future__ import annotations

import secrets
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_gpt2.commands.settings import setting_options
from lora_gpt2.commands.shared import emit, seed_option, session_options
from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import CorruptError, UsageError
from lora_gpt2.core.names import ALL, AUTO
from lora_gpt2.core.printable import printable
from lora_gpt2.core.user_files import read_stdin
from lora_gpt2.recipe import GenerateSettings, Recipe
from lora_gpt2.recipe_files import load_recipe
from lora_gpt2.store.catalog import Store

if TYPE_CHECKING:
    from lora_gpt2.inference.generate import Output
    from lora_gpt2.inference.run import Guard


@click.command("generate")
@click.argument("prompt", required=False)
@click.option(
    "--adapter", "adapters", multiple=True, metavar="A[:W]", help="Adapter or mix (a:0.6+b:0.4); 'auto' finds one."
)
@click.option("--compare", metavar="A,B,base", help="Adapters and mixes side by side on one prompt, or 'all'.")
@click.option("-n", "--num", type=click.IntRange(1, 64), default=1, show_default=True, help="Continuations of each.")
@click.option("--prompts", type=click.Path(path_type=Path), metavar="FILE", help="Prompts: .jsonl, or one per line.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Where --prompts' results go; resumable.")
@seed_option
@click.option(
    "--no-verbatim",
    type=click.IntRange(8, 1000),
    metavar="N",
    help="Never copy N tokens in a row from the adapters' training text.",
)
@click.option("--disclose", is_flag=True, help="Add an AI-generated disclosure, to the text or in a file beside --out.")
@click.option("--truncate", type=click.Choice(["left"]), help="Keep the end of a prompt that is too long.")
@setting_options("generate")
@session_options
def command(
    reporter: Reporter,
    prompt: str | None,
    adapters: tuple[str, ...],
    compare: str | None,
    num: int,
    prompts: Path | None,
    out: Path | None,
    seed: int | None,
    no_verbatim: int | None,
    disclose: bool,
    truncate: str | None,
    flags: dict[str, Any],
    base: str | None,
    overrides: tuple[str, ...],
    store: Store,
    as_json: bool,
) -> None:
    """Continue PROMPT (standard input if it is '-' or missing) with an adapter, a mix, or several side by side.

    With --prompts and --out, a file of prompts; run it again to continue after an interruption.

    \b
    Examples:
      lora-gpt2 generate "ROMEO:" --adapter shakespeare
      lora-gpt2 generate "Take two" --adapter cooking:0.7+shakespeare:0.3 --max-new-tokens 60
      lora-gpt2 generate "The law" --compare all --seed 1
      lora-gpt2 generate "Preheat the oven" --adapter auto
      lora-gpt2 generate "Once upon a time" --adapter mine --no-verbatim 50 --disclose
      lora-gpt2 generate --prompts prompts.jsonl --out results.jsonl --adapter cooking --seed 1
      lora-gpt2 generate "Once" --temperature 0 --set generate.no_repeat_ngram_size=3
    """
    recipe = load_recipe(None, overrides, {**flags, "base": base})
    _check_options(prompt, adapters, compare, num, prompts, out)
    first_seed = secrets.randbelow(2**31) if seed is None else seed
    if seed is None:
        reporter.message(f"seed {first_seed}")
    guard = _build_guard(no_verbatim, store, recipe, reporter)
    from lora_gpt2.core.interrupt import catch_signals
    from lora_gpt2.inference.run import generate_prompt, generate_prompts

    how: dict[str, Any] = {"seed": first_seed, "truncate_left": truncate == "left", "guard": guard}
    if prompts is not None and out is not None:
        with catch_signals() as stop:
            written = generate_prompts(
                prompts, out, adapters, store, recipe, reporter=reporter, stop=stop, disclose=disclose, **how
            )
        emit(vars(written), as_json, lambda: f"{written.done} of {written.prompts} prompts continued: {out}")
        stop.raise_if_asked(f"{written.done} results are in {out}; run the same command to continue")
        return
    text, specs = _read_prompt(prompt, reporter), _split_adapters(compare, adapters)
    _warn_of_copies(num, recipe.generate, reporter)
    streams = num == 1 and len(specs) < 2 and ALL not in specs and not as_json
    shown = _Stream(text)
    on_text = shown.add if streams else None
    with catch_signals() as stop:
        generation = generate_prompt(
            text,
            specs,
            store,
            recipe,
            n=num,
            on_text=on_text,
            on_choice=lambda choice: reporter.message(str(choice)),
            stop=stop,
            **how,
        )
    said = {"disclosure": generation.disclosure} if disclose else {}
    if streams:
        shown.end()
    else:
        emit(generation.to_json() | said, as_json, lambda: _render(generation.outputs), is_own_text=True)
    if said and not as_json:
        click.echo(f"\n[{printable(generation.disclosure)}]")
    if generation.dropped:
        reporter.message(f"the first {generation.dropped} tokens of the prompt were left out, to make room")
    cut = [output for output in generation.outputs if output.constraint and output.finish_reason == "length"]
    if cut:
        which = "it" if len(generation.outputs) == 1 else f"{len(cut)} of {len(generation.outputs)} texts"
        reporter.message(f"{which} ended before the {cut[0].constraint} was complete; see --max-new-tokens")
    stop.raise_if_asked("the text so far is above")
    _end(generation.outputs, as_json)


def _warn_of_copies(num: int, settings: GenerateSettings, reporter: Reporter) -> None:
    """Says that several continuations are one text where nothing is sampled."""
    if num > 1 and settings.temperature == 0 and settings.num_beams == 1:
        reporter.message(f"nothing is sampled, so all {num} continuations are the same text: leave -n out")


def _check_options(
    prompt: str | None, adapters: tuple[str, ...], compare: str | None, num: int, prompts: Path | None, out: Path | None
) -> None:
    if compare and adapters:
        raise UsageError("--compare and --adapter exclude each other", "name the adapters in --compare a,b,base")
    if compare is not None and not compare.strip(","):
        raise UsageError("--compare names no adapter", "such as --compare law,code,base, or all")
    if AUTO in adapters and len(adapters) > 1:
        raise UsageError("'auto' chooses one adapter and is not mixed", "give --adapter auto alone")
    if (prompts is None) != (out is None):
        raise UsageError("--prompts and --out belong together", "--prompts prompts.jsonl --out results.jsonl")
    if prompts is not None and (prompt is not None or compare or num > 1):
        raise UsageError("--prompts takes neither PROMPT, --compare nor -n", "put them into the file's lines")


def _split_adapters(compare: str | None, adapters: tuple[str, ...]) -> list[str]:
    """Returns what is written under each: those of --compare, or the one mix of --adapter."""
    return [spec for spec in (compare or "+".join(adapters)).split(",") if spec]


def _read_prompt(prompt: str | None, reporter: Reporter) -> str:
    if prompt is not None and prompt != "-":
        return prompt
    if sys.stdin is not None and sys.stdin.isatty():
        reporter.message("type the prompt, then Ctrl-D (Ctrl-Z and Enter on Windows)")
    return read_stdin().rstrip("\n")


def _build_guard(tokens: int | None, store: Store, recipe: Recipe, reporter: Reporter) -> Guard | None:
    if tokens is None:
        return None
    from lora_gpt2.audit.run import forbid_copies

    if recipe.generate.reroute_every:
        raise UsageError("--no-verbatim must know the adapter beforehand", "leave generate.reroute_every out")
    return partial(forbid_copies, tokens=tokens, store=store, recipe=recipe, reporter=reporter)


class _Stream:
    """A text on standard output as it grows, its prompt first."""

    def __init__(self, prompt: str) -> None:
        self.pending = prompt

    def add(self, index: int, piece: str) -> None:
        click.echo(self.pending + piece, nl=False, color=True)
        self.pending = ""

    def end(self) -> None:
        click.echo(self.pending, color=True)


def _end(outputs: list[Output], as_json: bool) -> None:
    """Ends the command with the error of the first continuation that failed."""
    from lora_gpt2.inference.generate import raise_first_error

    if as_json and any(output.error for output in outputs):
        raise click.exceptions.Exit(CorruptError.exit_code)  # the one document has said it
    raise_first_error(outputs)


def _render(outputs: list[Output]) -> str:
    return "\n\n".join(f"=== {output.adapter} (seed {output.seed})\n{output.prompt}{output.text}" for output in outputs)
