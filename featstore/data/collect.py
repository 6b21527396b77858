"""Rows as parsed become `Examples`, or issues.

A row that cannot be used is dropped and reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from featstore.data.examples import (
    DUPLICATE,
    NOT_UTF_8,
    READ_AS,
    Examples,
    ReadResult,
    RowIssue,
    UnusableRowsError,
    drop_repeats,
    summarise,
)
from featstore.data.labels import (
    ACCEPTED,
    ACCEPTED_OF_THREE,
    NEUTRAL,
    UNKNOWN_LABEL,
    UNLABELLED,
    FileLabels,
    read_label,
)
from featstore.data.values import is_missing, read_hypothesis, read_image_id

WRONG_CELLS = "wrong number of cells"
CONFLICT = "conflicting labels"


class Raw(NamedTuple):
    """One record as parsed, before any check of its values."""

    line: int
    image_id: Any
    text: Any
    label: Any
    problem: str = ""


def collect(
    path: Path,
    records: Iterable[Raw],
    labelled: bool,
    unique: bool,
    detected: str = "",
    classes: int = 2,
) -> ReadResult:
    """Check every record's values; keep the usable rows and report the others.

    Args:
        path: What to call the file.
        records: As parsed.
        labelled: Rows without a label are dropped.
        unique: Repeats are dropped.
        detected: The encoding of the file, where nobody named it.
        classes: 2 leaves neutral rows out, 3 keeps them.

    Raises:
        RowError: The labels are class ids, or letters of a choice.
        UnusableRowsError: No row is left.
    """
    file = str(path)
    rows: list[tuple[str, str, int, int]] = []
    issues: list[RowIssue] = []
    first: dict[tuple[str, str], dict[int, int]] = {}
    conflicts: dict[tuple[str, str], None] = {}
    kinds = FileLabels(path, strict=labelled)

    for record in records:
        line = record.line
        image_id, reason, detail = read_image_id(record.image_id)
        text, text_reason, text_detail = read_hypothesis(record.text)
        label = UNLABELLED
        if record.problem:
            reason, detail = WRONG_CELLS, record.problem
        elif not reason:
            reason, detail = text_reason, text_detail
        odd, odd_detail, coded = "", "", ""
        if not record.problem and (labelled or not is_missing(record.label)):
            label, odd, odd_detail = read_label(record.label, classes)
            coded = kinds.see(record.label, line)
            if labelled and not reason:
                reason, detail = odd, odd_detail
        if not reason:
            pair = (image_id, text)
            seen = first.setdefault(pair, {})
            if label in seen and unique:
                reason, detail = DUPLICATE, f"same as line {seen[label]}"
            else:
                seen.setdefault(label, line)
                if len(seen.keys() - {UNLABELLED}) > 1:
                    conflicts[pair] = None
                if odd:
                    issues.append(RowIssue("kept", file, line, image_id, odd, text, odd_detail))
                if detected and not (image_id.isascii() and text.isascii()):
                    why = f"{READ_AS} {detected}"
                    issues.append(RowIssue("kept", file, line, image_id, why, text, NOT_UTF_8))
                if coded and not odd:
                    kinds.rows[coded].append(len(rows))
                rows.append((image_id, text, label, line))
        if reason:
            issues.append(RowIssue("dropped", file, line, image_id, reason, text, detail))

    if not rows:
        raise UnusableRowsError(
            f"{path}: has no usable row: {_why_none(issues, classes)}", issues=issues
        )
    for row, reason, detail in kinds.not_labels():
        image_id, text, _, line = rows[row]
        rows[row] = (image_id, text, UNLABELLED, line)
        issues.append(RowIssue("kept", file, line, image_id, reason, text, detail))
    if conflicts:
        for image_id, text, label, line in rows:
            if (image_id, text) in conflicts and label != UNLABELLED:
                lines_of = first[image_id, text]
                other = next(lines_of[o] for o in lines_of if o not in (label, UNLABELLED))
                detail = f"the other label stands in line {other}"
                issues.append(RowIssue("kept", file, line, image_id, CONFLICT, text, detail))
    issues.sort(key=lambda issue: issue.line)
    image_ids, texts, labels, lines = zip(*rows, strict=True)
    examples = Examples(
        np.array(image_ids, dtype=object),
        np.array(texts, dtype=object),
        np.array(labels, dtype=np.int8),
        np.array(lines, dtype=np.int64),
        np.full(len(rows), file, dtype=object),
    )
    return ReadResult(examples, issues)


def joined(parts: Sequence[Examples], unique: bool) -> tuple[Examples, list[RowIssue]]:
    """Return the rows of several files as one table.

    Args:
        parts: The rows of each file, which says of itself what it repeats and contradicts.
        unique: Rows that repeat one of another file are dropped.

    Returns:
        The rows, and one issue for each that was dropped, or whose hypothesis and photo another
        file gives another label.
    """
    examples, issues = Examples.concatenate(parts), list[RowIssue]()
    if unique:
        examples, issues = drop_repeats(examples)
    first: dict[tuple[str, str], dict[int, int]] = {}
    pairs = list(zip(examples.image_ids, examples.hypotheses, strict=True))
    labels = examples.labels.tolist()
    for row, pair in enumerate(pairs):
        first.setdefault(pair, {}).setdefault(labels[row], row)
    for row, pair in enumerate(pairs):
        other = next((at for label, at in first[pair].items() if label != labels[row]), row)
        if examples.sources[other] != examples.sources[row]:
            file, line = examples.sources[other], examples.source_lines[other]
            place = str(examples.sources[row]), int(examples.source_lines[row])
            detail = f"the other label stands in line {line} of {file}"
            issues.append(RowIssue("kept", *place, pair[0], CONFLICT, pair[1], detail))
    return examples, issues


def _why_none(issues: Sequence[RowIssue], classes: int) -> str:
    """Say why no row can be used, with the first of the most frequent reason as an example."""
    counts = summarise(issues)
    if not counts:
        return "nothing follows the header"
    why = ", ".join(f"{count} {reason}" for reason, count in counts.items())
    first = next(issue for issue in issues if issue.reason == next(iter(counts)))
    detail = f" ({first.detail})" if first.detail else ""
    words = ACCEPTED if classes == 2 else ACCEPTED_OF_THREE
    accepted = f"; labels read: {words}" if UNKNOWN_LABEL in counts else ""
    kept = "; --classes 3 keeps neutral rows" if NEUTRAL in counts else ""
    return f"all were dropped ({why}): line {first.line}: {first.reason}{detail}{accepted}{kept}"
