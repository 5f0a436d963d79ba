"""Personal data by pattern *and* validator: a run of digits is a card only if its check digit is right.

What it gives up: names and addresses, which need a model. Patterns run in linear time (RE2); the validators are those
of `phonenumbers` and `python-stdnum`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import re2

REGION = "US"  # of phone numbers without a country's code


@dataclass(frozen=True, kw_only=True)
class PiiMatch:
    """Where one piece of personal data stands: `text[start:end]`."""

    kind: str
    start: int
    end: int


def _is_email(value: str) -> bool:
    local, _, domain = value.rpartition("@")
    return ".." not in value and not local.startswith(".") and not local.endswith(".") and "." in domain


def _is_phone(value: str) -> bool:
    import phonenumbers

    digits = [c for c in value if c.isdigit()]
    if len(set(digits)) < 3 or not (value.startswith("+") or sum(not c.isdigit() for c in value) >= 2):
        return False
    try:
        return bool(phonenumbers.is_possible_number(phonenumbers.parse(value, REGION)))
    except phonenumbers.NumberParseException:
        return False


def _is_card(value: str) -> bool:
    from stdnum import luhn

    digits = "".join(c for c in value if c.isdigit())
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and bool(luhn.is_valid(digits))


def _is_iban(value: str) -> bool:
    from stdnum import iban

    return bool(iban.is_valid(value))


def _is_ssn(value: str) -> bool:
    area, group, serial = value.split("-")
    return area not in ("000", "666") and area < "900" and group != "00" and serial != "0000"


def _is_ip(value: str) -> bool:
    try:
        return not ipaddress.ip_address(value).is_unspecified
    except ValueError:
        return False


PATTERNS: tuple[tuple[str, str, Callable[[str], bool]], ...] = (
    ("email", r"[A-Za-z0-9][A-Za-z0-9._%+'-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}\b", _is_email),
    ("iban", r"\b[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b", _is_iban),
    ("ssn", r"\b[0-9]{3}-[0-9]{2}-[0-9]{4}\b", _is_ssn),
    ("card", r"\b[0-9](?:[ -]?[0-9]){12,18}\b", _is_card),
    ("ip", r"\b[0-9]{1,3}(?:\.[0-9]{1,3}){3}\b|\b(?:[0-9A-Fa-f]{1,4}:){2,7}(?::?[0-9A-Fa-f]{1,4}){1,7}\b", _is_ip),
    ("phone", r"(?:\+|\(|\b)[0-9][0-9 ().-]{6,20}[0-9]\b", _is_phone),
)  # the earlier takes what two could be
COMPILED = [(kind, re2.compile(pattern), check) for kind, pattern, check in PATTERNS]


def find_pii(text: str) -> list[PiiMatch]:
    """Returns what looks like personal data and passes its check, in order, without overlaps."""
    found = [finding for kind, pattern, check in COMPILED for finding in _iter_kind(kind, pattern, check, text)]
    found.sort(key=lambda finding: finding.start)  # stable: the earlier kind first
    kept: list[PiiMatch] = []
    for finding in found:
        if not kept or finding.start >= kept[-1].end:
            kept.append(finding)
    return kept


def _iter_kind(kind: str, pattern: re2._Regexp, check: Callable[[str], bool], text: str) -> Iterator[PiiMatch]:
    for match in pattern.finditer(text):
        if check(match.group()):
            yield PiiMatch(kind=kind, start=match.start(), end=match.end())


def mask_pii(text: str) -> str:
    """Returns the text with each finding replaced by its kind, as in `<email>`."""
    pieces, offset = [], 0
    for finding in find_pii(text):
        pieces += [text[offset : finding.start], f"<{finding.kind}>"]
        offset = finding.end
    return "".join([*pieces, text[offset:]])
