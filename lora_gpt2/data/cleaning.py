"""Cleaning rules: each one a function from text to text, idempotent and linear in its length.

A profile is the list of rules that a domain gets: `prose`, `code` (touches no spaces), `raw` (nothing).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

MAX_EXAMPLES = 3
EXAMPLE_WIDTH = 40
LINE_ENDS = ("\r\n", "\r", "\u2028", "\u2029", "\u0085")
CONTROL = dict.fromkeys([*range(9), 11, 12, *range(14, 32), *range(127, 160), 0xFEFF])


def mend_line_ends(text: str) -> str:
    """Returns the text with every line end as a line feed."""
    for end in LINE_ENDS:
        text = text.replace(end, "\n")
    return text


def drop_nul(text: str) -> str:
    """Returns the text without NUL characters."""
    return text.replace("\0", "")


def drop_control(text: str) -> str:
    """Returns the text without control characters and byte-order marks; tabs and line feeds stay."""
    return text.translate(CONTROL)


def mend_spaces(text: str) -> str:
    """Returns the text without spaces at line ends, blank lines in a row or blank space around it."""
    lines: list[str] = []
    for line in text.split("\n"):
        stripped = line.rstrip()
        if stripped or (lines and lines[-1]):
            lines.append(stripped)
    return "\n".join(lines).strip()


RULES: dict[str, Callable[[str], str]] = {
    "line_ends": mend_line_ends,
    "nul": drop_nul,
    "control": drop_control,
    "spaces": mend_spaces,
}
PROFILES: dict[str, tuple[str, ...]] = {
    "prose": ("line_ends", "control", "spaces"),
    "code": ("line_ends", "nul"),
    "raw": (),
}


@dataclass
class RuleReport:
    """What one rule did: documents touched, characters removed, and a few places before and after."""

    documents: int = 0
    characters_removed: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)


@dataclass
class CleaningReport:
    """What cleaning did to a set of documents."""

    rules: dict[str, RuleReport] = field(default_factory=dict)

    def clean(self, text: str, profile: str) -> str:
        """Returns the cleaned text and takes note of what each rule changed."""
        for name in PROFILES[profile]:
            cleaned = RULES[name](text)
            if cleaned != text:
                report = self.rules.setdefault(name, RuleReport())
                report.documents += 1
                report.characters_removed += len(text) - len(cleaned)
                if len(report.examples) < MAX_EXAMPLES:
                    report.examples.append(_show_change(text, cleaned))
            text = cleaned
        return text


def _show_change(before: str, after: str) -> dict[str, str]:
    start = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(map(len, (before, after)))
    )
    start = max(0, start - EXAMPLE_WIDTH // 2)
    return {"before": before[start : start + EXAMPLE_WIDTH], "after": after[start : start + EXAMPLE_WIDTH]}
