"""Pairs of texts as rows of tokens: the chosen and the rejected one in turn, with the prompt before each."""

from __future__ import annotations

import random
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lora_gpt2.core.errors import DataError
from lora_gpt2.data.blocks import IGNORE, Ints
from lora_gpt2.data.tokenizer import Tokenizer
from lora_gpt2.model.fused import TrainingAdapters
from lora_gpt2.model.gpt2 import GPT2
from lora_gpt2.model.scoring import token_nll
from lora_gpt2.rating.preferences import LabelledText, Preference

ROUNDED_TO = 32  # tokens; few shapes
HELD_OUT, FEWEST_HELD_OUT, MOST_HELD_OUT = 0.1, 4, 2  # the share, the least number, and how far above the share


@dataclass(frozen=True, kw_only=True)
class PairRows:
    """`inputs` and `targets` `[2 * pairs, time]`; targets of prompts and padding are `IGNORE`.

    `num_cut` texts were cut to fit.
    """

    inputs: Ints
    targets: Ints
    num_cut: int

    @property
    def num_pairs(self) -> int:
        """Number of pairs."""
        return len(self.inputs) // 2

    @property
    def lengths(self) -> Ints:
        """Number of scored tokens of each text, `[pairs, 2]`: chosen and rejected."""
        counts: Ints = (self.targets != IGNORE).sum(1).reshape(-1, 2)
        return counts

    def read(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns inputs and targets of some rows, `[rows, time]`, without the padding that all of them have."""
        targets = self.targets[list(rows)]
        used = int(np.flatnonzero((targets != IGNORE).any(0)).max(initial=0)) + 1
        time = min(targets.shape[1], -(-used // ROUNDED_TO) * ROUNDED_TO)
        return torch.from_numpy(self.inputs[list(rows), :time]), torch.from_numpy(targets[:, :time])

    def rows_of(self, pairs: Sequence[int]) -> list[int]:
        """Returns the rows of some pairs."""
        return [row for pair in pairs for row in (2 * pair, 2 * pair + 1)]


def encode_pairs(pairs: Sequence[Preference], tokenizer: Tokenizer, max_tokens: int) -> PairRows:
    """Returns pairs as rows of at most `max_tokens`: of a long prompt its end is kept, of a long text its beginning."""
    rows, num_cut = [], 0
    for pair in pairs:
        other = pair.prompt if pair.rejected_prompt is None else pair.rejected_prompt
        is_rejected_whole = pair.is_whole if pair.is_rejected_whole is None else pair.is_rejected_whole
        sides = (pair.chosen, pair.prompt, pair.is_whole), (pair.rejected, other, is_rejected_whole)
        for text, before, is_whole in sides:
            prompt = list(tokenizer.encode(before)) or [tokenizer.eos_id]
            ids = [*tokenizer.encode(text), *([tokenizer.eos_id] if is_whole else [])]
            num_cut += len(ids) > max_tokens
            ids = ids[:max_tokens]
            kept = prompt[-max(1, max_tokens + 1 - len(ids)) :]
            rows.append((kept, ids))
    longest = max(len(prompt) + len(ids) - 1 for prompt, ids in rows)
    time = min(max_tokens, -(-longest // ROUNDED_TO) * ROUNDED_TO)
    inputs = np.zeros((len(rows), time), dtype=np.int64)
    targets = np.full((len(rows), time), IGNORE, dtype=np.int64)
    for row, (prompt, ids) in enumerate(rows):
        whole = [*prompt, *ids]
        inputs[row, : len(whole) - 1] = whole[:-1]
        targets[row, len(prompt) - 1 : len(whole) - 1] = ids
    return PairRows(inputs=inputs, targets=targets, num_cut=num_cut)


def split_pairs(pairs: Sequence[Preference]) -> tuple[list[int], list[int]]:
    """Returns the pairs to train on and those that are held out: whole prompts, chosen by their hash."""
    prompts = _order_prompts({pair.prompt for pair in pairs})
    of_prompt = Counter(pair.prompt for pair in pairs)
    wanted, chosen, count = max(FEWEST_HELD_OUT, round(HELD_OUT * len(pairs))), set[str](), 0
    for prompt in prompts[: len(prompts) - 1]:
        if count >= wanted:
            break
        chosen.add(prompt)
        count += of_prompt[prompt]
    if not chosen:  # one prompt for all
        return list(range(wanted, len(pairs))), list(range(wanted))
    trained = [index for index, pair in enumerate(pairs) if pair.prompt not in chosen]
    return trained, [index for index, pair in enumerate(pairs) if pair.prompt in chosen]


def _order_prompts(prompts: set[str]) -> list[str]:
    return sorted(prompts, key=lambda prompt: zlib.crc32(prompt.encode("utf-8", "replace")))


def match_labelled(texts: Sequence[LabelledText]) -> tuple[list[Preference], tuple[list[int], list[int]]]:
    """Returns labelled texts in pairs of a desirable and an undesirable one, and which to train on and to hold out.

    Texts of the rarer label are in several pairs, so that both labels count alike; whole prompts are held out, chosen
    by their hash. Raises `DataError` where there are too few of a label, or only copies of one.
    """
    counts = Counter(text.is_desirable for text in texts)
    if min(counts[True], counts[False]) < FEWEST_HELD_OUT:
        shown = f"{counts[True]} desirable and {counts[False]} undesirable texts"
        raise DataError(f"{shown} are labelled", f"at least {FEWEST_HELD_OUT} of each are needed")
    held_out = _choose_held_out(texts, counts)
    if len({texts[index].is_desirable for index in held_out}) < len(counts):
        raise DataError("all texts of a label are copies of each other", "label different ones, some to hold out")
    pairs: list[Preference] = []
    parts: list[list[int]] = []
    for is_held_out in (False, True):
        begin = len(pairs)
        part = [text for index, text in enumerate(texts) if (index in held_out) == is_held_out]
        sides = [[text for text in part if text.is_desirable == label] for label in (True, False)]
        for number in range(max(map(len, sides))):
            good, bad = (side[number % len(side)] for side in sides)
            pairs.append(
                Preference(
                    prompt=good.prompt,
                    chosen=good.text,
                    rejected=bad.text,
                    is_whole=good.is_whole,
                    rejected_prompt=bad.prompt,
                    is_rejected_whole=bad.is_whole,
                )
            )
        parts.append(list(range(begin, len(pairs))))
    return pairs, (parts[0], parts[1])


def _choose_held_out(texts: Sequence[LabelledText], counts: Counter[bool]) -> set[int]:
    """Returns the texts to hold out: whole prompts where that leaves both labels to train on, the rarer label first."""
    labels: dict[str, Counter[bool]] = {}
    for text in texts:
        labels.setdefault(text.prompt, Counter())[text.is_desirable] += 1
    wanted = {label: max(FEWEST_HELD_OUT // 2, round(HELD_OUT * counts[label])) for label in counts}
    chosen, held = set[str](), Counter[bool]()
    for label in sorted(counts, key=lambda label: counts[label]):
        for prompt in _order_prompts({prompt for prompt, found in labels.items() if found[label]} - chosen):
            with_it = held + labels[prompt]
            if held[label] < wanted[label] and all(with_it[each] <= MOST_HELD_OUT * wanted[each] for each in counts):
                chosen.add(prompt)
                held = with_it
    if all(held[label] for label in counts):
        return {index for index, text in enumerate(texts) if text.prompt in chosen}
    return _choose_held_out_texts(texts, counts, wanted)


def _choose_held_out_texts(texts: Sequence[LabelledText], counts: Counter[bool], wanted: dict[bool, int]) -> set[int]:
    """Returns the texts to hold out where prompts are too few: by the hash of the text, copies together."""
    found = set[int]()
    for label in counts:
        of_text: dict[str, list[int]] = {}
        for index, text in enumerate(texts):
            if text.is_desirable == label:
                of_text.setdefault(text.text, []).append(index)
        taken = list[int]()
        for each in _order_prompts(set(of_text)):
            if len(taken) < wanted[label] and len(taken) + len(of_text[each]) < counts[label]:
                taken += of_text[each]
        found |= set(taken)
    return found


def mismatch_pairs(pairs: Sequence[Preference], split: tuple[Sequence[int], Sequence[int]]) -> list[Preference]:
    """Returns each pair's prompts with the texts of another pair of its part, in a random order.

    How likely an adapter makes texts that do not belong to a prompt says how far it is from its reference.
    """
    found = list(pairs)
    for part in split:
        order = random.Random(0).sample(list(part), len(part))  # noqa: S311 - an order, no secret
        for one, other in zip(order, order[1:] + order[:1], strict=True):
            taken = {key: getattr(pairs[other], key) for key in ("chosen", "rejected", "is_whole", "is_rejected_whole")}
            found[one] = replace(pairs[one], **taken)
    return found


def iter_groups(rows: Sequence[int], time: int, most_tokens: int) -> Iterator[list[int]]:
    """Yields rows in groups of whole pairs that hold at most so many tokens, one pair at least."""
    size = 2 * max(1, most_tokens // (2 * time))
    for start in range(0, len(rows), size):
        yield list(rows[start : start + size])


@torch.no_grad()
def score_rows(
    model: GPT2, adapters: TrainingAdapters, pairs: PairRows, rows: Sequence[int], most_tokens: int
) -> Float[Tensor, " rows"]:
    """Returns the log-likelihood of each row in nats, on the host."""
    device, found = model.wte.weight.device, []
    for group in iter_groups(rows, pairs.inputs.shape[1], most_tokens):
        inputs, targets = (side.to(device) for side in pairs.read(group))
        found.append(-token_nll(model, inputs, targets.flatten(), adapters).view(len(group), -1).sum(1))
    return torch.cat(found).cpu()
