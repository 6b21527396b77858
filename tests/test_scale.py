"""docs/SCALE.md says what its arithmetic gives."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.scale import report

ROOT = Path(__file__).resolve().parent.parent


def cells(text: str) -> list[list[str]]:
    """Return the values of a Markdown table's lines, without their titles."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[2:-1]] for line in lines[2:]]


def test_the_table_is_the_benchmarks() -> None:
    figures = json.loads((ROOT / "benchmarks" / "results" / "amd-epyc-2-cores.json").read_text())
    table = cells((ROOT / "docs" / "SCALE.md").read_text())
    assert len(table) > 10
    assert table == cells(report(figures))
