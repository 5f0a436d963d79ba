"""The model card (`README.md`) of a version: what it is, where from, how good, how safe; never imports torch.

The head is the metadata of Hugging Face's model cards (Mitchell et al. 2019, arXiv:1810.03993, for what a card says).
A version's folder has the card of its publication; `adapters card` builds it anew with what was found out since.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_gpt2.core.fingerprint import flatten_json
from lora_gpt2.core.printable import count_of
from lora_gpt2.store.manifest import Manifest

MEASURED = "Perplexity is measured on held-out text of the same source."
PAIRS = (
    ("perplexity on test text, kept back", "test_perplexity", "base_test_perplexity"),
    ("perplexity on validation text", "validation_perplexity", "base_perplexity"),
    ("perplexity on general English", "general_perplexity", "base_general_perplexity"),
)
"""Figures that are shown beside the base's."""
MERGE_FIGURES = ("perplexity", "base_perplexities", "documents_trained_on")
"""Figures of a merge, by text."""
OTHERS = {
    "parent_perplexity": "perplexity of the adapter it continues from, on validation text",
    "steps": "steps",
    "best_step": "best step",
    "train_tokens": "tokens trained on",
    "trained_parameters": "trained parameters",
    "peak_memory_bytes": "peak memory in bytes",
    "seconds": "seconds",
    "dtype": "dtype of the base",
    "verdict": "verdict",
    "divergence": "KL divergence from the base on general text, in nats per token",
    "forgetting": "forgetting",
}


def build_card(manifest: Manifest, audits: Mapping[str, Any] | None = None) -> str:
    """Returns the card; `audits` are the results that `store.audits` keeps."""
    audits = audits or {}
    described = manifest.recipe.get("description") or "A LoRA adapter for a frozen GPT-2."
    licence = manifest.recipe.get("license") or "not given: ask who made it before you publish what it writes"
    sections = [
        f"# {manifest.name}\n\n{described}",
        f"Base: `{manifest.base.name}` (fingerprint `{manifest.base.fingerprint}`); it works on no other.\n"
        f"{_describe_origin(manifest)}\nLicence of the text: {licence}.",
        "## Figures\n\n" + "\n".join(_list_figures(manifest)),
        _describe_evaluation(audits.get("evaluation")),
        _describe_memorization(audits.get("memorization")),
        "## Use\n\n"
        f'`lora-gpt2 generate "..." --adapter {manifest.name}`, or `PeftModel.from_pretrained(base, this_folder)`.\n'
        f"`lora-gpt2 bases show {manifest.base.name}` says where the base is; `lora-gpt2 adapters export "
        f"{manifest.name} DIR` writes a folder that names it for `AutoPeftModelForCausalLM`.\n"
        f"To write it into the base: `lora-gpt2 merge {manifest.name} --into-base DIR`. Where an adapter changes the "
        "head (`lm_head`), PEFT's own merge would change GPT-2's token embeddings too, which are the same weights, and "
        "what ties them again fails: `adapters export --peft-safe` leaves that change out.\n"
        "It is meant to continue text in the manner of its domain, for people who read what it writes before they use "
        "it. It is not meant to answer questions of fact, health or law, nor to decide about people.",
        "## Limits\n\n"
        "It states false things fluently. It carries the bias of its text and of the base's, may repeat passages of "
        "its text, names and numbers included, and knows nothing that came later. "
        + ("Perplexity was measured on the texts named above." if manifest.parents else MEASURED),
    ]
    return f"---\n{_build_head(manifest)}---\n" + "\n\n".join(section for section in sections if section) + "\n"


def is_hub_name(name: str) -> bool:
    """True for a base that others find by this name, and that is no path of this machine."""
    return not os.path.isabs(name) and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is not None


def _build_head(manifest: Manifest) -> str:
    """Returns the metadata as YAML."""
    from huggingface_hub import EvalResult, ModelCardData

    figures, sources = manifest.figures, manifest.data.get("sources", [])
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=", ".join(sources) or "held-out text",
            metric_type="perplexity",
            metric_value=round(figures[key], 4),
            metric_name=f"perplexity on {what} text",
        )
        for key, what in (("test_perplexity", "test"), ("validation_perplexity", "validation"))
        if isinstance(figures.get(key), int | float)
    ]
    licence = manifest.recipe.get("license")
    data = ModelCardData(
        base_model=manifest.base.name if is_hub_name(manifest.base.name) else None,
        library_name="peft",
        license=str(licence).lower() if licence else None,
        pipeline_tag="text-generation",
        tags=["lora", "gpt2", "lora-gpt2"],
        model_name=manifest.name if results else None,
        eval_results=results or None,
    )
    return f"{data.to_yaml()}\n"


def _list_figures(manifest: Manifest) -> Iterator[str]:
    figures = dict(manifest.figures)
    yield "| figure | adapter | base |\n|---|---|---|"
    for name, key, base_key in PAIRS:
        if figures.get(key) is not None:
            base = figures.get(base_key)
            yield f"| {name} | {_show(figures[key])} | {'' if base is None else _show(base)} |"
    texts, of_base, trained = (dict(figures.get(key) or {}) for key in MERGE_FIGURES)
    for text, value in texts.items():
        label = f"perplexity on {text}{mark_trained(trained.get(text))}"
        yield f"| {label} | {_show(value)} | {_show(of_base.get(text, ''))} |"
    known = {*OTHERS, *MERGE_FIGURES, "tokens_per_second", "test", *(key for _, *keys in PAIRS for key in keys)}
    rest = flatten_json({key: value for key, value in figures.items() if key not in known})
    shown = {name: figures.get(key) for key, name in OTHERS.items()} | rest
    yield from (f"| {name} | {_show(value)} | |" for name, value in shown.items() if value is not None)


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.2f}" if abs(value) >= 1 or not value else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _describe_origin(manifest: Manifest) -> str:
    sources = ", ".join(manifest.data.get("sources", []))
    lines = []
    provenance = ", ".join(f"{key} {value}" for key, value in manifest.provenance.items() if value is not None)
    if manifest.parents:
        parents = ", ".join(f"{parent.reference} at {parent.weight:g}" for parent in manifest.parents)
        lines.append(f"Made from {parents} ({provenance or 'trained further'}).")
    elif provenance:
        lines.append(f"Not trained here: {provenance}.")
    if sources or not manifest.parents:
        tokens = manifest.data.get("train_tokens", "an unknown number of")
        lines.append(f"Text: {sources or 'unknown'}; {tokens} training tokens.")
    lines += [f"- {line}" for line in manifest.data.get("reading", [])]
    for name, rule in manifest.data.get("rules", {}).items():
        removed = count_of(rule["characters_removed"], "character")
        lines.append(f"- cleaning rule {name}: {count_of(rule['documents'], 'document')}, {removed} removed")
    for why, count in manifest.data.get("set_aside", {}).items():
        lines.append(f"- set aside: {count_of(count, 'document')}, {why}")
    return "\n".join(lines)


def _describe_evaluation(result: Mapping[str, Any] | None) -> str:
    """Returns what `evaluate --keep` found, with its intervals."""
    if not result:
        return ""
    rows = [
        f"| {cell['source']}{mark_trained(cell.get('documents_trained_on'), cell['documents'])} | "
        f"{_show(cell['perplexity'])} | {_between(cell['perplexity_interval'])} | "
        f"{cell['ratio_to_base']:.3f} | {_between(cell['ratio_interval'])} | "
        f"{cell['tokens']:,} |"
        for cell in result["cells"]
    ]
    head = "| text | perplexity | 95 % interval | over the base's | 95 % interval | tokens |\n|---|---|---|---|---|---|"
    how = (
        f"Protocol {result['protocol']}, window {result['window']}, stride {result['stride']}; bootstrap of documents."
    )
    return "## Measured\n\n" + "\n".join([head, *rows]) + f"\n\n{how}"


def mark_trained(seen: int | None, documents: int | None = None) -> str:
    """Returns what is said of a text that was trained on, in part or whole: its figure says nothing about new text."""
    of = "of its" if documents is None else f"of {documents:,}"
    return f" (trained on {seen:,} {of} documents)" if seen else ""


def _between(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{interval[0]:,.3f} to {interval[1]:,.3f}"


EXTRACTED_BY = {
    "train": "training text",
    "held_out": "held-out text",
    "base_on_train": "the base",
    "drafter": "the drafter alone",
}


def _describe_memorization(result: Mapping[str, Any] | None) -> str:
    """Returns what `audit memorization` found."""
    if not result:
        return "## Memorisation\n\nNot looked at (`lora-gpt2 audit memorization`)."
    found, size, copies = result["extraction"], result["run_tokens"], result["copies"]
    counts = ", ".join(
        f"{name} {found[key]['extracted']} of {found[key]['windows']}"
        for key, name in EXTRACTED_BY.items()
        if key in found
    )
    sampled = f" Of {copies['texts']} sampled texts {copies['with_copies']} copy that much." if copies else ""
    said = "It **repeats its text**: it" if result["memorizes"] else "It shows"
    if not result.get("same_text", True):
        sampled += " The text it was compared with may not be that of training."
    extraction = f"Prefixes after which the next {size} tokens were reproduced: {counts}.{sampled}"
    return f"## Memorisation\n\n{said} {result['verdict']}.\n{extraction}"
