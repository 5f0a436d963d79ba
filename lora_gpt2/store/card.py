"""The model card (`README.md`) of a version; never imports torch."""

from __future__ import annotations

from lora_gpt2.core.fingerprint import flatten_json
from lora_gpt2.store.manifest import Manifest

MEASURED = "Perplexity is measured on held-out text of the same source."


def build_card(manifest: Manifest) -> str:
    """Returns what a version is, where it is from, how good, how to use it, and its limits."""
    figures = "\n".join(
        f"| {key} | {value} |" for key, value in flatten_json(dict(manifest.figures)).items() if value is not None
    )
    measured = "Perplexity was measured on the texts named above." if manifest.parents else MEASURED
    description = manifest.recipe.get("description") or "A LoRA adapter for a frozen GPT-2."
    return f"""---
base_model: {manifest.base.name}
library_name: peft
pipeline_tag: text-generation
tags: [lora, gpt2, lora-gpt2]
---
# {manifest.name}

{description}

Base: `{manifest.base.name}` (fingerprint `{manifest.base.fingerprint}`); it works on no other.
{_describe_origin(manifest)}

| figure | value |
|---|---|
{figures}

Use: `lora-gpt2 generate "..." --adapter {manifest.name}`, or `PeftModel.from_pretrained(base, this_folder)`.

Limits: it continues text in the manner of its domain. It states false things fluently, carries the bias of its
text, and may repeat passages of it. {measured}
"""


def _describe_origin(manifest: Manifest) -> str:
    sources = ", ".join(manifest.data.get("sources", []))
    lines = []
    if manifest.parents:
        made = ", ".join(f"{key} {value}" for key, value in manifest.made.items() if value is not None)
        parents = ", ".join(f"{parent.reference} at {parent.weight:g}" for parent in manifest.parents)
        lines.append(f"Made from {parents} ({made}).")
    if sources or not manifest.parents:
        tokens = manifest.data.get("train_tokens", "an unknown number of")
        lines.append(f"Text: {sources or 'unknown'}; {tokens} training tokens.")
    return "\n".join(lines)
