"""What a label is: entailment is 1, the positive class, everywhere.

A data set has two classes, contradiction (0) and entailment (1), or three with neutral (2);
of three, a model's logits stand in this order. Labels are words in any case, or the numbers
1 (entailment) and 0 (contradiction). No other coding by numbers is read: the class ids of
SNLI on the Hugging Face hub (0 entailment, 1 neutral, 2 contradiction) contradict this one.
E and C are read where they are not letters of a multiple choice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from featstore.errors import RowError, short

LABELS = {"contradiction": 0, "entailment": 1}
"""The polarity of the whole project: entailment is 1, the positive class."""
NEUTRAL = "neutral"
ALL_LABELS = {**LABELS, NEUTRAL: 2}
LABEL_NAMES = {label: name for name, label in ALL_LABELS.items()}

UNLABELLED = -1
UNKNOWN_LABEL = "unknown label"
CLASS_IDS = "class ids for labels"
CHOICES = "letters of choices for labels"
_ACCEPTED = "entailment/contradiction, 1/0, true/false, yes/no or E/C, in any case"
ACCEPTED = f"{_ACCEPTED}; neutral (N) is left out"
ACCEPTED_OF_THREE = f"{_ACCEPTED}; neutral or N"
_WORDS = {**LABELS, "0": 0, "1": 1, "false": 0, "true": 1, "no": 0, "yes": 1, "c": 0, "e": 1}
_NEUTRAL_WORDS = (NEUTRAL, "n")
_INTEGER = re.compile(r"([+-]?\d{1,18})(?:\.0*)?")


def labels_of(classes: int) -> dict[str, int]:
    """Return the labels of a data set of 2 or 3 classes, by name, in the order of their numbers."""
    return {name: label for name, label in ALL_LABELS.items() if label < classes}


def read_label(value: Any, classes: int = 2) -> tuple[int, str, str]:
    """Return a label, and the reason and detail why it cannot be used.

    Args:
        value: As parsed.
        classes: 2 leaves neutral out, 3 reads it.
    """
    word = value.strip().lower() if isinstance(value, str) else str(value).lower()
    code = integer_label(value)
    word = word if code is None else str(code)
    if isinstance(value, str | int | float):
        if word in _WORDS:
            return _WORDS[word], "", ""
        if word in _NEUTRAL_WORDS:
            return (UNLABELLED, NEUTRAL, "") if classes == 2 else (ALL_LABELS[NEUTRAL], "", "")
    return UNLABELLED, UNKNOWN_LABEL, "missing" if value is None else f"label {short(value)}"


def integer_label(value: Any) -> int | None:
    """Return a label's whole number, where it is one."""
    if type(value) is int:
        return value
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        return int(value)
    if isinstance(value, str) and (found := _INTEGER.fullmatch(value.strip())):
        return int(found[1])
    return None


def named_class(value: Any, names: Sequence[str]) -> Any:
    """Return the name of a label that is a class id; any other label as it is.

    Args:
        value: As parsed.
        names: Of the class ids, from 0 on. -1 is no label, as for the `datasets` package.
    """
    code = integer_label(value)
    if code is None or code == -1:
        return None if code == -1 else value
    return names[code] if 0 <= code < len(names) else f"class id {code}"


class FileLabels:
    """What the labels of one file say together: that its numbers, or letters, are no labels.

    Args:
        path: The file, for the error.
        strict: Refuse the file; else its numbers, or letters, count as no label.
    """

    def __init__(self, path: Path, strict: bool) -> None:
        self.path, self.strict = path, strict
        # By what is coded, and whether it is a label: the first line, and what stands there.
        self.first: dict[tuple[str, bool], tuple[int, Any]] = {}
        self.rows: dict[str, list[int]] = {CLASS_IDS: [], CHOICES: []}

    def see(self, value: Any, line: int) -> str:
        """Take a label into account.

        Args:
            value: The label as parsed.
            line: Where it stands.

        Returns:
            What such labels are where the file refutes them: `CLASS_IDS`, `CHOICES`, or ""
            for words. `rows` is to have the places of the rows that were read so.

        Raises:
            RowError: With those before, it shows that these are no labels.
        """
        code = integer_label(value)
        letter = value.strip().lower() if isinstance(value, str) else ""
        if code is not None and code >= 0:
            kind, is_label = CLASS_IDS, code <= 1
        elif len(letter) == 1 and letter.isalpha() and letter != "n":
            kind, is_label = CHOICES, letter in "ec"
        else:
            return ""
        self.first.setdefault((kind, is_label), (line, value if code is None else code))
        if self.strict and self._is_refuted(kind):
            raise self._error(kind)
        return kind

    def _is_refuted(self, kind: str) -> bool:
        return {(kind, True), (kind, False)} <= self.first.keys()

    def _error(self, kind: str) -> RowError:
        (line, found), (other_line, other) = self.first[kind, False], self.first[kind, True]
        if kind == CLASS_IDS:
            return RowError(
                f"{self.path}:{line}: label {found}, but line {other_line} has {other}; expected"
                " integer labels 1 = entailment and 0 = contradiction only: class ids (SNLI: 0 ="
                " entailment, 2 = contradiction) would be read inverted; write the labels as words"
            )
        return RowError(
            f"{self.path}:{line}: label {short(found)}, but line {other_line} has {short(other)};"
            " E and C are read as entailment and contradiction only where N is the one letter"
            " beside them: these look like answers of a choice; write the labels as words"
        )

    def not_labels(self) -> Iterator[tuple[int, str, str]]:
        """Yield the rows whose number or letter is no label, with reason and detail."""
        for kind, rows in self.rows.items():
            if self._is_refuted(kind):
                (line, found), (other_line, other) = self.first[kind, False], self.first[kind, True]
                detail = f"line {line} has label {found}, line {other_line} has {other}"
                yield from ((row, kind, detail) for row in rows)
