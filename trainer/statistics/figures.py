"""Intervals of a run's figures, and of the threshold that val gave it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import sparse

from trainer.metrics import (
    CALIBRATION_BINS,
    GRID,
    FloatArray,
    IntArray,
    Labels,
    Values,
    best_thresholds,
    check_rows,
    confidence_bins,
    row_losses,
    sigmoid,
)
from trainer.statistics.clustered import LEVEL, Clustered, Interval, check_length, percentiles


def intervals(
    labels: Labels,
    logits: Values,
    threshold: float,
    clustered: Clustered,
    level: float = LEVEL,
) -> dict[str, Interval | None]:
    """Return the interval of each figure of `bootstrap`; None as `percentiles` says."""
    found = bootstrap(labels, logits, threshold, clustered)
    return {name: percentiles(values, clustered, level) for name, values in found.items()}


def bootstrap(
    labels: Labels, logits: Values, threshold: float, clustered: Clustered
) -> dict[str, FloatArray]:
    """Compute a run's figures on each draw of images.

    Args:
        labels: 0 or 1 of shape (rows,).
        logits: Float of shape (rows,).
        threshold: On the probability; it stays as it is over the draws, as a test split
            stays measured at the threshold of val.
        clustered: The rows' images.

    Returns:
        `accuracy` and `macro_f1` at the threshold, `accuracy_at_half`, `macro_f1_at_half`,
        `auc`, `average_precision`, `brier`, `calibration_error`, `loss`, each as in
        `trainer.metrics`: float64 of shape (draws,). AUC and average precision are NaN in a
        draw of one class. The calibration error of a draw is on average above that of the
        rows, which is itself above that of all such rows (bins of few rows stray either way
        and the error takes their size), so its interval leans upwards.

    Raises:
        ValueError: Shapes differ, a label other than 0 and 1, or a logit that is not finite.

    Cost: O(draws · rows), after one sort.
    """
    truth, values = check_rows(labels, logits, "logits")
    check_length(len(truth), clustered)
    probabilities = sigmoid(values)
    at_bin, confidence, correct = confidence_bins(truth, probabilities)
    by_image = clustered.by_image
    parts = {
        "at": by_image(np.ones(len(truth)), 4, _outcomes(truth, probabilities >= threshold)),
        "half": by_image(np.ones(len(truth)), 4, _outcomes(truth, probabilities >= 0.5)),
        "gaps": by_image(correct - confidence, CALIBRATION_BINS, at_bin),
        "brier": by_image((probabilities - truth) ** 2),
        "loss": by_image(row_losses(truth, values)),
    }
    table = sparse.hstack(list(parts.values()), format="csr")
    ranked = _Ranked(truth, values)
    image_of_ranked = clustered.image_of_row[ranked.order]
    sums, areas = [], []
    for counts in clustered.counts():
        sums.append(counts @ table)
        areas.append(ranked.areas(counts[:, image_of_ranked]))
    ends = np.cumsum([part.shape[1] for part in parts.values()])[:-1]
    of = dict(zip(parts, np.split(np.concatenate(sums), ends, axis=1), strict=True))
    rows = of["at"].sum(axis=1)
    auc, average_precision = np.concatenate(areas, axis=1)
    return {
        "accuracy": _accuracy(of["at"]),
        "macro_f1": _macro_f1(of["at"]),
        "accuracy_at_half": _accuracy(of["half"]),
        "macro_f1_at_half": _macro_f1(of["half"]),
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
        Percentiles of the threshold picked on each draw; None for rows of one image.

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
    return percentiles(np.concatenate(picked), clustered, level)


class _Ranked:
    """Rows sorted once by score, for the two figures that only depend on their order."""

    def __init__(self, truth: npt.NDArray[np.int8], scores: FloatArray) -> None:
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


def _outcomes(truth: npt.NDArray[np.int8], called: npt.NDArray[np.bool_]) -> IntArray:
    """Return 0 tn, 1 fp, 2 fn, 3 tp of each row."""
    return 2 * truth.astype(np.int64) + called


def _accuracy(outcomes: FloatArray) -> FloatArray:
    """Return the accuracy of float64 (..., 4): tn, fp, fn, tp."""
    return (outcomes[..., 0] + outcomes[..., 3]) / outcomes.sum(axis=-1)


def _macro_f1(outcomes: FloatArray) -> FloatArray:
    """Return the macro-F1 of float64 (..., 4): tn, fp, fn, tp; see `binary_metrics`."""
    tn, fp, fn, tp = np.moveaxis(outcomes, -1, 0)
    positive = 2 * tp / np.maximum(2 * tp + fp + fn, 1)
    return (positive + 2 * tn / np.maximum(2 * tn + fp + fn, 1)) / 2
