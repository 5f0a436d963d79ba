"""What a reader of a generated text is told: that a machine wrote it, and with what."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_gpt2.core.files import wrap_os_errors, write_user_file
from lora_gpt2.core.user_files import check_output


def format_disclosure(base: str, adapter: str) -> str:
    """Returns the line that goes with a text."""
    author = f"the language model {base}" if adapter == "base" else f"the language model {base} with adapter {adapter}"
    return f"Written by {author} (lora-gpt2). It may be wrong, and may repeat what it was trained on."


def write_disclosure(path: Path, base: str, adapters: Sequence[str]) -> Path:
    """Writes the line beside a file of texts, as `<file>.disclosure.txt`; returns where."""
    beside = path.with_name(f"{path.name}.disclosure.txt")
    check_output(beside)
    with wrap_os_errors(f"write {beside}"):
        write_user_file(beside, format_disclosure(base, ", ".join(adapters) or "base") + "\n")
    return beside
