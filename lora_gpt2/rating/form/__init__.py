"""The form in which people rate: one file to send around, or a page that a local server gives out.

It names no adapter: tasks are numbered, and which text is whose stays in the round's folder.
"""

from __future__ import annotations

import json
from pathlib import Path

from lora_gpt2.core.files import wrap_os_errors, write_user_file
from lora_gpt2.rating.rounds import Round

FOLDER = Path(__file__).parent
STYLE, SCRIPT = "form.css", "form.js"


def build_form(round_: Round, linked: bool = False) -> str:
    """Returns the page: whole in itself, or with its style and script `linked` from beside it."""
    tasks = [{"number": task.number, "prompt": task.prompt, "texts": task.texts} for task in round_.tasks]
    shown = {"id": round_.identity, "mode": round_.mode, "criteria": round_.criteria, "tasks": tasks, "served": linked}
    data = json.dumps(shown).replace("<", "\\u003c")
    page, style, script = ((FOLDER / name).read_text(encoding="utf-8") for name in ("form.html", STYLE, SCRIPT))
    style = f'<link rel="stylesheet" href="{STYLE}">' if linked else f"<style>\n{style}</style>"
    script = f'<script src="{SCRIPT}"></script>' if linked else f"<script>\n{script}</script>"
    return page.replace("<!--style-->", style).replace("<!--script-->", script).replace("<!--round-->", data)


def write_form(path: Path, round_: Round) -> None:
    """Writes the page, whole in itself, to a file."""
    with wrap_os_errors(f"write {path}"):
        write_user_file(path, build_form(round_))
