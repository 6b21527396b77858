"""Intervals of a run's figures, and of the threshold that val gave it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from trainer.logits import FloatArray, Values, predicted_labels, probabilities_of, sigmoid
from trainer.metrics import (
    CALIBRATION_BINS,
    GRID,
    Labels,
    best_thresholds,
    brier_rows,
    check_rows,
    confidence_bins,
    row_losses,
)
from trainer.statistics.clustered import (
    LEVEL,
    Clustered,
    Interval,
    check_length,
    middle,
    percentiles,
    wilson,
)


def intervals(
    labels: Labels,
    logits: Values,
    threshold: float | None,
    clustered: Clustered,
    level: float = LEVEL,
) -> dict[str, Interval | None]:
    """Return the interval of each figure of `bootstrap`, see `intervals_of`."""
    return intervals_of(bootstrap(labels, logits, threshold, clustered), clustered, level)


def intervals_of(
    drawn: Mapping[str, FloatArray], clustered: Clustered, level: float = LEVEL
) -> dict[str, Interval | None]:
    """Return the interval of each figure of `bootstrap`; None as `percentiles` says.

    An accuracy that is the same in all draws has Wilson's interval as if each image were one
    row: how much the rows of one go together, such rows do not tell, so this errs to the wide
    side (Franco et al. 2019, PMC6690503, recommend Wilson's with an effective
    size). What is no share of rows, as macro-F1 or the AUC, then has none.

    Args:
        drawn: Of `bootstrap`.
        clustered: Which rows are of one image.
        level: Such as 0.95.
    """
    found = {name: percentiles(values, clustered, level) for name, values in drawn.items()}
    for name in ("accuracy", "accuracy_at_half"):
        if name in found and found[name] is None:
            same = middle(drawn[name], clustered, level)
            found[name] = same and wilson(same["low"], clustered.images, level)
    return found


def bootstrap(
    labels: Labels, logits: Values, threshold: float | None, clustered: Clustered
) -> dict[str, FloatArray]:
    """Compute a run's figures on each draw of images.

    Args:
        labels: Of shape (rows,): 0 or 1, or below the number of classes.
        logits: Float of shape (rows,), or (rows, classes).
        threshold: On the probability; it stays as it is over the draws, as a test split
            stays measured at the threshold of val. Three classes have none.
        clustered: The rows' images.

    Returns:
        `accuracy` and `macro_f1` of what the rows are called, of two classes
        `accuracy_at_half` and `macro_f1_at_half`, `auc`, `average_precision`, `brier`,
        `calibration_error`, `loss`, each as in `trainer.metrics`: float64 of shape (draws,).
        AUC and average precision are NaN in a draw that lacks a class. The calibration error
        of a draw is on average above that of the rows, which is itself above that of all such
        rows (bins of few rows stray either way and the error takes their size), so its
        interval leans upwards.

    Raises:
        ValueError: Shapes differ, a label of no class, or a logit that is not finite.

    Cost: O(draws · rows), after one sort.
    """
    truth, values = check_rows(labels, logits, "logits")
    check_length(len(truth), clustered)
    probabilities = probabilities_of(values)
    at_bin, confidence, correct = confidence_bins(truth, probabilities)
    classes = 2 if values.ndim == 1 else values.shape[1]
    by_image = clustered.by_image

    def outcomes(at: float | None) -> sparse.csr_array:
        """Count each image's rows by their truth and what they are called."""
        cells = classes * truth.astype(np.int64) + predicted_labels(values, at)
        return by_image(np.ones(len(truth)), classes**2, cells)

    one_logit = values.ndim == 1
    cuts = {"": threshold, "_at_half": 0.5} if one_logit else {"": None}
    parts = {
        **{suffix: outcomes(at) for suffix, at in cuts.items()},
        "gaps": by_image(correct - confidence, CALIBRATION_BINS, at_bin),
        "brier": by_image(brier_rows(truth, probabilities)),
        "loss": by_image(row_losses(truth, values)),
    }
    table = sparse.hstack(list(parts.values()), format="csr")
    # Of three classes each against the rest.
    rankings = (
        [_Ranked(truth, values)]
        if one_logit
        else [_Ranked(truth == i, probabilities[:, i]) for i in range(classes)]
    )
    images_of = [clustered.image_of_row[ranked.order] for ranked in rankings]
    sums, areas = [], []
    for counts in clustered.counts():
        sums.append(counts @ table)
        pairs = zip(rankings, images_of, strict=True)
        each = [ranked.areas(counts[:, images]) for ranked, images in pairs]
        areas.append(np.mean(each, axis=0))
    ends = np.cumsum([part.shape[1] for part in parts.values()])[:-1]
    of = dict(zip(parts, np.split(np.concatenate(sums), ends, axis=1), strict=True))
    rows = of[""].sum(axis=1)
    auc, average_precision = np.concatenate(areas, axis=1)
    shares = {
        f"{name}{suffix}": share(of[suffix])
        for suffix in cuts
        for name, share in (("accuracy", _accuracy), ("macro_f1", _macro_f1))
    }
    return {
        **shares,
        "auc": auc,
        "average_precision": average_precision,
        "brier": of["brier"][:, 0] / rows,
        "calibration_error": np.abs(of["gaps"]).sum(axis=1) / rows,
        "loss": of["loss"][:, 0] / rows,
    }


