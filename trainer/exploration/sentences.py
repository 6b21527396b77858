"""Labels, lengths of sentences, rows an image, and sentences that come again."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from featstore.config import SPLITS
from featstore.data.dataset import Dataset
from featstore.data.examples import Examples, class_counts
from featstore.data.labels import labels_of

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def words_of(sentence: str) -> list[str]:
    """Return a sentence's words in lower case: runs of letters and digits, "isn't" being one."""
    return [word.replace("’", "'") for word in _WORD.findall(sentence.lower())]


def labels_by_split(dataset: Dataset, classes: int) -> dict[str, dict[str, int]]:
    """Return of each split, and of "all", its rows, its photos and the rows of each class."""
    found = {}
    for split in ("all", *SPLITS):
        part = dataset.examples.select(dataset.rows(split))
        photos = len(set(part.image_ids))
        found[split] = {
            "rows": len(part),
            "photos": photos,
            **class_counts(part.labels, classes),
        }
    return found


def lengths(
    counts: Sequence[int] | NDArray[np.int64], labels: NDArray[np.int8], classes: int
) -> dict[str, Any]:
    """Describe the lengths of sentences.

    Args:
        counts: Words or tokens of each row, of shape (rows,).
        labels: int8 of shape (rows,).
        classes: 2 or 3.

    Returns:
        `mean`, `median`, `p95`, `max`, `mean_of` (of each class, None without rows) and
        `histogram`: of each class the rows of 0, 1, 2 … words.
    """
    values = np.asarray(counts, np.int64)
    parts = {name: values[labels == label] for name, label in labels_of(classes).items()}
    longest = int(values.max(initial=0))
    return {
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "p95": float(np.percentile(values, 95)),
        "max": longest,
        "mean_of": {
            name: float(part.mean()) if len(part) else None for name, part in parts.items()
        },
        "histogram": {
            name: np.bincount(part, minlength=longest + 1).tolist() for name, part in parts.items()
        },
    }


def rows_an_image(examples: Examples) -> dict[str, Any]:
    """Describe how many rows a photo has.

    Returns:
        `mean`, `median`, `max`, `histogram` (photos with 0, 1, 2 … rows) and
        `several_classes`: the share of photos that have rows of more than one class.
    """
    _, at = np.unique(examples.image_ids.astype(str), return_inverse=True)
    rows = np.bincount(at)
    labels = np.stack([np.bincount(at, examples.labels == n) > 0 for n in range(3)])
    return {
        "mean": float(rows.mean()),
        "median": float(np.median(rows)),
        "max": int(rows.max()),
        "histogram": np.bincount(rows).tolist(),
        "several_classes": float(np.mean(labels.sum(axis=0) > 1)),
    }


def repeats(dataset: Dataset) -> dict[str, Any]:
    """Describe sentences that stand in more than one row.

    Sentences are compared word by word: case and punctuation do not count.

    Returns:
        `distinct` sentences; `conflicts`: pairs of photo and sentence with rows of different
        labels; and `seen`: of val and test the `rows` whose sentence is in train, their
        `share`, how many of them have the label that it mostly has in train (`agreeing`; of
        labels that are as frequent, the first), and whether these are more than one answer
        for all of them would reach (`learnable`).
    """
    examples = dataset.examples
    plain = [" ".join(words_of(sentence)) for sentence in examples.hypotheses]
    labels = examples.labels.tolist()
    of_pair: dict[tuple[str, str], set[int]] = {}
    for image_id, sentence, label in zip(examples.image_ids, plain, labels, strict=True):
        of_pair.setdefault((image_id, sentence), set()).add(label)
    of_train: dict[str, Counter[int]] = {}
    for row in dataset.rows("train").tolist():
        of_train.setdefault(plain[row], Counter())[labels[row]] += 1
    seen = {}
    for split in SPLITS[1:]:
        rows = dataset.rows(split).tolist()
        known = [row for row in rows if plain[row] in of_train]
        agreeing = sum(of_train[plain[row]].most_common(1)[0][0] == labels[row] for row in known)
        share = len(known) / len(rows) if rows else 0.0
        most = Counter(labels[row] for row in known).most_common(1)
        learnable = bool(known) and _above(agreeing, len(known), most[0][1] / len(known))
        seen[split] = {
            "rows": len(known),
            "share": share,
            "agreeing": agreeing,
            "learnable": learnable,
        }
    conflicts = sum(len(found) > 1 for found in of_pair.values())
    return {"distinct": len(set(plain)), "conflicts": conflicts, "seen": seen}


def _above(hits: int, rows: int, share: float) -> bool:
    """Tell whether hits of rows are more than a share, beyond chance (one-sided, 2.5 %)."""
    return bool(binomtest(hits, rows).proportion_ci(0.95, "wilson").low > share)
