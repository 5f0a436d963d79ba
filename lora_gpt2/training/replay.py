"""General text on which an adapter is to predict what the base predicts, so that it forgets little.

Where `train.forget` is set, each step also replays some blocks of general text, and the KL divergence from the base
(Kullback and Leibler 1951) on them is added to the loss, weighted by a multiplier that rises while the divergence is
over the budget and falls while it is not (`TrainingSlot.record_divergence`). The base's hidden states over the text are
computed once and kept, so that replaying costs one pass of the adapters and no pass of the base.

`replay.jsonl`, beside this file, is what is replayed unless `train.replay` says otherwise: 154 passages of English from
old books and presidents' addresses (public domain), agencies' pages and the World Factbook (U.S. government) and
abstracts (arXiv, CC0). None is of a document that `evaluation/general.txt` is from, on which forgetting is reported.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lora_gpt2.core.console import Reporter
from lora_gpt2.core.dirs import find_cache_dir
from lora_gpt2.core.files import wrap_os_errors, write_atomic
from lora_gpt2.core.interrupt import StopRequest
from lora_gpt2.data.blocks import IGNORE, BlockBatch, TokenBlocks
from lora_gpt2.data.prepared import PreparedData, open_prepared, prepare_data
from lora_gpt2.data.tokenizer import Tokenizer
from lora_gpt2.inference.generate import Request, iter_outputs
from lora_gpt2.inference.session import Session
from lora_gpt2.model.base import Base
from lora_gpt2.model.gpt2 import ActiveAdapters
from lora_gpt2.model.loss import linear_kl_divergence
from lora_gpt2.model.runtime import as_float64
from lora_gpt2.recipe import DataSettings, GenerateSettings, Recipe

BUNDLED = Path(__file__).with_name("replay.jsonl")
HELD_OUT_SHARE = 16
"""One of so many blocks is not replayed: divergence is measured on it."""
WRITTEN_TOKENS = 256
"""Longest text that the base writes to be replayed."""
BATCH = 8


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Blocks of general text, and the base's hidden states over them.

    Args:
        fingerprint: of the text.
        batch: `[blocks, time]`.
        hidden: after the last norm, `[blocks, time, width]`, in the base's dtype, on the host.
        num_held_out: number of blocks, the last ones, that are only measured on.
    """

    fingerprint: str
    batch: BlockBatch
    hidden: Tensor
    num_held_out: int

    @property
    def num_replayed(self) -> int:
        """Number of blocks that are trained on."""
        return len(self.hidden) - self.num_held_out

    def indices(self, step: int, count: int, seed: int) -> list[int]:
        """Returns the blocks that a slot with this seed replays in a step."""
        positions = range(step * count, (step + 1) * count)
        return [int(self._shuffle(seed, p // self.num_replayed)[p % self.num_replayed]) for p in positions]

    def _shuffle(self, seed: int, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return np.random.default_rng([seed, epoch, len(self.hidden)]).permutation(self.num_replayed)

    @torch.no_grad()
    def measure_divergence(self, base: Base, adapters: ActiveAdapters) -> float:
        """Returns the mean KL divergence from the base on the held-out blocks, in nats per target."""
        device, total = base.runtime.device, 0.0
        chosen = range(self.num_replayed, len(self.hidden))
        batch, reference = self.batch.take(chosen), self.hidden[self.num_replayed :]
        for start in range(0, len(chosen), BATCH):
            part = slice(start, start + BATCH)
            hidden = base.model(torch.from_numpy(batch.inputs[part]).to(device), adapters)
            divergence = linear_kl_divergence(
                hidden.flatten(0, 1),
                base.model.padded_head,
                torch.from_numpy(batch.targets[part]).to(device).flatten(),
                adapters.low_rank_logits(hidden),
                reference[part].to(device).flatten(0, 1),
                base.model.config.vocab_size,
            )
            total += float(as_float64(divergence).sum())
        return total / max(1, int((batch.targets != IGNORE).sum()))


def open_replay(
    recipes: Sequence[Recipe], base: Base, reporter: Reporter, prepared: Path | None = None
) -> Replay | None:
    """Returns the text that the recipes replay; None if none of them has a budget of forgetting.

    `prepared` is the folder of what `prepare_replay` made of `train.replay` before. Raises what reading that may raise.
    """
    wanted = [recipe for recipe in recipes if recipe.train.forget is not None]
    if not wanted:
        return None
    train = wanted[0].train
    if isinstance(train.replay, str):  # "generated"
        settings = _find_settings(wanted[0], (str(write_text(base, train.replay_tokens, reporter)),))
    else:
        settings = _find_settings(wanted[0], train.replay)
    if prepared:
        data = open_prepared(prepared, settings, base.tokenizer)
    else:
        data = prepare_data(settings, base.tokenizer, reporter)
    batch = _choose_blocks(data.train, max(2, train.replay_tokens // settings.block_size))
    hidden = _run_base(base, batch, reporter)
    num_held_out = max(1, len(hidden) // HELD_OUT_SHARE)
    return Replay(fingerprint=data.fingerprint, batch=batch, hidden=hidden, num_held_out=num_held_out)


def prepare_replay(recipes: Sequence[Recipe], tokenizer: Tokenizer, reporter: Reporter) -> PreparedData | None:
    """Returns the files of `train.replay` as they are replayed; None if they are not, or there are none."""
    for recipe in recipes:
        replay = recipe.train.replay
        if recipe.train.forget is not None and replay and not isinstance(replay, str):
            return prepare_data(_find_settings(recipe, replay), tokenizer, reporter)
    return None


def _find_settings(recipe: Recipe, sources: tuple[str, ...]) -> DataSettings:
    """Returns how files, or the bundled text where there are none, become blocks."""
    return DataSettings(
        sources=sources or (str(BUNDLED),),
        block_size=recipe.data.block_size,
        validation_fraction=0.05,
        test_fraction=0.0,
    )


def _choose_blocks(blocks: TokenBlocks, count: int) -> BlockBatch:
    """Returns so many blocks, evenly spread over the text; the same one twice where there is only one."""
    chosen = np.linspace(0, blocks.num_blocks - 1, max(2, min(count, blocks.num_blocks)))
    return blocks.read([int(index) for index in chosen])


@torch.no_grad()
def _run_base(base: Base, batch: BlockBatch, reporter: Reporter) -> Tensor:
    """Returns the base's hidden states over some blocks, on the host."""
    found = []
    with reporter.task("reading the replayed text", batch.inputs.size, "tokens") as task:
        for start in range(0, len(batch.inputs), BATCH):
            inputs = torch.from_numpy(batch.inputs[start : start + BATCH])
            found.append(base.model(inputs.to(base.runtime.device), None).cpu())
            task.advance(inputs.numel())
    return torch.cat(found)


def write_text(base: Base, num_tokens: int, reporter: Reporter) -> Path:
    """Returns a file of texts that the base wrote, by plain sampling from its own distribution; kept in the cache."""
    path = find_cache_dir() / "replay" / f"{base.fingerprint}-{num_tokens}.jsonl"
    if path.is_file():
        return path
    length = min(WRITTEN_TOKENS, base.config.n_positions - 1)
    settings = GenerateSettings(max_new_tokens=length, temperature=1.0, top_k=0, top_p=1.0)
    texts = list[str]()
    with reporter.task("writing the text to replay", num_tokens, "tokens") as task:
        written = 0
        while written < num_tokens:
            requests = [Request("", seed=len(texts) + index) for index in range(16)]
            for _, output in iter_outputs(Session(base), requests, settings, stop=StopRequest()):
                texts.append(output.text)
                written += output.tokens
                task.advance(output.tokens)
    with wrap_os_errors(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, "".join(json.dumps({"text": text}) + "\n" for text in texts if text.strip()).encode())
    return path
