"""What a label is: entailment is 1, the positive class, everywhere.

Labels are words in any case, or the integers 1 (entailment) and 0
(contradiction). No other integer coding is read: the class ids of SNLI on the
Hugging Face hub (0 entailment, 1 neutral, 2 contradiction) contradict this one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from featstore.errors import RowError, short

LABELS = {"contradiction": 0, "entailment": 1}
"""The polarity of the whole project: entailment is 1, the positive class."""
LABEL_NAMES = {label: name for name, label in LABELS.items()}

UNLABELLED = -1


NEUTRAL = "neutral"
UNKNOWN_LABEL = "unknown label"
_LABEL_WORDS = {**LABELS, "0": 0, "1": 1}
_INTEGER = re.compile(r"[+-]?\d{1,18}")


def read_label(value: Any) -> tuple[int, str, str]:
    """Return a label, and the reason and detail why it cannot be used."""
    word = value.strip().lower() if isinstance(value, str) else value
    if isinstance(word, int):  # and True becomes "True", which is no label
        word = str(word)
    if isinstance(word, str):
        if word in _LABEL_WORDS:
            return _LABEL_WORDS[word], "", ""
        if word == NEUTRAL:
            return UNLABELLED, NEUTRAL, ""
    return UNLABELLED, UNKNOWN_LABEL, "missing" if value is None else f"label {short(value)}"


def integer_label(value: Any) -> int | None:
    """Return a label's integer, where it is one."""
    if type(value) is int:
        return value
    if isinstance(value, str) and _INTEGER.fullmatch(value.strip()):
        return int(value)
    return None


def class_ids_error(path: Path, line: int, code: int, other_line: int, other: int) -> RowError:
    return RowError(
        f"{path}:{line}: label {code}, but line {other_line} has {other}; expected integer labels"
        " 1 = entailment and 0 = contradiction only: class ids (SNLI: 0 = entailment, 2 ="
        " contradiction) would be read inverted; write the labels as words"
    )
