"""A page of texts in which each token is coloured by how much better an adapter predicts it than the base does."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lora_gpt2.core.pages import render_page
from lora_gpt2.evaluation.token_scores import Gain, TokenScores, round_finite, sum_gains
from lora_gpt2.store.references import BASE

MAX_FIGURES = 200_000  # tokens shown times rows: a page of a few megabytes
MAX_WORDS = 15


def build_token_page(scores: Sequence[TokenScores], base: str) -> str:
    """Returns the page, for at least one document: the first ones, and sums over all; it loads nothing."""
    rows = list(scores[0].logprobs)
    sources = list(dict.fromkeys(document.source for document in scores))
    room = MAX_FIGURES // len(rows) // len(sources)
    texts = [_describe_text([each for each in scores if each.source == source], rows, room) for source in sources]
    return render_page("tokens.html", title="Token by token", base=base, run={"rows": rows, "texts": texts})


def _describe_text(documents: Sequence[TokenScores], rows: Sequence[str], room: int) -> dict[str, Any]:
    shown = []
    for document in documents:
        if room <= 0:
            break
        shown.append(_describe_document(document, room))
        room -= len(document.tokens)
    return {
        "source": documents[0].source,
        "documents": len(documents),
        "tokens": sum(len(document.tokens) for document in documents),
        "shown": shown,
        "sums": {row: _describe_sums(documents, row) for row in rows if row != BASE},
    }


def _describe_document(document: TokenScores, room: int) -> dict[str, Any]:
    """Returns the first tokens of a document; those that are parts of one character count as one."""
    pieces = document.pieces[:room]
    whole = [piece for piece in pieces if piece]
    ends = [index + 1 for index, piece in enumerate(pieces) if piece]  # of what is left of a character there is none
    starts, last = [0, *ends[:-1]][: len(whole)], max(ends, default=0)
    sums = {name: np.add.reduceat(values[:last], starts) for name, values in document.logprobs.items() if whole}
    logprobs = {name: round_finite(values, 2) for name, values in sums.items()}
    return {"prompt": document.prompt, "pieces": whole, "logprobs": logprobs}


def _describe_sums(documents: Iterable[TokenScores], adapter: str) -> dict[str, Any]:
    """Returns mean nats per token, an adapter's gain by kind of token, and the words that gained and lost most."""
    kinds, words = sum_gains(documents, adapter, BASE)
    whole = Gain()
    for gain in kinds.values():
        whole.add(gain.tokens, gain.base_nats, gain.adapter_nats)
    base, own = round_finite(np.array([whole.base_nats, whole.adapter_nats]) / whole.tokens)
    finite = [(word, gain) for word, gain in words.items() if math.isfinite(gain.nats)]
    ordered = sorted(finite, key=lambda item: -item[1].nats)
    return {
        "base": base,
        "adapter": own,
        "kinds": [_describe_kind(kind, gain, whole.nats) for kind, gain in kinds.items() if gain.count],
        "gains": _describe_words({word: gain for word, gain in ordered[:MAX_WORDS] if gain.nats > 0}),
        "losses": _describe_words({word: gain for word, gain in ordered[: -MAX_WORDS - 1 : -1] if gain.nats < 0}),
    }


def _describe_kind(kind: str, gain: Gain, total: float) -> list[Any]:
    """Returns the kind, its tokens, mean nats per token under base and adapter, and its share of the whole gain."""
    figures = np.array(
        [gain.base_nats / gain.tokens, gain.adapter_nats / gain.tokens, gain.nats / total if total else 0]
    )
    return [kind, gain.tokens, *round_finite(figures)]


def _describe_words(words: Mapping[str, Gain]) -> list[list[Any]]:
    """Returns each word, how often it comes, and by how many nats it gained in all and each time."""
    return [
        [word, gain.count, *round_finite(np.array([gain.nats, gain.nats / gain.count]))] for word, gain in words.items()
    ]
