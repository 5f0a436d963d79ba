"""Prompts and adapters as Python gives them, as requests."""

from __future__ import annotations

import operator
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_gpt2.core.errors import UsageError
from lora_gpt2.core.names import AUTO
from lora_gpt2.data.tokenizer import check_texts
from lora_gpt2.inference.generate import Request, iter_pieces
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.routing import AUTO_MIX, Router
from lora_gpt2.inference.session import Session
from lora_gpt2.model.lora import Adapter
from lora_gpt2.recipe import GenerateSettings
from lora_gpt2.store.references import BASE


def parse_mix(adapter: Any) -> Mix:
    """Returns the mix that an adapter, a version, a mix or None names; raises `UsageError` for `auto`."""
    if isinstance(adapter, Mix):
        mix = adapter
    elif isinstance(adapter, Mapping):
        mix = Mix.parse(adapter)
    else:
        mix = Mix() if adapter is None else Mix.parse(str(adapter))
    if AUTO in mix.references:
        raise UsageError("'auto' needs a prompt to choose by", "name an adapter")
    return mix


def to_spec(adapter: Any) -> str:
    """Returns what an adapter, a version, a mix or `all` is called on the command line, with all digits of weights."""
    if isinstance(adapter, str):
        return adapter
    return "+".join(f"{reference}:{weight!r}" for reference, weight in parse_mix(adapter)) or BASE


def choose_seed(seed: int | None) -> int:
    """Returns a seed, drawn if there is none; raises `UsageError` for what is no whole number."""
    try:
        return secrets.randbelow(2**31) if seed is None else operator.index(seed)
    except TypeError as error:
        raise UsageError(f"a seed is a whole number, found {type(seed).__name__}", "pass an int, or None") from error


def list_adapters(adapter: Any) -> list[Any]:
    """Returns several adapters as they are, or one as a list; raises `UsageError` for none."""
    found = list(adapter) if isinstance(adapter, list | tuple) and not isinstance(adapter, Mix) else [adapter]
    if not found:
        raise UsageError("no adapter is named", "pass None for the base")
    return found


def build_requests(prompts: Sequence[str], adapter: Any, n: int, seed: int | None, router: Router) -> list[Request]:
    """Returns `n` requests for each prompt; see `Model.generate_batch`."""
    if isinstance(prompts, str):
        raise UsageError("prompts are a list of str", "generate_batch([prompt]), or generate(prompt)")
    each = list_adapters(adapter)
    if len(each) not in (1, len(prompts)):
        raise UsageError(
            f"{len(prompts)} prompts, {len(each)} adapters", "pass one, or generate_batch one for each prompt"
        )
    each = each * len(prompts) if len(each) == 1 else each
    check_texts(prompts, "a prompt")
    first = choose_seed(seed)
    mixes = [AUTO_MIX if item == AUTO else parse_mix(item) for item in each]
    routes = [router.route(p) if mix == AUTO_MIX else None for p, mix in zip(prompts, mixes, strict=True)]
    return [
        Request(prompt, mix, first + index * n + i, route=route, beam_rank=i)
        for index, (prompt, mix, route) in enumerate(zip(prompts, mixes, routes, strict=True))
        for i in range(n)
    ]


def iter_text(
    session: Session, requests: Sequence[Request], settings: GenerateSettings, truncate_left: bool
) -> Iterator[str]:
    """Yields the text of requests as it grows; raises the error of one that fails."""
    for _, text, output in iter_pieces(session, requests, settings, truncate_left=truncate_left):
        if output is not None and output.error is not None:
            raise output.error
        if text:
            yield text


def add_in_memory(session: Session, adapters: Mapping[str, Adapter], is_new: bool = True) -> None:
    """Loads adapters that are in no store; a new one can be loaded from nowhere again, so it keeps its slot."""
    session.load_in_memory(adapters)
    for name in adapters if is_new else ():
        session.slots.pin(Mix.single(name))