def threshold_interval(
    labels: Labels, logits: Values, clustered: Clustered, level: float = LEVEL
) -> Interval | None:
    """Return the interval of the threshold that `sweep_threshold` picks on val.

    Args:
        labels: 0 or 1 of shape (rows,), of the val split.
        logits: Float of shape (rows,).
        clustered: The rows' images.
        level: Such as 0.95.

    Returns:
        Percentiles of the threshold picked on each draw, equal where it hardly ever differs;
        None for rows of one image.

    Raises:
        ValueError: As `bootstrap`.
    """
    truth, values = check_rows(labels, logits, "logits")
    check_length(len(truth), clustered)
    # Number of thresholds at or below each probability: the row is called positive there.
    passed = np.searchsorted(GRID, sigmoid(values), side="right")
    cells = len(GRID) + 1
    table = clustered.by_image(np.ones(len(truth)), 2 * cells, truth * cells + passed)
    picked = []
    for counts in clustered.counts():
        negative, positive = np.split(counts @ table, 2, axis=1)
        # Called negative at a threshold: those that did not pass it.
        tn = np.cumsum(negative, axis=1)[:, :-1]
        fn = np.cumsum(positive, axis=1)[:, :-1]
        fp = negative.sum(axis=1, keepdims=True) - tn
        tp = positive.sum(axis=1, keepdims=True) - fn
        picked.append(best_thresholds(_macro_f1(np.stack([tn, fp, fn, tp], axis=-1)), GRID))
    return middle(np.concatenate(picked), clustered, level)


class _Ranked:
    """Rows sorted once by score, for the two figures that only depend on their order."""

    def __init__(self, truth: npt.NDArray[Any], scores: FloatArray) -> None:
        self.order = np.argsort(-scores, kind="stable")
        self.positive = truth[self.order].astype(np.float64)
        ranked = scores[self.order]
        # Rows of one score are told apart by no threshold: only the last of them counts.
        self.ends = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)

    def areas(self, weights: FloatArray) -> FloatArray:
        """Return AUC and average precision, with weights.

        Args:
            weights: float64 of shape (draws, rows), in the order of `order`.

        Returns:
            float64 of shape (2, draws); NaN where a class has no weight.
        """
        called = np.cumsum(weights, axis=1)[:, self.ends]
        tp = np.cumsum(weights * self.positive, axis=1)[:, self.ends]
        fp = called - tp
        gained = np.diff(tp, axis=1, prepend=0)
        positives, negatives = tp[:, -1], fp[:, -1]
        # Trapezoids under the ROC curve: a tie counts half.
        area = (np.diff(fp, axis=1, prepend=0) * (tp - gained / 2)).sum(axis=1)
        precision = (gained * tp / np.maximum(called, 1)).sum(axis=1)
        both = (positives > 0) & (negatives > 0)
        auc = area / np.where(both, positives * negatives, np.nan)
        return np.stack([auc, precision / np.where(both, positives, np.nan)])


def _matrices(cells: FloatArray) -> FloatArray:
    """Return confusion matrices of their cells, such as tn, fp, fn, tp.

    Args:
        cells: float64 of shape (..., n²): by truth, then by what it is called.

    Returns:
        The same numbers, of shape (..., n, n).
    """
    classes = math.isqrt(cells.shape[-1])
    return cells.reshape(*cells.shape[:-1], classes, classes)


def _accuracy(cells: FloatArray) -> FloatArray:
    """Return the accuracy of confusion matrices, see `_matrices`."""
    hits = np.trace(_matrices(cells), axis1=-2, axis2=-1)
    return np.asarray(hits / cells.sum(axis=-1))


def _macro_f1(cells: FloatArray) -> FloatArray:
    """Return the macro-F1 of confusion matrices, see `_matrices` and `class_metrics`."""
    matrices = _matrices(cells)
    hits = np.diagonal(matrices, axis1=-2, axis2=-1)
    f1 = 2 * hits / np.maximum(matrices.sum(axis=-1) + matrices.sum(axis=-2), 1)
    return np.asarray(f1.sum(axis=-1) / matrices.shape[-1])
