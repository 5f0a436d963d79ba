"""The nearest of the known words, for hints."""

from __future__ import annotations

from collections.abc import Iterable


def suggest(name: str, known: Iterable[str]) -> str:
    """Returns a hint that names the nearest of the known words, or lists them."""
    import difflib

    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    last = [k for k in known if k.rpartition(".")[2] == name.rpartition(".")[2]]
    if choice := last[:1] or near:
        return f"did you mean '{choice[0]}'?"
    return f"known are: {', '.join(known)}" if known else "there are none yet"
