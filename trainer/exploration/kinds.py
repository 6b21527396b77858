"""Kinds of sentence: how frequent each is, how its labels lie, which may be oversampled."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from featstore.data.examples import Examples, class_counts
from featstore.data.labels import LABELS
from trainer.buckets import SHIPPED, bucket_rows
from trainer.statistics import Clustered, proportion_interval

SPATIAL = SHIPPED.with_name("spatial.toml")
"""The eleven spatial keywords of the reference study."""
BALANCE = 0.05
"""How far a class's share of a bucket may be from an equal one; of two classes 45 to 55 %."""
FREQUENT = 0.1
"""The share of rows from which on oversampling a bucket moves what a model sees."""
VERDICTS = {
    "fit": "fit",
    "rare": "balanced, but rare",
    "skewed": "skewed",
    "empty": "no row",
}


def kinds(
    patterns: Mapping[str, re.Pattern[str]],
    examples: Examples,
    classes: int,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Describe the rows of each kind of sentence.

    Args:
        patterns: Of `trainer.buckets.load_buckets`.
        examples: The rows.
        classes: 2 or 3.
        draws, seed: Of the interval, bootstrapped over images.

    Returns:
        Of each kind, and of "any": `rows`, `share` of all rows; `classes`: rows of each;
        `share_of`: of each class's rows the share that is of this kind (None where it has
        none); `entailment`: its share, with `low` and `high` (95 %), None without rows; and
        `verdict`: a key of `VERDICTS`.
    """
    members = bucket_rows(patterns, examples.hypotheses)
    any_of = np.zeros(len(examples), np.bool_)
    for inside in members.values():
        any_of |= inside
    of_all = class_counts(examples.labels, classes)
    found = {}
    for name, inside in {**members, "any": any_of}.items():
        part = examples.select(inside)
        counts = class_counts(part.labels, classes)
        rows = len(part)
        entailment = None
        if rows:
            clustered = Clustered(part.image_ids.astype(str), draws, seed)
            interval = proportion_interval(part.labels == LABELS["entailment"], clustered)
            share = counts["entailment"] / rows
            entailment = {"share": share, "low": interval["low"], "high": interval["high"]}
        found[name] = {
            "rows": rows,
            "share": rows / len(examples),
            "classes": counts,
            "share_of": {
                label: counts[label] / total if total else None for label, total in of_all.items()
            },
            "entailment": entailment,
            "verdict": _verdict(counts, rows / len(examples)),
        }
    return found


def _verdict(counts: Mapping[str, int], share: float) -> str:
    rows = sum(counts.values())
    if not rows:
        return "empty"
    gaps = [abs(count / rows - 1 / len(counts)) for count in counts.values()]
    # The tolerance: 0.55 - 0.5 is more than 0.05 in binary.
    if max(gaps) > BALANCE + 1e-9:
        return "skewed"
    return "fit" if share >= FREQUENT else "rare"


def source_of(path: str | os.PathLike[str] | None, shipped: Path) -> str:
    """Return how a page names a file of kinds."""
    return shipped.name if path is None else str(path)
