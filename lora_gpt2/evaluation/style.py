"""How a text is written, in figures: repetition, variety, readability, and similarity to the text of a domain.

All of them take plain strings. None of them says whether a text is good, and none of them is sure on a few hundred
words; they are for comparing texts of the same kind and amount.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import re2

WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
SENTENCE_END = re2.compile(r"[.!?]+[\"'”’)\]]*(?:\s|$)")  # linear time, whatever the text
CHUNK_WORDS = 500
MAX_WORDS = 20_000
FUNCTION_WORDS = [  # frequent grammatical words of English, those of verse and drama among them
    "the",
    "of",
    "and",
    "to",
    "a",
    "in",
    "that",
    "it",
    "is",
    "was",
    "i",
    "for",
    "on",
    "you",
    "he",
    "be",
    "with",
    "as",
    "by",
    "at",
    "have",
    "are",
    "this",
    "not",
    "but",
    "had",
    "his",
    "they",
    "from",
    "she",
    "which",
    "or",
    "we",
    "an",
    "there",
    "her",
    "were",
    "one",
    "do",
    "been",
    "all",
    "their",
    "has",
    "would",
    "will",
    "what",
    "if",
    "can",
    "when",
    "so",
    "no",
    "said",
    "who",
    "more",
    "up",
    "out",
    "about",
    "them",
    "then",
    "some",
    "could",
    "him",
    "into",
    "than",
    "its",
    "my",
    "me",
    "your",
    "very",
    "our",
    "after",
    "only",
    "over",
    "how",
    "these",
    "those",
    "such",
    "may",
    "any",
    "should",
    "because",
    "upon",
    "where",
    "before",
    "through",
    "must",
    "while",
    "again",
    "never",
    "though",
    "shall",
    "yet",
    "against",
    "till",
    "thou",
    "thy",
]


def split_words(text: str) -> list[str]:
    """Returns the words of a text in small letters, without punctuation."""
    return WORD.findall(text.lower())


def cut_pieces(text: str, words: int) -> list[str]:
    """Returns the words of a text, at most 20,000, in pieces of so many, to compare like with like."""
    split = split_words(text)[:MAX_WORDS]
    return [" ".join(split[start : start + words]) for start in range(0, len(split), words)] if words else []


def count_ngrams(items: Sequence[str], size: int) -> Counter[tuple[str, ...]]:
    """Returns how often each run of `size` items occurs."""
    return Counter(zip(*(items[start:] for start in range(size)), strict=False))


def measure_distinct(texts: Sequence[str], size: int) -> float | None:
    """Returns distinct-n: different runs of `size` words over all runs (Li et al. 2016, arXiv:1510.03055, section 5).

    It falls with the amount of text: compare equal amounts. None without a run.
    """
    counts: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        counts.update(count_ngrams(split_words(text), size))
    return len(counts) / counts.total() if counts else None


def measure_repeated_ngrams(texts: Sequence[str], size: int = 4) -> float | None:
    """Returns seq-rep-n: the mean share of a text's runs of words that it has already had (Welleck et al. 2019).

    arXiv:1908.04319, section 6: 1 - different runs / all runs, within each text. It rises with a text's length:
    compare equal ones. None if no text has a run.
    """
    counts = [found for text in texts if (found := count_ngrams(split_words(text), size))]
    return float(np.mean([1 - len(found) / found.total() for found in counts])) if counts else None


def measure_readability(text: str) -> float | None:
    """Returns the Automated Readability Index, about the school year a text is for (Smith and Senter 1967).

    4.71 letters per word + 0.5 words per sentence - 21.43. It counts characters, not syllables, so it needs no
    dictionary. None without words.
    """
    words = split_words(text)
    if not words:
        return None
    sentences = max(1, len(SENTENCE_END.findall(text)))
    return 4.71 * sum(map(len, words)) / len(words) + 0.5 * len(words) / sentences - 21.43


def measure_divergence(text: str, other: str, size: int = 3) -> float | None:
    """Returns the Jensen-Shannon divergence of two texts' runs of `size` characters, in bits: 0 equal, 1 disjoint.

    Lin 1991, "Divergence measures based on the Shannon entropy". None if a text is shorter than a run.
    """
    counts = [Counter(t[i : i + size] for i in range(len(t) - size + 1)) for t in (text, other)]
    if not all(counts):
        return None
    keys = sorted(set(counts[0]) | set(counts[1]))
    p, q = (np.array([count[key] for key in keys], dtype=np.float64) / count.total() for count in counts)
    middle = (p + q) / 2
    return (_relative_entropy(p, middle) + _relative_entropy(q, middle)) / 2


def _relative_entropy(p: np.ndarray, q: np.ndarray) -> float:
    kept = p > 0
    return float((p[kept] * np.log2(p[kept] / q[kept])).sum())


def measure_delta(text: str, domain: str) -> float | None:
    """Returns Burrows' Delta of a text from a domain over function words (Burrows 2002, LLC 17(3)).

    The mean distance of the words' frequencies from the domain's, in standard deviations among the domain's chunks of
    500 words; words that do not vary there are left out. None if the domain has fewer than five chunks.
    """
    words = split_words(domain)
    chunks = [words[start : start + CHUNK_WORDS] for start in range(0, len(words) - CHUNK_WORDS + 1, CHUNK_WORDS)]
    own = split_words(text)
    if len(chunks) < 5 or not own:
        return None
    table = np.array([_frequencies(chunk) for chunk in chunks])
    spread = table.std(axis=0, ddof=1)
    kept = spread > 0
    distance = np.abs(_frequencies(own) - table.mean(axis=0))[kept] / spread[kept]
    return float(distance.mean()) if kept.any() else None


def _frequencies(words: Sequence[str]) -> np.ndarray:
    counts = Counter(words)
    return np.array([counts[word] / len(words) for word in FUNCTION_WORDS])
