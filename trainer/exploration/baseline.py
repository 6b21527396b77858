"""A model of the words alone: what can be told without ever looking at a photo.

The first warning, before anything is trained: if it does well, labels are given away by the
sentences (Gururangan et al. 2018, arXiv:1803.02324; Poliak et al. 2018, arXiv:1805.01042).
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from featstore.config import SPLITS
from featstore.data.dataset import Dataset
from featstore.data.examples import Examples, class_counts
from featstore.data.labels import labels_of
from featstore.errors import counted
from featstore.quantities import share
from trainer.exploration.sentences import words_of
from trainer.logits import predicted_labels
from trainer.metrics import class_metrics
from trainer.statistics import Clustered, intervals, paired_difference

MODEL = (
    "logistic regression (L2, C = 1) on TF-IDF of words and pairs of words that stand in two"
    " sentences or more"
)


def hypothesis_only(
    dataset: Dataset, classes: int, draws: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Train a model of the words on the train rows, and measure it on val and test.

    Args:
        dataset: The rows and their split.
        classes: 2 or 3.
        draws, seed: Of the intervals, bootstrapped over images.

    Returns:
        `model`, `train_rows`, `words` (and pairs), `reason` why there is none, else None; and
        `splits`: of each of val and test that has rows `rows`, `images`, `accuracy`,
        `macro_f1`, their `intervals` (95 %), `majority`: the `class` that is most frequent in
        train and its `share` here, and `above_majority`: the `difference` of the accuracy to
        that share, with `low` and `high`.

    Cost: 2 s for 31,340 rows on one core.
    """
    train = dataset.examples.select(dataset.rows("train"))
    counts = class_counts(train.labels, classes)
    found: dict[str, Any] = {
        "model": MODEL,
        "train_rows": len(train),
        "words": 0,
        "reason": None,
        "splits": {},
    }
    if lacking := [name for name, count in counts.items() if count < 2]:
        found["reason"] = f"train has fewer than two rows of {', '.join(lacking)}"
        return found
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectorizer = TfidfVectorizer(
        analyzer=_terms, min_df=min(2, len(train)), sublinear_tf=True, dtype=np.float64
    )
    try:
        table = vectorizer.fit_transform(train.hypotheses)
    except ValueError:
        found["reason"] = "no word stands in two sentences of train"
        return found
    model = LogisticRegression(max_iter=1000).fit(table, train.labels)
    found["words"] = len(vectorizer.vocabulary_)
    majority = max(counts, key=counts.__getitem__)
    for split in SPLITS[1:]:
        part = dataset.examples.select(dataset.rows(split))
        if not len(part):
            continue
        logits = model.decision_function(vectorizer.transform(part.hypotheses))
        found["splits"][split] = _measured(part, logits, classes, majority, draws, seed)
    if not found["splits"]:
        found["reason"] = "neither val nor test has rows"
    return found


def _terms(sentence: str) -> list[str]:
    """Return a sentence's words, and each two that follow each other."""
    words = words_of(sentence)
    return words + [f"{first} {second}" for first, second in itertools.pairwise(words)]


def _measured(
    part: Examples, logits: np.ndarray, classes: int, majority: str, draws: int, seed: int
) -> dict[str, Any]:
    threshold = 0.5 if classes == 2 else None
    clustered = Clustered(part.image_ids.astype(str), draws, seed)
    called = predicted_labels(logits, threshold)
    at = class_metrics(part.labels, called, classes)
    spread = intervals(part.labels, logits, threshold, clustered)
    always = part.labels == labels_of(classes)[majority]
    gap = paired_difference(called == part.labels, always, clustered)
    return {
        "rows": len(part),
        "images": clustered.images,
        "accuracy": at["accuracy"],
        "macro_f1": at["macro_f1"],
        "intervals": {name: spread[name] for name in ("accuracy", "macro_f1")},
        "majority": {"class": majority, "share": float(np.mean(always))},
        "above_majority": {key: gap[key] for key in ("difference", "low", "high")},
    }


def sentence_of(found: dict[str, Any]) -> str:
    """Say what it means, of test, or else of val."""
    if not found["splits"]:
        return f"Not measured: {found['reason']}."
    split, at = list(found["splits"].items())[-1]
    majority, gap = at["majority"], at["above_majority"]
    interval = at["intervals"]["accuracy"]
    between = (
        f" (95 % interval {100 * interval['low']:.1f} to {100 * interval['high']:.1f})"
        if interval
        else ""
    )
    reached = (
        f"A model that never sees the photo reaches {share(at['accuracy'])}{between} on"
        f" {split}, where always answering {majority['class']} reaches"
        f" {share(majority['share'])}"
    )
    if gap["low"] > 0:
        return (
            f"{reached}: the sentences give much of the answer away. What a model of photo and"
            " sentence adds to this, not its accuracy, is what it sees."
        )
    return (
        f"{reached}: these words alone give nothing away that {counted(at['images'], 'photo')}"
        " could show. A stronger model of the sentence still may."
    )
