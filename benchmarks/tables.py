"""Tables of figures, in Markdown that also reads well in a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with columns of one width.

    Args:
        header: Column titles; the first column is aligned left, the others right.
        rows: Cells, as many in each row as in the header.

    Raises:
        ValueError: A row has another number of cells.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"row {list(row)} has {len(row)} cells, expected {len(header)}")
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in (header, *rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*escaped, strict=True)]
    lines = []
    for row in escaped:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append(f"| {' | '.join(cells)} |")
    rules = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines.insert(1, f"| {' | '.join(rules)} |")
    return "\n".join(lines)
