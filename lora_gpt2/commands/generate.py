"""`lora-gpt2 generate`: continue a prompt."""

from __future__ import annotations

import secrets
import sys
from typing import Any

import click

from lora_gpt2.commands.shared import base_option, emit, json_option, seed_option, set_option, store_option
from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import UsageError
from lora_gpt2.recipe import load_recipe
from lora_gpt2.store.catalog import Store


@click.command("generate")
@click.argument("prompt", required=False)
@click.option("--adapter", "adapters", multiple=True, metavar="N[:W]", help="Adapter; several mix, with weights.")
@click.option("--compare", metavar="A,B,base", help="Adapters side by side on one prompt, or 'all'.")
@click.option("-n", "--num", type=click.IntRange(1, 64), default=1, show_default=True, help="Continuations of each.")
@seed_option
@click.option("--truncate", type=click.Choice(["left"]), help="Keep the end of a prompt that is too long.")
@base_option
@set_option
@store_option
@json_option
@click.pass_obj
def command(
    reporter: Reporter, prompt: str | None, adapters: tuple[str, ...], compare: str | None, num: int, seed: int | None,
    truncate: str | None, base: str | None, overrides: tuple[str, ...], store: Store, as_json: bool,
) -> None:  # fmt: skip
    """Continue PROMPT (standard input if it is '-' or missing) with an adapter, a mix, or several side by side.

    \b
    Examples:
      lora-gpt2 generate "ROMEO:" --adapter shakespeare
      lora-gpt2 generate "Take two" --adapter cooking:0.7 --adapter shakespeare:0.3
      lora-gpt2 generate "The law" --compare all --seed 1
      lora-gpt2 generate "Once" --set generate.temperature=0 --set generate.max_new_tokens=40
    """
    recipe = load_recipe(None, overrides, base=base)
    if compare and adapters:
        raise UsageError("--compare and --adapter exclude each other", "name the adapters in --compare a,b,base")
    prompt = sys.stdin.read().rstrip("\n") if prompt in (None, "-") else prompt
    assert prompt is not None
    from lora_gpt2.core.interrupt import catch_signals
    from lora_gpt2.inference.generate import Request, count_dropped, generate
    from lora_gpt2.inference.open import open_session
    from lora_gpt2.inference.session import parse_mix

    if compare is not None and not compare.strip(","):
        raise UsageError("--compare names no adapter", "such as --compare law,code,base, or all")
    references = [name.partition(":")[0] for name in adapters] or [n for n in (compare or "").split(",") if n]
    session, references = open_session(store, references, recipe, recipe.generate.precision)
    mixes = [parse_mix([name]) for name in references] if compare else [parse_mix(adapters)]
    first_seed = secrets.randbelow(2**31) if seed is None else seed
    requests = [Request(prompt, mix, first_seed + i) for mix in mixes for i in range(num)]
    streams = len(requests) == 1 and not as_json

    shown: list[str] = []

    def show(index: int, piece: str) -> None:
        click.echo(piece if shown else prompt + piece, nl=False)
        shown.append(piece)

    with catch_signals() as stop:
        outputs = generate(session, requests, recipe.generate, show if streams else None, stop, truncate == "left")
    results = [output.to_json() for output in outputs]
    if streams:
        click.echo("" if shown else prompt)
    else:
        emit({"outputs": results}, as_json, lambda: _render(results))
    if dropped := count_dropped(session.base, prompt, recipe.generate):
        reporter.message(f"the first {dropped} tokens of the prompt were left out, to make room")
    if seed is None:
        reporter.message(f"seed {first_seed}")
    stop.raise_if_asked("the text so far is above")


def _render(outputs: list[dict[str, Any]]) -> str:
    return "\n\n".join(
        f"=== {item['adapter']} (seed {item['seed']})\n{item['prompt']}{item['text']}" for item in outputs
    )
