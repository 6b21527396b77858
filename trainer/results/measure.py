"""What is measured of scored rows: figures with intervals, calibration, buckets, errors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.data.labels import LABEL_NAMES, LABELS
from trainer.buckets import bucket_rows
from trainer.logits import by_class, confidence_of, predicted_labels, probabilities_of, sigmoid
from trainer.metrics import (
    GRID,
    binary_metrics,
    brier,
    calibration_error,
    evaluate_logits,
    log_loss,
)
from trainer.results.labelled import Scored
from trainer.statistics import (
    LEVEL,
    Clustered,
    fit_temperature,
    intervals,
    proportion_interval,
    reliability,
    threshold_interval,
)

CONFIDENT = 0.7
"""Above it an error is a confident one, as in the study's error page."""
NAMED_ERRORS = 10


def right(scored: Scored, threshold: float | None) -> NDArray[np.bool_]:
    """Return whether each row is called what it is."""
    return predicted_labels(scored.logits, threshold) == scored.labels


def measure(
    scored: Scored,
    threshold: float | None,
    val: Scored | None,
    buckets: Mapping[str, re.Pattern[str]],
    clustered: Clustered,
) -> dict[str, Any]:
    """Compute what `evaluate` reports of a run on some rows, controls apart.

    Args:
        scored: The rows.
        threshold: The run's τ, on the probability; None of three classes.
        val: The val split, from which temperature and the interval of τ come; None where
            it cannot be read.
        buckets: See `trainer.buckets.load_buckets`.
        clustered: The rows' images.

    Returns:
        The fields of docs/EVALUATION.md from `rows` to `errors`.
    """
    tau = sweep = None
    if val is not None and threshold is not None:
        images = Clustered(val.image_ids, clustered.draws, clustered.seed)
        tau = threshold_interval(val.labels, val.logits, images)
        sweep = threshold_sweep(val)
    return {
        **evaluate_logits(scored.labels, scored.logits, threshold),
        "images": clustered.images,
        "bootstrap": {"level": LEVEL, "draws": clustered.draws, "seed": clustered.seed},
        "intervals": intervals(scored.labels, scored.logits, threshold, clustered),
        "threshold_interval": tau,
        "threshold_sweep": sweep,
        "calibration": _calibration(scored, threshold, val),
        **_by_bucket(scored, threshold, buckets, clustered),
        "errors": _errors(scored, threshold),
    }


def threshold_sweep(val: Scored) -> dict[str, list[float]]:
    """Return what each threshold that was tried gives on val.

    Returns:
        `threshold`, and at each `macro_f1` and `accuracy`, to six digits.
    """
    probabilities = probabilities_of(val.logits)
    found = [binary_metrics(val.labels, probabilities, threshold) for threshold in GRID.tolist()]
    return {
        "threshold": GRID.tolist(),
        **{name: [round(at[name], 6) for at in found] for name in ("macro_f1", "accuracy")},
    }


def _calibration(scored: Scored, threshold: float | None, val: Scored | None) -> dict[str, Any]:
    found: dict[str, Any] = {"temperature": None, "before": _calibrated(scored, 1.0)}
    found["reliability"] = reliability(scored.labels, probabilities_of(scored.logits))
    if val is None:
        return found
    temperature = fit_temperature(val.labels, val.logits)
    return {
        **found,
        "temperature": temperature,
        "fitted_on": "val",
        "fitted_rows": len(val),
        # The same rows are called entailment at it.
        "threshold_after": None if threshold is None else _tempered(threshold, temperature),
        "after": _calibrated(scored, temperature),
        "reliability_after": reliability(
            scored.labels, probabilities_of(scored.logits / temperature)
        ),
    }


def _calibrated(scored: Scored, temperature: float) -> dict[str, float]:
    logits = scored.logits / temperature
    probabilities = probabilities_of(logits)
    return {
        "calibration_error": calibration_error(scored.labels, probabilities),
        "brier": brier(scored.labels, probabilities),
        "loss": log_loss(scored.labels, logits),
    }


def _tempered(threshold: float, temperature: float) -> float:
    if not 0 < threshold < 1:
        return threshold
    return float(sigmoid(math.log(threshold / (1 - threshold)) / temperature))


def _by_bucket(
    scored: Scored,
    threshold: float | None,
    buckets: Mapping[str, re.Pattern[str]],
    clustered: Clustered,
) -> dict[str, Any]:
    correct = right(scored, threshold)
    members = bucket_rows(buckets, scored.hypotheses)
    rest = ~np.any(list(members.values()), axis=0)

    def figures(rows: NDArray[np.bool_]) -> dict[str, Any]:
        found: dict[str, Any] = {"rows": int(rows.sum()), "share": float(rows.mean())}
        if not rows.any():
            return {**found, "images": 0, "entailment": None, "accuracy": None, "interval": None}
        images = Clustered(scored.image_ids[rows], clustered.draws, clustered.seed)
        interval = proportion_interval(correct[rows], images)
        return {
            **found,
            "images": interval.pop("images"),
            "entailment": float((scored.labels[rows] == LABELS["entailment"]).mean()),
            "accuracy": float(correct[rows].mean()),
            "interval": interval,
        }

    return {
        "buckets": {name: figures(rows) for name, rows in members.items()},
        "in_no_bucket": figures(rest),
    }


def _errors(scored: Scored, threshold: float | None) -> dict[str, Any]:
    wrong = np.flatnonzero(~right(scored, threshold))
    called = predicted_labels(scored.logits, threshold)
    sure = confidence_of(scored.logits, threshold)
    probabilities = by_class("probability", probabilities_of(scored.logits))
    above = int((sure[wrong] > CONFIDENT).sum())
    worst = wrong[np.argsort(-sure[wrong], kind="stable")][:NAMED_ERRORS]
    return {
        "rows": len(wrong),
        "confident": CONFIDENT,
        "rows_above": above,
        "share_above": above / len(wrong) if len(wrong) else None,
        "most_confident": [
            {
                "Image_ID": scored.image_ids[row],
                "Hypothesis": scored.hypotheses[row],
                "Label": LABEL_NAMES[int(scored.labels[row])],
                "predicted": LABEL_NAMES[int(called[row])],
                **{name: float(values[row]) for name, values in probabilities.items()},
                "confidence": float(sure[row]),
            }
            for row in worst.tolist()
        ],
    }
