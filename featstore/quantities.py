"""Times, shares, numbers and sizes as people read them; in JSON they stay what they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MISSING = "–"


def share(value: float | None, digits: int = 1) -> str:
    """Return a share as per cent, a dash where there is none."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{100 * value:.{digits}f} %"


def both_shares(figures: Mapping[str, Any], prefix: str = "") -> str:
    """Return "accuracy 75.00 %, macro-F1 74.98 %" of figures that have both, as `val_accuracy`."""
    accuracy, macro_f1 = (share(figures[prefix + key], 2) for key in ("accuracy", "macro_f1"))
    return f"accuracy {accuracy}, macro-F1 {macro_f1}"


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with so many decimals (a whole one with none), a dash for none."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def duration(seconds: float | None) -> str:
    """Return seconds as people say them, a dash for none.

    "0.4 s" (a whole number: "3 s"), "2 min 5 s", "3 h 20 min".
    """
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    # Of what is shown: 59.7 s is a minute.
    if isinstance(seconds, float) and round(seconds, 1) < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if minutes else f"{hours:,} h"


def size(num_bytes: float | None) -> str:
    """Return bytes in the unit that has one to three digits before the point."""
    if num_bytes is None:
        return MISSING
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        # Of what is shown: 999,700 bytes are a megabyte.
        if value < 999.5:
            return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.0f} TB" if value >= 1000 else f"{value:.3g} TB"


def rate(per_second: float, unit: str) -> str:
    """Return how much of a unit is done a second: "1,234 rows/s"; of "rows of test" "1 row/s"."""
    number = f"{per_second:,.0f}" if per_second >= 999.5 else f"{per_second:.3g}"
    noun = unit.split()[0]
    return f"{number} {noun.removesuffix('s') if number == '1' else noun}/s"
