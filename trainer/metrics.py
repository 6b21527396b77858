"""Figures of a classifier: NumPy and scikit-learn, plain Python numbers out.

Label 1 (entailment) is the positive one of two. What a row is called says `trainer.logits`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import logsumexp
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from featstore.data.examples import class_counts
from featstore.data.labels import LABELS, labels_of
from trainer.logits import FloatArray, Values, predicted_labels, probabilities_of

Labels = npt.ArrayLike
IntArray = npt.NDArray[np.int64]

GRID: FloatArray = np.arange(5, 96) / 100
"""Thresholds tried by `sweep_threshold`: 0.05 to 0.95 in steps of 0.01, 0.5 among them."""

CALIBRATION_BINS = 15


def log_loss(labels: Labels, logits: Values) -> float:
    """Return the mean cross-entropy, in nats a row, taken from logits.

    `max(z, 0) - z·y + log(1 + exp(-|z|))`, or of three classes `logsumexp(z) - z_y`: finite
    for every finite logit.

    Args:
        labels: Of shape (rows,): 0 or 1, or below the number of classes.
        logits: Float of shape (rows,), or (rows, classes).

    Raises:
        ValueError: No rows, shapes differ, a label of no class, or a logit that is not
            finite.
    """
    truth, values = check_rows(labels, logits, "logits")
    return float(row_losses(truth, values).mean())


def row_losses(truth: npt.NDArray[np.int8], logits: FloatArray) -> FloatArray:
    """Return the cross-entropy of each row, in nats; see `log_loss`."""
    if logits.ndim == 2:
        return np.asarray(logsumexp(logits, axis=1) - logits[np.arange(len(truth)), truth])
    return np.maximum(logits, 0) - logits * truth + np.log1p(np.exp(-np.abs(logits)))


def auc(labels: Labels, scores: Values) -> float | None:
    """Return the area under the ROC curve, or None where a class is not present.

    Of three classes it is the mean over them of the area of each against the rest.

    Args:
        labels: Of shape (rows,): 0 or 1, or below the number of classes.
        scores: Float of shape (rows,): probabilities or logits, only their order counts; or
            probabilities of shape (rows, classes).

    Raises:
        ValueError: As `log_loss`.
    """
    return _of_order(roc_auc_score, labels, scores)


def average_precision(labels: Labels, scores: Values) -> float | None:
    """Return the average precision of entailment, or None where a class is not present.

    Of three classes it is the mean over them of that of each against the rest.

    Args:
        labels, scores: As of `auc`.

    Raises:
        ValueError: As `log_loss`.
    """
    return _of_order(average_precision_score, labels, scores)


def _of_order(figure: Callable[..., float], labels: Labels, scores: Values) -> float | None:
    truth, values = check_rows(labels, scores, "scores")
    if values.ndim == 2:
        each = [_of_order(figure, truth == i, values[:, i]) for i in range(values.shape[1])]
        known = [value for value in each if value is not None]
        return float(np.mean(known)) if len(known) == len(each) else None
    return None if truth.min() == truth.max() else float(figure(truth, values))


def brier(labels: Labels, probabilities: Values) -> float:
    """Return the Brier score: the mean of (probability - label)², in [0, 1].

    Of three classes it is half the sum over them of (probability - whether it is that
    class)², which of two is the same.

    Args:
        labels: Of shape (rows,): 0 or 1, or below the number of classes.
        probabilities: Float of shape (rows,), in [0, 1]: of label 1; or (rows, classes).

    Raises:
        ValueError: As `binary_metrics`.
    """
    truth, values = check_probabilities(labels, probabilities)
    if values.ndim == 2:
        return float(brier_rows(truth, values).mean())
    return float(brier_score_loss(truth, values, pos_label=1))


def brier_rows(truth: npt.NDArray[np.int8], probabilities: FloatArray) -> FloatArray:
    """Return what each row adds to the mean of `brier`."""
    if probabilities.ndim == 1:
        return (probabilities - truth) ** 2
    whether = truth[:, None] == np.arange(probabilities.shape[1])
    return np.asarray(((probabilities - whether) ** 2).sum(axis=1) / 2)


def binary_metrics(labels: Labels, probabilities: Values, threshold: float) -> dict[str, Any]:
    """Count the four outcomes at a threshold, and what follows from them.

    Args:
        labels: 0 or 1 of shape (rows,).
        probabilities: Float of shape (rows,), in [0, 1].
        threshold: In [0, 1]; a row at it is called positive.

    Returns:
        `rows`, `tn`, `fp`, `fn`, `tp`, `accuracy`, `macro_f1` (the mean of the two F1),
        and for each class by name `precision`, `recall`, `f1`, `rows`. A ratio whose
        denominator is 0 is 0.

    Raises:
        ValueError: As `log_loss`; or a probability or the threshold is outside [0, 1].
    """
    truth, values = _check_binary(labels, probabilities)
    _check_threshold(threshold)
    called = values >= threshold
    positive = truth == 1
    tp, fp = int(np.sum(called & positive)), int(np.sum(called & ~positive))
    fn, tn = int(np.sum(~called & positive)), int(np.sum(~called & ~positive))
    classes = {
        LABELS["contradiction"]: _class_metrics(tn, fn, fp),
        LABELS["entailment"]: _class_metrics(tp, fp, fn),
    }
    return {
        "rows": len(truth),
        "tn": tn,
        "fp": fp,
        "fn": fn,
        "tp": tp,
        "accuracy": (tp + tn) / len(truth),
        "macro_f1": sum(figures["f1"] for figures in classes.values()) / 2,
        **{name: classes[label] for name, label in LABELS.items()},
    }


def class_metrics(labels: Labels, predicted: Labels, classes: int) -> dict[str, Any]:
    """Count what rows of each class are called, and what follows from it.

    Args:
        labels: Of shape (rows,), below `classes`.
        predicted: The same: what each row is called.
        classes: 2 or 3.

    Returns:
        `rows`, `accuracy`, `macro_f1` (the mean of the classes' F1), `confusion` (truth to
        what it is called to rows, by name), and for each class by name `precision`,
        `recall`, `f1`, `rows`. A ratio whose denominator is 0 is 0.
    """
    cells = np.asarray(labels, np.int64) * classes + np.asarray(predicted)
    matrix = np.bincount(cells, minlength=classes**2).reshape(classes, classes)
    names = list(labels_of(classes))
    hits, called, rows = matrix.diagonal(), matrix.sum(axis=0), matrix.sum(axis=1)
    each = {
        name: _class_metrics(int(hits[i]), int(called[i] - hits[i]), int(rows[i] - hits[i]))
        for i, name in enumerate(names)
    }
    return {
        "rows": len(cells),
        "accuracy": int(hits.sum()) / len(cells),
        "macro_f1": sum(figures["f1"] for figures in each.values()) / classes,
        "confusion": {
            name: dict(zip(names, line.tolist(), strict=True))
            for name, line in zip(names, matrix, strict=True)
        },
        **each,
    }


def sweep_threshold(
    labels: Labels, probabilities: Values, grid: Values = GRID
) -> tuple[float, float]:
    """Find the threshold of the best macro-F1.

    A fixed grid rather than every distinct probability: the best of thousands of cuts
    would be fitted to these rows' noise. Of equals, the one nearest to 0.5 wins, and then
    the lower.

    Args:
        labels: 0 or 1 of shape (rows,).
        probabilities: Float of shape (rows,), in [0, 1]; not logits.
        grid: Thresholds to try, in [0, 1].

    Returns:
        The threshold and its macro-F1.

    Raises:
        ValueError: As `binary_metrics`, or an empty grid.

    Cost: O(rows · log rows + grid · log rows).
    """
    truth, values = _check_binary(labels, probabilities)
    thresholds = np.asarray(grid, dtype=np.float64)
    if thresholds.ndim != 1 or len(thresholds) == 0:
        raise ValueError(f"grid: expected shape (n,), found {thresholds.shape}")
    _check_threshold(float(thresholds.min()))
    _check_threshold(float(thresholds.max()))
    order = np.argsort(values)
    below = np.searchsorted(values[order], thresholds, side="left")
    positives_below = np.concatenate(([0], np.cumsum(truth[order])))[below]
    fn = positives_below
    tn = below - positives_below
    tp = int(truth.sum()) - fn
    fp = len(truth) - below - tp
    f1_positive = 2 * tp / np.maximum(2 * tp + fp + fn, 1)
    f1_negative = 2 * tn / np.maximum(2 * tn + fp + fn, 1)
    macro_f1 = (f1_positive + f1_negative) / 2
    return float(best_thresholds(macro_f1, thresholds)), float(macro_f1.max())


def best_thresholds(macro_f1: FloatArray, thresholds: FloatArray) -> FloatArray:
    """Return the threshold of the best macro-F1; of equals as `sweep_threshold` says.

    Args:
        macro_f1: float64 of shape (..., thresholds).
        thresholds: float64 of shape (thresholds,).

    Returns:
        float64 of shape (...).
    """
    preferred = np.lexsort((thresholds, np.round(np.abs(thresholds - 0.5), 12)))
    # Rounded, so that two ways to the same fraction tie; the first of equals is taken.
    return thresholds[preferred[np.round(macro_f1[..., preferred], 12).argmax(axis=-1)]]


def calibration_error(labels: Labels, probabilities: Values, bins: int = CALIBRATION_BINS) -> float:
    """Return the expected calibration error of Guo et al. 2017 (arXiv:1706.04599, eq. 3).

    The confidence of a row is the probability of the class it is given at 0.5, or of three
    classes the largest. Rows are put into bins of equal width by confidence, each open below
    and closed above; the result is the mean of |accuracy - mean confidence| over bins,
    weighted by their rows.

    Args:
        labels: Of shape (rows,): 0 or 1, or below the number of classes.
        probabilities: Float of shape (rows,), in [0, 1]: of label 1; or (rows, classes).
        bins: Number of bins over (0, 1].

    Raises:
        ValueError: As `binary_metrics`.
    """
    truth, values = check_probabilities(labels, probabilities)
    at, confidence, correct = confidence_bins(truth, values, bins)
    gap = np.bincount(at, weights=correct - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(truth))


def confidence_bins(
    truth: npt.NDArray[np.int8], probabilities: FloatArray, bins: int = CALIBRATION_BINS
) -> tuple[IntArray, FloatArray, npt.NDArray[np.bool_]]:
    """Put rows into the bins of `calibration_error`.

    Args:
        truth: Labels of shape (rows,).
        probabilities: float64 of shape (rows,), in [0, 1]: of label 1; or (rows, classes).
        bins: Number of bins over (0, 1].

    Returns:
        Each row's bin, its confidence, and whether the class that it is given (at 0.5, or the
        most probable) is right: of shape (rows,).
    """
    if probabilities.ndim == 2:
        confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
    else:
        called = probabilities >= 0.5
        confidence, right = np.where(called, probabilities, 1 - probabilities), called == truth
    at = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    return at, confidence, right


def evaluate_logits(
    labels: Labels, logits: Values, threshold: float | None = None
) -> dict[str, Any]:
    """Compute every figure of a set of rows from its logits.

    Args:
        labels: Of shape (rows,): 0 or 1, or below the number of classes.
        logits: Float of shape (rows,), or (rows, classes).
        threshold: On the probability; None finds it on these very rows with
            `sweep_threshold` (for the val split: a test split is given val's). Three classes
            have none.

    Returns:
        `rows`, `entailment`, `contradiction`, of three classes `neutral` (rows of each),
        `loss` (nats a row), `auc` and `average_precision` (None where a class is not
        there), `brier`, `calibration_error`, `threshold`, and `at_threshold` and `at_half`,
        each as of `binary_metrics`. Of three classes these last three are None, and
        `at_argmax` is as of `class_metrics`. Plain Python numbers throughout.

    Raises:
        ValueError: As `log_loss`; or the threshold is outside [0, 1].
    """
    truth, values = check_rows(labels, logits, "logits")
    probabilities = probabilities_of(values)
    classes = 2 if values.ndim == 1 else values.shape[1]
    # Probabilities that are one in float64 would be ties, which logits are not.
    scores = values if values.ndim == 1 else probabilities
    found: dict[str, Any] = {
        "rows": len(truth),
        **class_counts(truth, classes),
        "loss": log_loss(truth, values),
        "auc": auc(truth, scores),
        "average_precision": average_precision(truth, scores),
        "brier": brier(truth, probabilities),
        "calibration_error": calibration_error(truth, probabilities),
    }
    if values.ndim == 2:
        at_argmax = class_metrics(truth, predicted_labels(values, None), classes)
        absent = dict.fromkeys(("threshold", "at_threshold", "at_half"))
        return {**found, **absent, "at_argmax": at_argmax}
    if threshold is None:
        threshold, _ = sweep_threshold(truth, probabilities)
    return {
        **found,
        "threshold": float(threshold),
        "at_threshold": binary_metrics(truth, probabilities, threshold),
        "at_half": binary_metrics(truth, probabilities, 0.5),
    }


def confusion_matrix(at: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Return truth to what its rows are called to how many, entailment first.

    Args:
        at: Figures of two classes at a threshold, or of three; see `decided`.
    """
    found: dict[str, dict[str, int]] | None = at.get("confusion")
    return found or {
        "entailment": {"entailment": at["tp"], "contradiction": at["fn"]},
        "contradiction": {"entailment": at["fp"], "contradiction": at["tn"]},
    }


def decided(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of what a run calls its rows: at its threshold, or of three classes.

    Args:
        metrics: Of `evaluate_logits`, such as a run's `metrics.json`.
    """
    found: dict[str, Any] = metrics["at_threshold"] or metrics["at_argmax"]
    return found


def threshold_of(metrics: Mapping[str, Any]) -> float | None:
    """Return a run's τ; None of three classes, which have none."""
    threshold = metrics["threshold"]
    return None if threshold is None else float(threshold)


def validation_figures(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Return what an epoch is judged by, under the names of `trainer.config.MONITORS`.

    Args:
        metrics: Of `evaluate_logits` on the val split.

    Returns:
        Loss in nats a row; shares in [0, 1], precision, recall and F1 of entailment at τ (of
        three classes, of what rows are called); None where a figure is not defined.
    """
    at, half = decided(metrics), metrics["at_half"] or {}
    return {
        "val_loss": metrics["loss"],
        "val_accuracy": at["accuracy"],
        "val_macro_f1": at["macro_f1"],
        "val_accuracy_at_half": half.get("accuracy"),
        "val_macro_f1_at_half": half.get("macro_f1"),
        "val_auc": metrics["auc"],
        "val_average_precision": metrics["average_precision"],
        "val_f1": at["entailment"]["f1"],
        "val_precision": at["entailment"]["precision"],
        "val_recall": at["entailment"]["recall"],
        "val_brier": metrics["brier"],
        "val_calibration_error": metrics["calibration_error"],
    }


def _class_metrics(hit: int, false_alarm: int, miss: int) -> dict[str, float | int]:
    return {
        "precision": hit / max(hit + false_alarm, 1),
        "recall": hit / max(hit + miss, 1),
        "f1": 2 * hit / max(2 * hit + false_alarm + miss, 1),
        "rows": hit + miss,
    }


def check_rows(
    labels: Labels, values: Values, name: str
) -> tuple[npt.NDArray[np.int8], FloatArray]:
    """Return labels as int8 (rows,), values as float64 (rows,) or (rows, classes)."""
    truth, numbers = np.asarray(labels), np.asarray(values, dtype=np.float64)
    if truth.ndim != 1 or truth.shape != numbers.shape[:1] or numbers.ndim > 2:
        raise ValueError(
            f"expected labels and {name} of one shape (rows,), found {truth.shape} and"
            f" {numbers.shape}"
        )
    if len(truth) == 0:
        raise ValueError("no rows to measure")
    classes = 2 if numbers.ndim == 1 else numbers.shape[1]
    if not np.isin(truth, range(classes)).all():
        known = "0 and 1" if classes == 2 else f"0 to {classes - 1}"
        raise ValueError(f"expected labels {known}, found {np.unique(truth)[:5].tolist()}")
    if not np.isfinite(numbers).all():
        raise ValueError(f"{np.sum(~np.isfinite(numbers))} of {len(truth)} {name} are not finite")
    return truth.astype(np.int8), numbers


def check_probabilities(
    labels: Labels, probabilities: Values
) -> tuple[npt.NDArray[np.int8], FloatArray]:
    truth, values = check_rows(labels, probabilities, "probabilities")
    if values.min() < 0 or values.max() > 1:
        raise ValueError(
            f"expected probabilities in [0, 1], found {values.min():g} to {values.max():g};"
            " are these logits?"
        )
    return truth, values


def _check_binary(labels: Labels, probabilities: Values) -> tuple[npt.NDArray[np.int8], FloatArray]:
    truth, values = check_probabilities(labels, probabilities)
    if values.ndim != 1:
        raise ValueError(f"expected one probability a row, found {values.shape}")
    return truth, values


def _check_threshold(threshold: float) -> None:
    if not 0 <= threshold <= 1:
        raise ValueError(f"expected a threshold in [0, 1], found {threshold:g}")
