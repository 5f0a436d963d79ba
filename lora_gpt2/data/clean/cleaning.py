"""Cleans documents by rules and counts what each rule changed, with examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lora_gpt2.data.clean.pii import find_pii
from lora_gpt2.data.clean.rules import BOILERPLATE, MARKUP, RULES

MAX_EXAMPLES = 3
EXAMPLE_WIDTH = 60


@dataclass(kw_only=True)
class RuleReport:
    """What one rule did: documents touched, characters removed, and a few places before and after."""

    documents: int = 0
    characters_removed: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)

    def add(self, other: RuleReport) -> None:
        """Adds what the rule did elsewhere."""
        self.documents += other.documents
        self.characters_removed += other.characters_removed
        self.examples = [*self.examples, *other.examples][:MAX_EXAMPLES]


@dataclass
class CleaningReport:
    """What cleaning did to a set of documents; `pii` counts the documents in which each kind was found.

    `whole` is the report that this one will be added to, whose examples need no more.
    """

    rules: dict[str, RuleReport] = field(default_factory=dict)
    pii: Counter[str] = field(default_factory=Counter)
    whole: CleaningReport | None = None

    def note(self, name: str, before: str, after: str) -> str:
        """Takes note of what a rule changed; returns `after`."""
        if before != after:
            report = self.rules.setdefault(name, RuleReport())
            report.documents += 1
            report.characters_removed += len(before) - len(after)
            shown = self.whole.rules.get(name, report) if self.whole else report
            if len(shown.examples) < MAX_EXAMPLES:
                report.examples.append(_show_change(before, after))
        return after

    def add_parts(self, parts: Sequence[CleaningReport]) -> None:
        """Adds what was done to the parts of one document, which counts once for each rule and kind."""
        for name in dict.fromkeys(name for part in parts for name in part.rules):
            found = RuleReport()
            for part in parts:
                found.add(part.rules.get(name, RuleReport()))
            found.documents = 1
            self.rules.setdefault(name, RuleReport()).add(found)
        self.pii.update({kind for part in parts for kind in part.pii})

    def add(self, other: CleaningReport) -> None:
        """Adds what was done elsewhere."""
        for name, rule in other.rules.items():
            self.rules.setdefault(name, RuleReport()).add(rule)
        self.pii.update(other.pii)

    def to_json(self) -> dict[str, Any]:
        """Returns the report as JSON values."""
        return {"rules": {name: asdict(rule) for name, rule in self.rules.items()}, "pii": dict(self.pii)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> CleaningReport:
        """Returns the report that `to_json` wrote."""
        rules = {name: RuleReport(**rule) for name, rule in values["rules"].items()}
        return cls(rules=rules, pii=Counter(values["pii"]))


def clean_text(text: str, rules: Mapping[str, str], report: CleaningReport) -> str:
    """Returns a text cleaned by rules, in their order; the report takes note of what each changed.

    Lines that documents have in common are not a matter of one text: `BOILERPLATE` is left to `shards.clean_document`.
    """
    was_page = False
    for name, mode in rules.items():
        if name == BOILERPLATE or (was_page and name in MARKUP):
            continue
        if name == "pii":
            report.pii.update({finding.kind for finding in find_pii(text)})
        cleaned = RULES[name].apply(text, mode)
        was_page = was_page or (name == "html" and cleaned != text)
        text = report.note(name, text, cleaned)
    return text


def _show_change(before: str, after: str) -> dict[str, str]:
    same, differs = 0, min(len(before), len(after)) + 1  # halved: comparing slices is much faster than characters
    while differs - same > 1:
        middle = (same + differs) // 2
        same, differs = (middle, differs) if before[:middle] == after[:middle] else (same, middle)
    start = max(0, same - EXAMPLE_WIDTH // 3)
    return {"before": before[start : start + EXAMPLE_WIDTH], "after": after[start : start + EXAMPLE_WIDTH]}
