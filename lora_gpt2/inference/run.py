"""Generation in one call: continuations of a prompt under several adapters, or of a file of prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.interrupt import StopRequest
from lora_gpt2.core.names import AUTO
from lora_gpt2.core.user_files import check_output
from lora_gpt2.inference.batch import generate_file, read_prompts
from lora_gpt2.inference.choose import AdapterChoice
from lora_gpt2.inference.disclosure import format_disclosure, write_disclosure
from lora_gpt2.inference.generate import OnText, Output, Request, count_dropped, generate_all
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.open import open_session
from lora_gpt2.inference.routing import Router
from lora_gpt2.recipe import Recipe
from lora_gpt2.store.catalog import Store

Guard = Callable[[Sequence[Request]], Sequence[Request]]
"""Changes requests before they run, such as by forbidding copies of training text."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Continuations of a prompt.

    Args:
        outputs: for each adapter or mix, for each of `n`.
        base: name of the base.
        choice: what `auto` chose, and how sure that is; None where adapters were named.
        dropped: number of tokens that the prompt lost, to make room.
    """

    outputs: list[Output]
    base: str
    choice: AdapterChoice | None
    dropped: int

    @property
    def disclosure(self) -> str:
        """The sentence that says by what the texts were generated."""
        return format_disclosure(self.base, ", ".join(dict.fromkeys(output.adapter for output in self.outputs)))

    def to_json(self) -> dict[str, Any]:
        """Returns the result with the keys of `generate --json`."""
        chosen = asdict(self.choice) if self.choice else {}
        return {"outputs": [output.to_json() for output in self.outputs]} | chosen


@dataclass(frozen=True, kw_only=True)
class FileGeneration:
    """Of a file's `prompts`, how many are `done`, in the file at `path`."""

    path: str
    prompts: int
    done: int


def generate_prompt(
    prompt: str,
    adapters: Sequence[str],
    store: Store,
    recipe: Recipe,
    *,
    n: int = 1,
    seed: int = 0,
    truncate_left: bool = False,
    guard: Guard | None = None,
    on_text: OnText | None = None,
    on_choice: Callable[[AdapterChoice], None] | None = None,
    stop: StopRequest | None = None,
) -> Generation:
    """Continues a prompt under each of some adapters and mixes, in one batch.

    Args:
        prompt: the text to continue.
        adapters: names, versions, mixes or `base`; `all`; or `auto` alone, which lets the prompt decide. None of them
            is the base.
        store: where they are.
        recipe: its `generate` settings; its `base` if it was set, else that of the first adapter.
        n: number of continuations under each; with beams, the best ones that the search finds.
        seed: of the first continuation of each; the next has `seed + 1`, and so on.
        truncate_left: drop the beginning of a prompt that is too long, instead of raising.
        guard: changes the requests before they run.
        on_text: receives the text as it grows.
        on_choice: receives what `auto` chose, before the first text.
        stop: ends the continuations as they are, when a stop is requested.

    Returns:
        The continuations; failed ones have their `error`.

    Raises:
        UsageError: the prompt does not fit, or a mix is none.
        NotFoundError: there is no such adapter.
    """
    is_auto = list(adapters) == [AUTO]
    session, mixes = open_session(store, [] if is_auto else adapters, recipe, recipe.generate.dtype)
    router = Router(session, on_choice=on_choice or (lambda choice: None)) if is_auto else None
    route = router.route(prompt) if router is not None else None
    mixes = [Mix.parse(route.choice.adapter)] if route is not None else mixes
    requests: Sequence[Request] = [
        Request(prompt=prompt, mix=mix, seed=seed + i, route=route, beam_rank=i)
        for mix in mixes or [Mix()]
        for i in range(n)
    ]
    requests = guard(requests) if guard is not None else requests
    outputs = generate_all(session, requests, recipe.generate, on_text=on_text, stop=stop, truncate_left=truncate_left)
    dropped = count_dropped(session.base, prompt, recipe.generate) if truncate_left else 0
    choice = route.choice if route is not None else None
    return Generation(outputs=outputs, base=session.base.name, choice=choice, dropped=dropped)


def generate_prompts(
    prompts: Path,
    out: Path,
    adapters: Sequence[str],
    store: Store,
    recipe: Recipe,
    *,
    reporter: Reporter,
    stop: StopRequest,
    seed: int = 0,
    truncate_left: bool = False,
    guard: Guard | None = None,
    disclose: bool = False,
) -> FileGeneration:
    """Continues the prompts of a file whose results are not yet in `out`; see `batch` for both formats.

    Args:
        prompts: the file of prompts.
        out: where results go; with results of these prompts in it, what is missing is added.
        adapters: one mix, for prompts without their own.
        store: where the adapters are.
        recipe: see `generate_prompt`.
        reporter: shows progress.
        stop: ends after the continuations that are finished, when a stop is requested.
        seed: plus its index, of a prompt without its own.
        truncate_left: drop the beginning of prompts that are too long, instead of raising.
        guard: changes the requests before they run.
        disclose: say beside `out` by what the texts were generated.

    Raises what `generate_file` does.
    """
    check_output(out)
    requests: Sequence[Request] = read_prompts(prompts, Mix.parse(adapters), seed)
    names = list(dict.fromkeys(name for request in requests for name, _ in request.mix if name != AUTO))
    session, _ = open_session(store, names, recipe, recipe.generate.dtype)
    requests = guard(requests) if guard is not None else requests
    done = generate_file(session, requests, out, recipe.generate, stop, reporter=reporter, truncate_left=truncate_left)
    if disclose:
        write_disclosure(out, session.base.name, names)
    return FileGeneration(path=str(out), prompts=len(requests), done=done)
