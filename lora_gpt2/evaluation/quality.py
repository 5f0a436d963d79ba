"""How the texts read that an adapter writes: repetition, variety, similarity to its domain and to references.

Prompts are held-out: the beginnings of documents, or the prompts of prompt/completion data, whose completions are then
the references (several where a prompt comes several times). BLEU and chrF are sacrebleu's, ROUGE-L rouge-score's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lora_gpt2.core.errors import DataError, ResourceError
from lora_gpt2.data.read.records import Document
from lora_gpt2.data.tokenizer import Tokenizer
from lora_gpt2.evaluation.matrix import EvaluationText
from lora_gpt2.evaluation.perplexity import split_prompt
from lora_gpt2.evaluation.style import (
    cut_pieces,
    measure_delta,
    measure_distinct,
    measure_divergence,
    measure_readability,
    measure_repeated_ngrams,
    split_words,
)
from lora_gpt2.recipe import GenerateSettings
from lora_gpt2.store.references import BASE

Write = Callable[[str, Sequence[str], GenerateSettings], list[str]]
"""From an adapter's name, prompts and settings to their continuations."""
Judge = Callable[[str, Sequence[Document]], float]
"""From an adapter's name and texts with their prompts to the texts' perplexity under it."""
PROMPT_TOKENS = 24
MAX_COMPARED = 50  # texts that are compared with each other
REPETITIVE = 0.15  # of a text's runs of four words; people's prose has 0.01 to 0.03
CHECKED = 8
PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "num_beams": 1}


@dataclass(frozen=True, kw_only=True)
class GenerationTask:
    """Prompts with their references, and the text of the domain that the continuations are compared with."""

    source: str
    prompts: list[str]
    references: list[list[str]]
    domain: str


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Figures of one adapter's continuations on one source; None where there is nothing to measure with.

    `distinct_1`, `distinct_2`, `repetition_4`, `readability` (and that of the domain), `divergence` and `delta` (from
    the domain): see `style`. `words`: mean length. `self_bleu`: mean BLEU of a text against the others, 0 to 100
    (Zhu et al. 2018, arXiv:1802.01886). `bleu` (Papineni et al. 2002), `chrf` (Popović 2015): 0 to 100 over the corpus;
    `rouge_l`: mean F1 of the best reference, 0 to 100 (Lin 2004).
    `perplexity_under_…`: of the continuations; what is much likelier under the adapter is written in its manner.
    """

    adapter: str
    source: str
    texts: int
    words: float
    distinct_1: float | None
    distinct_2: float | None
    repetition_4: float | None
    domain_repetition_4: float | None
    self_bleu: float | None
    readability: float | None
    domain_readability: float | None
    divergence: float | None
    delta: float | None
    bleu: float | None
    chrf: float | None
    rouge_l: float | None
    perplexity_under_adapter: float | None
    perplexity_under_base: float | None
    warnings: list[str] = field(default_factory=list)
    samples: list[dict[str, str]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Returns the figures by name."""
        return dict(vars(self))


def build_task(source: EvaluationText, tokenizer: Tokenizer, count: int) -> GenerationTask:
    """Returns `count` prompts of a source, spread over it; fewer if it has fewer, `DataError` if it has none."""
    pairs = [split_prompt(document) for document in source.documents]
    domain = "\n".join(text for _, text in pairs)
    grouped: dict[str, list[str]] = {}
    for prompt, text in pairs:
        if prompt:
            grouped.setdefault(prompt, []).append(text.strip())
    if not grouped:
        encoded = (tokenizer.encode(text) for _, text in pairs)
        beginnings = (tokenizer.decode(ids[:PROMPT_TOKENS]) for ids in encoded if len(ids) > PROMPT_TOKENS)
        grouped = {prompt: [] for prompt in beginnings}
    prompts = list(grouped)
    if not prompts:
        raise DataError(
            f"{source.label} has no document of more than {PROMPT_TOKENS} tokens to continue", "give longer documents"
        )
    indices = np.linspace(0, len(prompts) - 1, min(count, len(prompts))).round().astype(int).tolist()
    chosen = [prompts[index] for index in indices]
    return GenerationTask(
        source=source.label, prompts=chosen, references=[grouped[prompt] for prompt in chosen], domain=domain
    )


def measure_quality(
    task: GenerationTask, adapter: str, settings: GenerateSettings, write: Write, judge: Judge
) -> Quality:
    """Returns what an adapter makes of a task's prompts."""
    texts = write(adapter, task.prompts, settings)
    figures = describe_texts(texts, task)
    warnings = find_causes(task, adapter, settings, write, figures["repetition_4"], figures["domain_repetition_4"])
    written = [Document(text, "", prompt) for prompt, text in zip(task.prompts, texts, strict=True) if text]
    for key, name in (("perplexity_under_adapter", adapter), ("perplexity_under_base", BASE)):
        figures[key] = judge(name, written) if written else None
    samples = [{"prompt": p, "text": t} for p, t in list(zip(task.prompts, texts, strict=True))[:3]]
    return Quality(adapter=adapter, source=task.source, texts=len(texts), warnings=warnings, samples=samples, **figures)


def describe_texts(texts: Sequence[str], task: GenerationTask) -> dict[str, Any]:
    """Returns the figures of continuations of a task's prompts."""
    whole = "\n".join(texts)
    words = float(np.mean([len(split_words(text)) for text in texts])) if texts else 0.0
    return {
        "words": words,
        "distinct_1": measure_distinct(texts, 1),
        "distinct_2": measure_distinct(texts, 2),
        "repetition_4": measure_repeated_ngrams(texts),
        "domain_repetition_4": measure_repeated_ngrams(cut_pieces(task.domain, round(words))),
        "self_bleu": measure_self_bleu(texts),
        "readability": measure_readability(whole),
        "domain_readability": measure_readability(task.domain),
        "divergence": measure_divergence(whole, task.domain),
        "delta": measure_delta(whole, task.domain),
        **compare_references(texts, task.references),
    }


def find_causes(
    task: GenerationTask,
    adapter: str,
    settings: GenerateSettings,
    write: Write,
    repetition: float | None,
    usual: float | None,
) -> list[str]:
    """Returns a warning where texts repeat themselves, and whether the sampling does it or the model.

    A few of the prompts are continued as the model would by itself (temperature 1, nothing cut off): if those repeat
    less than half as much, it is the settings.
    """
    if repetition is None or repetition < max(REPETITIVE, 2 * (usual or 0.0)):
        return []
    plain = settings.model_copy(update=PLAIN)
    own = measure_repeated_ngrams(write(adapter, task.prompts[:CHECKED], plain))
    said = f"{adapter} repeats {repetition:.0%} of its runs of four words on {task.source}"
    if own is not None and own < repetition / 2:
        return [
            f"{said}; sampled plainly only {own:.0%}: it is the sampling (temperature {settings.temperature:g}, "
            f"num_beams {settings.num_beams}), not the model; try generate.temperature=0.9 or "
            "generate.repetition_penalty=1.2"
        ]
    return [f"{said}, sampled plainly as well: it is the model; more text or fewer steps would help"]


@contextmanager
def _wrap_missing() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        hint = "pip install 'lora-gpt2[quality]'"
        raise ResourceError(f"judging texts needs {error.name}, which is not installed", hint) from error


def compare_references(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float | None]:
    """Returns BLEU, chrF and ROUGE-L against references; None where a text has none."""
    if not texts or not all(references):
        return dict.fromkeys(("bleu", "chrf", "rouge_l"))
    with _wrap_missing():
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF

    clean = [text.strip() for text in texts]
    most = max(map(len, references))
    streams: list[Any] = [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]
    scorer = RougeScorer(["rougeL"])
    rouge = [scorer.score_multi(list(r), t)["rougeL"].fmeasure for t, r in zip(clean, references, strict=True)]
    return {
        "bleu": float(BLEU().corpus_score(clean, streams).score),
        "chrf": float(CHRF().corpus_score(clean, streams).score),
        "rouge_l": 100 * float(np.mean(rouge)),
    }


def measure_self_bleu(texts: Sequence[str]) -> float | None:
    """Returns the mean BLEU-4 of each text against the others, at most 50 of them; None with fewer than two."""
    with _wrap_missing():
        from sacrebleu.metrics.bleu import BLEU

    compared = [text for text in texts if text.strip()][:MAX_COMPARED]
    if len(compared) < 2:
        return None
    metric = BLEU(effective_order=True)
    scores = [
        metric.sentence_score(text, [other for index, other in enumerate(compared) if index != own]).score
        for own, text in enumerate(compared)
    ]
    return float(np.mean(scores))
