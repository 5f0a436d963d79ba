"""`lora-gpt2 generate`: continue a prompt."""

from __future__ import annotations

import secrets
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_gpt2.commands.settings import setting_options
from lora_gpt2.commands.shared import emit, seed_option, session_options
from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import CorruptError, UsageError
from lora_gpt2.core.names import ALL, AUTO
from lora_gpt2.core.printable import printable
from lora_gpt2.core.user_files import check_output, read_stdin
from lora_gpt2.inference.disclosure import describe_origin, write_disclosure
from lora_gpt2.recipe import Recipe
from lora_gpt2.recipe_files import load_recipe
from lora_gpt2.store.catalog import Store

if TYPE_CHECKING:
    from lora_gpt2.inference.generate import Request
    from lora_gpt2.inference.session import Session


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
    job = _Job(
        reporter=reporter,
        store=store,
        recipe=recipe,
        seed=first_seed,
        truncate_left=truncate == "left",
        as_json=as_json,
        no_verbatim=no_verbatim,
        disclose=disclose,
    )
    if prompts is not None and out is not None:
        job.run_file(prompts, out, adapters)
        return
    if prompt in (None, "-") and sys.stdin is not None and sys.stdin.isatty():
        reporter.message("type the prompt, then Ctrl-D (Ctrl-Z and Enter on Windows)")
    text = read_stdin().rstrip("\n") if prompt in (None, "-") else prompt
    assert text is not None
    job.run_prompt(text, adapters, compare, num)


def _check_options(
    prompt: str | None, adapters: tuple[str, ...], compare: str | None, num: int, prompts: Path | None, out: Path | None
) -> None:
    if compare and adapters:
        raise UsageError("--compare and --adapter exclude each other", "name the adapters in --compare a,b,base")
    if compare is not None and not compare.strip(","):
        raise UsageError("--compare names no adapter", "such as --compare law,code,base, or all")
    if "auto" in adapters and len(adapters) > 1:
        raise UsageError("'auto' chooses one adapter and is not mixed", "give --adapter auto alone")
    if (prompts is None) != (out is None):
        raise UsageError("--prompts and --out belong together", "--prompts prompts.jsonl --out results.jsonl")
    if prompts is not None and (prompt is not None or compare or num > 1 or "auto" in adapters):
        raise UsageError("--prompts takes neither PROMPT, --compare, -n nor 'auto'", "put them into the file's lines")


@dataclass(frozen=True, kw_only=True)
class _Job:
    reporter: Reporter
    store: Store
    recipe: Recipe
    seed: int
    truncate_left: bool
    as_json: bool
    no_verbatim: int | None
    disclose: bool

    def guard(self, requests: list[Request]) -> list[Request]:
        """Returns the requests, with --no-verbatim such that they copy nothing of any adapter's training text."""
        if self.no_verbatim is None:
            return requests
        from dataclasses import replace

        from lora_gpt2.data.ngram_index import NgramIndex
        from lora_gpt2.evaluation.held_out import read_own_text

        own_base = self.recipe.base if "base" in self.recipe.model_fields_set else None
        names = dict.fromkeys(name for request in requests for name, _ in request.mix)
        texts = [read_own_text(self.store, name, self.reporter, own_base).prepared.train.stream for name in names]
        indexes = [NgramIndex(text, self.no_verbatim - 1) for text in texts]
        return [replace(request, no_verbatim=indexes) for request in requests]

    def run_file(self, prompts: Path, out: Path, adapters: tuple[str, ...]) -> None:
        from lora_gpt2.core.interrupt import catch_signals
        from lora_gpt2.inference.batch import generate_file, read_prompts
        from lora_gpt2.inference.mix import Mix
        from lora_gpt2.inference.open import open_session

        check_output(out)
        requests = read_prompts(prompts, Mix.parse(adapters), self.seed)
        names = [name for request in requests for name, _ in request.mix]
        session, _ = open_session(self.store, names, self.recipe, self.recipe.generate.dtype)
        with catch_signals() as stop:
            done = generate_file(
                session,
                self.guard(requests),
                out,
                self.recipe.generate,
                stop,
                reporter=self.reporter,
                truncate_left=self.truncate_left,
            )
        if self.disclose:
            write_disclosure(out, session.base.name, list(dict.fromkeys(names)))
        result = {"path": str(out), "prompts": len(requests), "done": done}
        emit(result, self.as_json, lambda: [f"{done} of {len(requests)} prompts continued: {out}"])
        stop.raise_if_asked(f"{done} results are in {out}; run the same command to continue")

    def run_prompt(self, prompt: str, adapters: tuple[str, ...], compare: str | None, num: int) -> None:
        from lora_gpt2.core.interrupt import catch_signals
        from lora_gpt2.inference.generate import Request, count_dropped, generate_all, raise_first_error
        from lora_gpt2.inference.mix import Mix
        from lora_gpt2.inference.open import open_session

        auto = adapters == (AUTO,)
        specs = [ALL] if auto else [spec for spec in (compare or "+".join(adapters)).split(",") if spec]
        session, mixes = open_session(self.store, specs, self.recipe, self.recipe.generate.dtype)
        chosen = self._choose(session, prompt, list(map(str, mixes))) if auto else {}
        mixes = [Mix.parse(chosen["adapter"])] if auto else mixes or [Mix()]
        requests = [Request(prompt, mix, self.seed + i) for mix in mixes for i in range(num)]
        streams = len(requests) == 1 and not self.as_json
        shown: list[str] = []

        def show(index: int, piece: str) -> None:
            click.echo(piece if shown else prompt + piece, nl=False, color=True)
            shown.append(piece)

        settings = self.recipe.generate
        with catch_signals() as stop:
            outputs = generate_all(
                session,
                self.guard(requests),
                settings,
                on_text=show if streams else None,
                stop=stop,
                truncate_left=self.truncate_left,
            )
        results = [output.to_json() for output in outputs]
        named = ", ".join(dict.fromkeys(item["adapter"] for item in results))
        said = {"disclosure": describe_origin(session.base.name, named)} if self.disclose else {}
        if streams:
            click.echo("" if shown else prompt, color=True)
        else:
            emit({"outputs": results} | chosen | said, self.as_json, lambda: _render(results), is_own_text=True)
        if said and not self.as_json:
            click.echo(f"\n[{printable(said['disclosure'])}]")
        if dropped := count_dropped(session.base, prompt, settings):
            self.reporter.message(f"the first {dropped} tokens of the prompt were left out, to make room")
        stop.raise_if_asked("the text so far is above")
        if self.as_json and any(output.error for output in outputs):
            raise click.exceptions.Exit(CorruptError.exit_code)  # the one document has said it
        raise_first_error(outputs)

    def _choose(self, session: Session, prompt: str, names: list[str]) -> dict[str, Any]:
        from lora_gpt2.inference.choose import choose_adapter

        choice = choose_adapter(session, prompt, names)
        how = f"{choice.probability:.0%} sure" if choice.adapter != "base" else "no adapter is clearly the one"
        self.reporter.message(f"adapter {choice.adapter}: {how}")
        return {"adapter": choice.adapter, "probability": choice.probability, "nll_nats_per_token": choice.nll}


def _render(outputs: list[dict[str, Any]]) -> str:
    return "\n\n".join(
        f"=== {item['adapter']} (seed {item['seed']})\n{item['prompt']}{item['text']}" for item in outputs
    )
