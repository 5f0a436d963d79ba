"""The frame of the pages we write: one file without scripts, which loads nothing, for a screen, a phone or paper."""

from __future__ import annotations

import html
from collections.abc import Sequence

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fafafa; margin: 0 auto; max-width: 60rem;
       padding: 1.5rem; }
h1 { font-size: 1.7rem; margin: 0 } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
.lead { color: #555; margin: .2rem 0 1rem }
.verdict { background: #fff; border-left: 4px solid #4c78a8; padding: .6rem 1rem; margin: 1rem 0 }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .7rem }
.figures div { background: #fff; border: 1px solid #e3e3e3; border-radius: 6px; padding: .5rem .8rem }
.figures b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums }
.figures span { color: #666; font-size: .85rem }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: .8rem }
.charts svg { width: 100%; height: auto; background: #fff; border: 1px solid #e3e3e3; border-radius: 6px }
table { border-collapse: collapse; width: 100%; background: #fff } td, th { text-align: left; vertical-align: top;
       padding: .35rem .7rem; border-bottom: 1px solid #e8e8e8; font-size: .92rem }
td.number { width: 1%; text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.word { white-space: nowrap } .sample { white-space: pre-wrap; overflow-wrap: anywhere } details { margin-top: 1rem }
"""


def build_page(title: str, body: str) -> str:
    """Returns a whole page; `body` is HTML, the title is not."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)} · lora-gpt2</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>
{body}</body></html>
"""


def build_cards(cards: Sequence[tuple[str, str]]) -> str:
    """Returns figures, each with what it says, as HTML."""
    shown = (f"<div><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>" for value, label in cards)
    return f'<div class="figures">{"".join(shown)}</div>'


def build_table(rows: Sequence[Sequence[str | int]], header: Sequence[str] = ()) -> str:
    """Returns a table as HTML; whole numbers stand to the right."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    lines = [f"<tr>{head}</tr>"] if header else []
    for row in rows:
        lines.append(f"<tr>{''.join(map(_build_cell, row))}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _build_cell(cell: str | int) -> str:
    if isinstance(cell, int):
        return f"<td class=number>{cell:,}</td>"
    kind = "word" if cell.isidentifier() else "sample"
    return f"<td class={kind}>{html.escape(cell)}</td>"
