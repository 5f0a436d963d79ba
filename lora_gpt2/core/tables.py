"""Tables of text."""

from __future__ import annotations

from collections.abc import Sequence

from lora_gpt2.core.printable import printable


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns columns aligned by width, the first to the left, the others to the right; cells are printable."""
    table = [[printable(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = []
    for row in table:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
