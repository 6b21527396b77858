"""Calibration: a temperature for the logits, and the reliability curve."""

from __future__ import annotations

import numpy as np
from scipy.optimize import brentq

from trainer.logits import Values, probabilities_of
from trainer.metrics import (
    CALIBRATION_BINS,
    Labels,
    check_probabilities,
    check_rows,
    confidence_bins,
)

TEMPERATURES = (0.01, 100.0)


def fit_temperature(labels: Labels, logits: Values) -> float:
    """Return the temperature T that makes `logits / T` most likely on held-out rows.

    Temperature scaling of Guo et al. 2017 (arXiv:1706.04599, sec. 4.2), for one logit a row
    or one for each class: the loss is convex in 1/T, so its derivative has one root, which is
    found directly. Above 1: the run was too sure of itself. Predictions at 0.5, or of the
    largest logit, stay as they are.

    Args:
        labels: Of shape (rows,), of val, never of the rows that are measured.
        logits: Float of shape (rows,), or (rows, classes).

    Returns:
        T within `TEMPERATURES`: the lower end where the logits separate the classes, the
        upper where they say less than nothing.

    Raises:
        ValueError: As `bootstrap`.
    """
    truth, values = check_rows(labels, logits, "logits")
    wanted = truth if values.ndim == 1 else truth[:, None] == np.arange(values.shape[1])

    def slope(log_temperature: float) -> float:
        """Return the derivative of the mean loss by 1/T; of three classes a third of it."""
        gaps = probabilities_of(values / np.exp(log_temperature)) - wanted
        return float(np.mean(gaps * values))

    low, high = np.log(TEMPERATURES)
    # It falls as T grows.
    if slope(low) <= 0:
        return TEMPERATURES[0]
    if slope(high) >= 0:
        return TEMPERATURES[1]
    return float(np.exp(brentq(slope, low, high)))


def reliability(
    labels: Labels, probabilities: Values, bins: int = CALIBRATION_BINS
) -> list[dict[str, float | int]]:
    """Return the reliability curve behind `calibration_error`: the bins that have rows.

    Args:
        labels: Of shape (rows,): 0 or 1, or below the number of classes.
        probabilities: Float of shape (rows,), in [0, 1]: of label 1; or (rows, classes).
        bins: Number of bins of confidence over (0, 1]; two classes use the upper half, three
            the upper two thirds.

    Returns:
        For each bin `low` (open), `high` (closed), `rows`, and means over its rows:
        `confidence` in the class given (at 0.5, or the most probable), `accuracy`. The mean
        of |accuracy - confidence| weighted by rows is `calibration_error`.

    Raises:
        ValueError: As `calibration_error`.
    """
    truth, values = check_probabilities(labels, probabilities)
    at, confidence, correct = confidence_bins(truth, values, bins)
    rows = np.bincount(at, minlength=bins)
    confident = np.bincount(at, weights=confidence, minlength=bins)
    right = np.bincount(at, weights=correct, minlength=bins)
    return [
        {
            "low": i / bins,
            "high": (i + 1) / bins,
            "rows": int(rows[i]),
            "confidence": float(confident[i] / rows[i]),
            "accuracy": float(right[i] / rows[i]),
        }
        for i in np.flatnonzero(rows).tolist()
    ]
