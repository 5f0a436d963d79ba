"""The report of a preparation as a page: what was read, what each rule did, what was rejected and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_gpt2.core.pages import render_page
from lora_gpt2.core.printable import count_of
from lora_gpt2.data.clean.rules import BOILERPLATE, RULES

DESCRIPTIONS = {
    **{name: (rule.apply.__doc__ or "").partition("\n")[0].removeprefix("Returns ") for name, rule in RULES.items()},
    BOILERPLATE: "the text without lines that most documents begin or end with.",
}


def list_figures(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the figures of a preparation and what each is."""
    lengths, tokens = report["tokens_per_document"], report["tokens"]
    figures = [
        (f"{report['documents_read']:,} → {report['documents_kept']:,}", "documents read → kept"),
        *(
            (f"{tokens[part]:,}", f"{part} tokens in {count_of(report['documents'][part], 'document')}")
            for part in tokens
        ),
        (f"{lengths['median']:,.0f} / {lengths['p95']:,.0f}", "tokens per document, median / 95th percentile"),
        (f"{report['characters']['distinct_beyond_ascii']:,}", "different characters beyond ASCII"),
    ]
    if report["loss_tokens"] != tokens:
        figures.append((f"{report['loss_tokens']['train']:,}", "training tokens that carry loss"))
    if report["settings"]["layout"] == "packed":
        figures.append((f"{report['fill']['train']:.1%}", "of the training blocks is filled"))
    return figures


def build_report_page(report: Mapping[str, Any]) -> str:
    """Returns the page."""
    return render_page(
        "preparation.html",
        title="Prepared text",
        sources=", ".join(report["settings"]["sources"]),
        figures=list_figures(report),
        rules=[
            (name, DESCRIPTIONS[name], done["documents"], done["characters_removed"])
            for name in DESCRIPTIONS
            if (done := report["rules"].get(name))
        ],
        examples=[
            (name, repr(example["before"]), repr(example["after"]))
            for name, rule in report["rules"].items()
            for example in rule["examples"]
        ],
        rejected=list(report["rejected"].items()),
        near_duplicates=[(e["text"], e["text_of"], f"{e['similarity']:.2f}") for e in report["near_duplicates"]],
        pii=list(report["pii"].items()),
        settings=[(key, str(value)) for key, value in report["settings"].items()],
    )
