"""Prompts and adapters as Python gives them, as requests."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_gpt2.core.errors import UsageError
from lora_gpt2.core.names import AUTO
from lora_gpt2.inference.generate import Request, iter_pieces
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.routing import AUTO_MIX, Router
from lora_gpt2.inference.session import Session
from lora_gpt2.recipe import GenerateSettings


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


def choose_seed(seed: int | None) -> int:
    """Returns a seed, drawn if there is none."""
    return secrets.randbelow(2**31) if seed is None else seed


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
    if bad := next((item for item in prompts if not isinstance(item, str)), None):
        raise UsageError(f"a prompt is a str, found {type(bad).__name__}", "generate_batch takes a list of texts")
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
