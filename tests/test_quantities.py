"""Times, shares, numbers and sizes as people read them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from featstore.quantities import both_shares, duration, number, rate, share, size

ROOT = Path(__file__).resolve().parent.parent


def test_numbers_are_said_as_people_do() -> None:
    assert [share(value) for value in (0.5, None, float("nan"))] == ["50.0 %", "–", "–"]
    assert [number(value) for value in (1200, 0.1234, None)] == ["1,200", "0.123", "–"]
    said = [duration(seconds) for seconds in (3, 0.44, 9.96, 59.4, 59.7, 125, 3599.6, 7260, None)]
    assert said[:5] == ["3 s", "0.4 s", "10 s", "59 s", "1 min"]
    assert said[5:] == ["2 min 5 s", "1 h", "2 h 1 min", "–"]
    sizes = [size(num_bytes) for num_bytes in (12, 999, 1500, 999_700, 2.5e9, 1e13, 2e16)]
    assert sizes == ["12 B", "999 B", "1.5 kB", "1 MB", "2.5 GB", "10 TB", "20,000 TB"]
    rates = [rate(speed, "rows of test") for speed in (0.123, 0.99999, 1.02, 10.34, 999.7, 12345.6)]
    assert rates[:3] == ["0.123 rows/s", "1 row/s", "1.02 rows/s"]
    figures = {"val_accuracy": 0.75, "val_macro_f1": 0.74975}
    assert both_shares(figures, "val_") == "accuracy 75.00 %, macro-F1 74.98 %"
    assert rates[3:] == ["10.3 rows/s", "1,000 rows/s", "12,346 rows/s"]


def test_they_are_said_in_one_place() -> None:
    """No message divides bytes into units or seconds into minutes, or says a rate or a share."""
    own = re.compile(
        r"1e[69](:[^}]*)?\} [MG]B|/ 60(:[^}]*)?\} min|/ 3600(:[^}]*)?\} h|\}[^{}]*/s\b|%\}"
    )
    found = []
    for path in sorted([*ROOT.glob("featstore/**/*.py"), *ROOT.glob("trainer/**/*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                path.name != "quantities.py"
                and isinstance(node, ast.JoinedStr)
                and own.search(ast.unparse(node))
            ):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []
