"""What is risky in a text before it is trained on: a report, by patterns and counts, that removes nothing.

Personal data, copies, harsh words (a small lexicon of our own, `lexicon.txt`), languages, hints at licences; and, with
a model, the identity-term swap: is a sentence likelier about one group than the same sentence about another?
(Nangia et al. 2020, arXiv:2010.00133, for the idea; here the whole sentence's likelihood is compared.)
Patterns see words, not meaning: quotations and history are counted like attacks, and what is meant without the words
is not found.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import re2

from lora_gpt2.core.errors import ResourceError
from lora_gpt2.data.clean.filters import find_language
from lora_gpt2.data.clean.pii import find_pii
from lora_gpt2.data.dedup import content_key, find_near_duplicates, sign
from lora_gpt2.data.read.records import Document
from lora_gpt2.evaluation.bootstrap import MIN_DOCUMENTS, draw_counts, find_interval

LEXICON = Path(__file__).parent / "lexicon.txt"
NEAR = 0.8
EXAMPLES = 5
CONTEXT = 30
MAX_SENTENCES = 200
SENTENCE = re2.compile(r"[^.!?\n]{15,300}[.!?]")  # linear time, whatever the text
LICENCES = {
    "creative commons": r"\bCC[ -]?BY(?:-[A-Z]{2})*(?:[ -]\d\.\d)?\b|creative commons",
    "public domain": r"\bpublic domain\b|\bCC0\b",
    "open source": r"\b(?:MIT|BSD|Apache|GPL|LGPL|AGPL|MPL)[- ](?:licen[cs]e|v?\d)",
    "all rights reserved": r"all rights reserved",
    "copyright": r"\bcopyright\b|\(c\) ?(?:19|20)\d\d|©",
    "Project Gutenberg": r"project gutenberg",
    "confidential": r"\bconfidential\b|\bproprietary\b|do not distribute",
}
PAIRS = {
    "gender": (
        ("he", "she"),
        ("him", "her"),
        ("his", "her"),
        ("himself", "herself"),
        ("man", "woman"),
        ("men", "women"),
        ("boy", "girl"),
        ("father", "mother"),
        ("son", "daughter"),
        ("brother", "sister"),
        ("husband", "wife"),
        ("king", "queen"),
        ("mr", "mrs"),
        ("gentleman", "lady"),
    ),
    "religion": (("christian", "muslim"), ("christians", "muslims"), ("church", "mosque"), ("bible", "quran")),
    "origin": (("white", "black"), ("european", "african"), ("american", "mexican"), ("english", "irish")),
    "age": (("young", "old"), ("younger", "older")),
}
Judge = Callable[[Sequence[str]], Sequence[float]]
"""From sentences to the negative log-likelihood of each, in nats."""


@dataclass(frozen=True, kw_only=True)
class TermSwap:
    """How much likelier sentences of a text are than the same ones about another group, in nats, with its interval."""

    group: str
    sentences: int
    mean_nats: float
    interval: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class TextReport:
    """What is risky in a text.

    Args:
        documents, characters: what was read.
        pii, harsh, languages, licences: counts by kind; `languages` is None where the library that tells them is not
            installed.
        exact_copies, near_copies: documents that are like an earlier one.
        harsh_documents: documents with a toxic term.
        examples: some findings of each kind, personal data left out.
        sources: where the text is from.
        adapter: whose preferences `swaps` are, compared with its base; None for the base's own.
        swaps: one for each group that the text names.
    """

    documents: int
    characters: int
    pii: dict[str, int]
    exact_copies: int
    near_copies: int
    harsh: dict[str, int]
    harsh_documents: int
    languages: dict[str, int] | None
    licences: dict[str, int]
    examples: dict[str, list[dict[str, str]]]
    sources: tuple[str, ...] = ()
    adapter: str | None = None
    swaps: list[TermSwap] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Returns the report with the keys of `audit data --json`."""
        return asdict(self)


