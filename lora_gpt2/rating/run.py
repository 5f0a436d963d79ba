"""Starting a round: the texts that people are to compare are written, or taken from what was recorded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.errors import UsageError
from lora_gpt2.core.interrupt import catch_signals
from lora_gpt2.inference.generate import build_writer
from lora_gpt2.inference.history import find_log, read_log
from lora_gpt2.inference.mix import Mix
from lora_gpt2.inference.open import open_session
from lora_gpt2.rating.rounds import CRITERIA, Mode, Round, check_free, write_round
from lora_gpt2.rating.votes import find_texts
from lora_gpt2.recipe import Recipe
from lora_gpt2.store.catalog import Store

RECORDED = "recorded"  # stands for the base where the texts were recorded


def start_round(
    folder: Path,
    adapters: Sequence[str],
    prompts: Sequence[str],
    store: Store,
    recipe: Recipe,
    reporter: Reporter,
    *,
    mode: Mode = "pairwise",
    criteria: Sequence[str] = CRITERIA,
    seed: int = 0,
) -> Round:
    """Lets each adapter, mix or `base` continue each prompt, and writes the round to a folder.

    Raises:
        ConflictError: the folder has a round.
        UsageError: fewer than two different adapters, or no prompt.
        NotFoundError: there is no such adapter.
        Interrupted: a stop was requested; nothing is written.
    """
    _check(folder, adapters)
    if not prompts:
        raise UsageError("a round needs a prompt", "write one on each line of --prompts FILE")
    names = [name for spec in adapters for name in Mix.parse(spec).references]
    session, _ = open_session(store, names, recipe, recipe.generate.dtype)
    with catch_signals() as stop:
        write = build_writer(session, reporter, stop, seed)
        columns = [write(spec, prompts, recipe.generate) for spec in adapters]
    round_ = Round(
        base=session.base.name,
        adapters=tuple(adapters),
        prompts=tuple(prompts),
        texts=tuple(zip(*columns, strict=True)),
        mode=mode,
        criteria=tuple(criteria),
    )
    write_round(folder, round_)
    return round_


def start_recorded_round(
    folder: Path, adapters: Sequence[str], *, mode: Mode = "pairwise", criteria: Sequence[str] = CRITERIA
) -> Round:
    """Writes a round of the newest texts that the REPL recorded for prompts which each of the adapters continued.

    Raises what `start_round` does, and `DataError` if there is no such prompt.
    """
    _check(folder, adapters)
    named = tuple(str(Mix.parse(spec)) for spec in adapters)
    prompts, texts = find_texts(read_log(find_log()), named)
    round_ = Round(base=RECORDED, adapters=named, prompts=prompts, texts=texts, mode=mode, criteria=tuple(criteria))
    write_round(folder, round_)
    return round_


def _check(folder: Path, adapters: Sequence[str]) -> None:
    check_free(folder)
    if len(set(adapters)) < 2 or len(set(adapters)) < len(adapters):
        raise UsageError("a round needs two different adapters or more", "--adapter a --adapter base")