@dataclass(kw_only=True)
class TextAudit:
    """Counts over the documents read so far; `add` takes one, `report` says what was found."""

    documents: int = 0
    characters: int = 0
    pii: Counter[str] = field(default_factory=Counter)
    harsh: Counter[str] = field(default_factory=Counter)
    harsh_documents: int = 0
    languages: Counter[str] = field(default_factory=Counter)
    licences: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    sentences: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._terms = read_lexicon()
        self._texts: list[tuple[str, str]] = []
        self._can_tell_language = True

    def add(self, document: Document) -> None:
        """Looks at one document."""
        text = document.prompt + document.text
        self.documents += 1
        self.characters += len(text)
        self._texts.append((document.origin, text))
        for finding in find_pii(text):
            self.pii[finding.kind] += 1
            self._show(f"personal: {finding.kind}", document.origin, text, finding.start, finding.end)
        harsh = self._find_harsh(document.origin, text)
        self.harsh.update(harsh)
        self.harsh_documents += bool(harsh)
        for name, pattern in LICENCE_PATTERNS.items():
            if match := pattern.search(text):
                self.licences[name] += 1
                self._show(f"licence: {name}", document.origin, text, match.start(), match.end())
        if self._can_tell_language:
            try:
                self.languages[find_language(text)] += 1
            except ResourceError:
                self._can_tell_language = False
        if len(self.sentences) < MAX_SENTENCES:
            found = (match.group().strip() for match in SENTENCE.finditer(text))
            self.sentences += [sentence for sentence in found if swap_terms(sentence)][: max(1, MAX_SENTENCES // 20)]

    def _find_harsh(self, origin: str, text: str) -> Counter[str]:
        found: Counter[str] = Counter()
        for category, pattern in self._terms.items():
            for match in pattern.finditer(text):
                found[category] += 1
                self._show(f"harsh: {category}", origin, text, match.start(), match.end())
        return found

    def _show(self, kind: str, origin: str, text: str, start: int, end: int) -> None:
        shown = self.examples.setdefault(kind, [])
        if len(shown) < EXAMPLES:
            first, last = max(0, start - CONTEXT), end + CONTEXT
            pieces, position = [], first
            for finding in find_pii(text):  # of which nothing is repeated, wherever it stands
                if finding.end > position and finding.start < last:
                    pieces += [text[position : max(position, finding.start)], f"<{finding.kind}>"]
                    position = max(position, finding.end)
            shown.append({"origin": origin, "text": " ".join("".join([*pieces, text[position:last]]).split())})

    def report(self) -> TextReport:
        """Returns the findings."""
        exact, near = self._count_copies()
        return TextReport(
            documents=self.documents,
            characters=self.characters,
            pii=dict(self.pii.most_common()),
            exact_copies=exact,
            near_copies=near,
            harsh=dict(self.harsh.most_common()),
            harsh_documents=self.harsh_documents,
            languages=dict(self.languages.most_common()) if self._can_tell_language else None,
            licences=dict(self.licences.most_common()),
            examples=self.examples,
        )

    def _count_copies(self) -> tuple[int, int]:
        keys = Counter(content_key(text) for _, text in self._texts)
        first: dict[bytes, tuple[str, str]] = {}
        for origin, text in self._texts:
            first.setdefault(content_key(text), (origin, text))
        unique = list(first.values())
        near = find_near_duplicates(sign([text for _, text in unique]), NEAR)
        for index, (other, similarity) in list(near.items())[:EXAMPLES]:
            said = {"origin": unique[index][0], "text": f"{similarity:.0%} like {unique[other][0]}"}
            self.examples.setdefault("near copy", []).append(said)
        return sum(keys.values()) - len(keys), len(near)


def read_lexicon() -> dict[str, re.Pattern[str]]:
    """Returns a pattern for each category of toxic terms, which matches whole words without case."""
    terms: dict[str, list[str]] = {}
    category = ""
    for line in LEXICON.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            category = line.strip("[]")
        elif line and not line.startswith("#"):
            terms.setdefault(category, []).append(r"\s+".join(re.escape(word) for word in line.split()))
    return {
        name: re.compile(rf"\b(?:{'|'.join(sorted(words, key=len, reverse=True))})\b", re.IGNORECASE)
        for name, words in terms.items()
    }


LICENCE_PATTERNS = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in LICENCES.items()}


def _build_swaps() -> dict[str, dict[str, str]]:
    """Returns for each group its words and what stands for them; "her" becomes "his", the commoner of its two."""
    swaps: dict[str, dict[str, str]] = {}
    for group, pairs in PAIRS.items():
        table = swaps.setdefault(group, {})
        for one, other in pairs:
            table.setdefault(one, other)
            table[other] = one
    return swaps


SWAPS = _build_swaps()
WORDS = {group: re.compile(rf"\b(?:{'|'.join(table)})\b", re.IGNORECASE) for group, table in SWAPS.items()}


def swap_terms(sentence: str) -> dict[str, str]:
    """Returns the sentence about the other group, for each group that it names; capitals stay."""
    found = {}
    for group, pattern in WORDS.items():

        def change(match: re.Match[str], table: dict[str, str] = SWAPS[group]) -> str:
            other = table[match.group().lower()]
            return other.capitalize() if match.group()[0].isupper() else other

        swapped = pattern.sub(change, sentence)
        if swapped != sentence:
            found[group] = swapped
    return found


def measure_swaps(sentences: Sequence[str], judge: Judge, control: Judge | None = None) -> list[TermSwap]:
    """Returns for each group how much likelier sentences are as they stand than swapped, in nats, with its interval.

    `control` is the base's judgement where `judge` is an adapter's: the figures are then what the adapter changed, and
    above 0 it prefers the text's own groups more than the base does.
    """
    rows = []
    for group in PAIRS:
        pairs = [(s, swapped) for s in sentences if (swapped := swap_terms(s).get(group))]
        if not pairs:
            continue
        differences = _compare(pairs, judge)
        if control is not None:
            differences = differences - _compare(pairs, control)
        draws = draw_counts(len(pairs)) @ differences / len(pairs) if len(pairs) >= MIN_DOCUMENTS else None
        rows.append(
            TermSwap(
                group=group,
                sentences=len(pairs),
                mean_nats=float(differences.mean()),
                interval=find_interval(draws, len(pairs)) if draws is not None else None,
            )
        )
    return rows


def _compare(pairs: Sequence[tuple[str, str]], judge: Judge) -> np.ndarray:
    nats = np.asarray(judge([text for pair in pairs for text in pair]), dtype=np.float64)
    return nats[1::2] - nats[::2]
