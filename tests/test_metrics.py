"""Metrics against scikit-learn, brute force and figures worked out by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from trainer.logits import confidence_of, predicted_labels, probabilities_of, sigmoid
from trainer.metrics import (
    GRID,
    auc,
    binary_metrics,
    calibration_error,
    decided,
    evaluate_logits,
    log_loss,
    sweep_threshold,
)

logits = st.floats(-30, 30, width=32)
pairs = st.lists(st.tuples(st.integers(0, 1), logits), min_size=1, max_size=40)


def columns(rows: list[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([y for y, _ in rows], np.int8), np.array([z for _, z in rows], np.float32)


@given(pairs, st.sampled_from([0.0, 0.05, 0.5, 0.55, 1.0]))
def test_binary_metrics_agree_with_scikit_learn(
    rows: list[tuple[int, float]], threshold: float
) -> None:
    y, z = columns(rows)
    p = sigmoid(z)
    found = binary_metrics(y, p, threshold)
    called = (p >= threshold).astype(int)
    matrix = sk.confusion_matrix(y, called, labels=[0, 1])
    assert [found["tn"], found["fp"], found["fn"], found["tp"]] == matrix.ravel().tolist()
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(y, called))
    each = sk.precision_recall_fscore_support(y, called, labels=[0, 1], zero_division=0)
    for label, name in enumerate(("contradiction", "entailment")):
        figures = [found[name][key] for key in ("precision", "recall", "f1", "rows")]
        assert figures == pytest.approx([column[label] for column in each])
    assert found["macro_f1"] == pytest.approx(each[2].mean())


def test_binary_metrics_by_hand() -> None:
    found = binary_metrics([1, 1, 1, 0, 0], [0.9, 0.6, 0.2, 0.6, 0.1], 0.6)
    assert (found["tp"], found["fn"], found["fp"], found["tn"]) == (2, 1, 1, 1)
    assert found["rows"] == 5
    assert found["entailment"] == {"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "rows": 3}
    assert found["contradiction"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "rows": 2}
    assert found["macro_f1"] == pytest.approx(7 / 12)


@given(pairs)
def test_sweep_is_the_best_of_the_grid_nearest_to_half(rows: list[tuple[int, float]]) -> None:
    y, z = columns(rows)
    p = sigmoid(z / 8)
    tau, best = sweep_threshold(y, p)
    scores = {float(t): binary_metrics(y, p, t)["macro_f1"] for t in GRID}
    assert best == pytest.approx(max(scores.values()), abs=1e-12)
    assert scores[tau] == pytest.approx(best, abs=1e-12)
    nearer = [t for t in scores if abs(t - 0.5) < abs(tau - 0.5) - 1e-9]
    assert all(scores[t] < best - 1e-12 for t in nearer)


def test_sweep_breaks_ties() -> None:
    assert sweep_threshold([0, 1], [0.1, 0.9]) == (0.5, 1.0)
    assert sweep_threshold([0, 1], [0.1, 0.3])[0] == pytest.approx(0.3)
    assert sweep_threshold([0, 1], [0.7, 0.9])[0] == pytest.approx(0.71)
    assert sweep_threshold([1, 0], [0.5, 0.5], grid=[0.45, 0.55])[0] == 0.45
    assert sweep_threshold([0, 0], [0.2, 0.3]) == (0.5, 0.5)


def test_sweep_on_float32_agrees_with_what_is_applied() -> None:
    p = np.float32([0.7, 0.1])  # in float32, 0.7 is a little below 0.7
    tau, best = sweep_threshold([1, 0], p, grid=[0.7])
    assert binary_metrics([1, 0], p, tau)["macro_f1"] == best


def test_grid() -> None:
    assert len(GRID) == 91
    assert GRID[0] == 0.05
    assert GRID[-1] == 0.95
    assert 0.5 in GRID


@pytest.mark.parametrize(
    "function", [sweep_threshold, calibration_error, lambda y, p: binary_metrics(y, p, 0.5)]
)
@pytest.mark.parametrize("value", [-0.01, 1.01, 3.2])
def test_logits_are_no_probabilities(function: Callable[..., Any], value: float) -> None:
    with pytest.raises(ValueError, match="are these logits"):
        function([0, 1], [0.5, value])


@pytest.mark.parametrize(
    ("labels", "values", "message"),
    [
        ([], [], "no rows"),
        ([0, 1], [0.5], "one shape"),
        ([[0]], [[0.5]], "one shape"),
        ([0, 2], [0.5, 0.5], r"labels 0 and 1, found \[0, 2\]"),
        ([0, -1], [0.5, 0.5], "labels 0 and 1"),
        ([0, 1], [0.5, math.nan], "1 of 2 .* not finite"),
        ([0, 1], [0.5, math.inf], "1 of 2 .* not finite"),
    ],
)
@pytest.mark.parametrize(
    "function", [sweep_threshold, calibration_error, log_loss, auc, evaluate_logits]
)
def test_what_cannot_be_measured(
    function: Callable[..., Any], labels: Any, values: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        function(labels, values)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, math.nan])
def test_threshold_outside(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold in"):
        binary_metrics([0, 1], [0.1, 0.9], threshold)
    with pytest.raises(ValueError, match="threshold in"):
        evaluate_logits([0, 1], [0.1, 0.9], threshold)
    with pytest.raises(ValueError, match="threshold in"):
        sweep_threshold([0, 1], [0.1, 0.9], grid=[0.5, threshold])
    with pytest.raises(ValueError, match="grid"):
        sweep_threshold([0, 1], [0.1, 0.9], grid=[])


def test_sigmoid_is_stable() -> None:
    with np.errstate(over="raise", invalid="raise"):
        found = sigmoid([-1e4, -1.0, 0.0, 1.0, 1e4])
    assert found.tolist() == pytest.approx([0, 1 / (1 + math.e), 0.5, math.e / (1 + math.e), 1])
    assert found.dtype == np.float64


@given(pairs)
def test_log_loss_agrees_with_scikit_learn(rows: list[tuple[int, float]]) -> None:
    y, z = columns(rows)
    expected = sk.log_loss(y, sigmoid(z), labels=[0, 1])
    assert log_loss(y, z) == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_log_loss_of_extreme_logits() -> None:
    assert log_loss([0, 1], [1e5, -1e5]) == 1e5
    assert log_loss([1, 0], [1e5, -1e5]) == 0
    assert log_loss([1], [0.0]) == pytest.approx(math.log(2))


@given(pairs)
def test_auc_is_the_share_of_ordered_pairs(rows: list[tuple[int, float]]) -> None:
    y, z = columns(rows)
    wins = [(a > b) + 0.5 * (a == b) for a in z[y == 1] for b in z[y == 0]]
    if wins:
        assert auc(y, z) == pytest.approx(sum(wins) / len(wins))
    else:
        assert auc(y, z) is None


def test_calibration_error_by_hand() -> None:
    assert calibration_error([1, 0], [1.0, 0.0]) == 0
    assert calibration_error([0, 1], [1.0, 0.0]) == 1
    # Confidence 0.8 four times, three of them right; in one bin.
    assert calibration_error([1, 1, 0, 1], [0.8, 0.8, 0.2, 0.2]) == pytest.approx(0.05)
    # Two bins with gaps of opposite sign do not cancel out.
    assert calibration_error([1, 0], [0.7, 0.9]) == pytest.approx((0.3 + 0.9) / 2)
    # 0.6 = 9/15 closes its bin; 0.61 opens the next.
    assert calibration_error([1, 0], [0.6, 0.61]) == pytest.approx((0.4 + 0.61) / 2)
    assert calibration_error([1, 0], [0.6, 0.59]) == pytest.approx(0.19 / 2)


@given(pairs)
def test_calibration_error_by_bins(rows: list[tuple[int, float]]) -> None:
    y, z = columns(rows)
    p = sigmoid(z)
    confidence, correct = np.maximum(p, 1 - p), (p >= 0.5) == (y == 1)
    total = 0.0
    for m in range(1, 16):
        inside = np.ceil(confidence * 15) == m
        if inside.any():
            total += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert calibration_error(y, p) == pytest.approx(total, abs=1e-12)


def plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(type(key) is str and plain(item) for key, item in value.items())
    return value is None or type(value) in (int, float)


@given(pairs)
def test_evaluate_logits(rows: list[tuple[int, float]]) -> None:
    y, z = columns(rows)
    found = evaluate_logits(y, z)
    assert plain(found)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["rows"] == len(y) == found["entailment"] + found["contradiction"]
    assert found["entailment"] == int(y.sum())
    assert found["at_half"] == binary_metrics(y, sigmoid(z), 0.5)
    assert found["threshold"] == sweep_threshold(y, sigmoid(z))[0]
    assert found["at_threshold"]["macro_f1"] >= found["at_half"]["macro_f1"]
    assert found["auc"] == auc(y, z)
    assert found["loss"] == log_loss(y, z)


rows_of_three = st.lists(
    st.tuples(st.integers(0, 2), st.tuples(logits, logits, logits)), min_size=1, max_size=40
)


@given(rows_of_three)
def test_evaluate_logits_of_three_classes(rows: list[tuple[int, tuple[float, ...]]]) -> None:
    y = np.array([label for label, _ in rows], np.int8)
    z = np.array([values for _, values in rows], np.float32) / 4
    found = evaluate_logits(y, z)
    assert plain({**found, "at_argmax": None})
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert [found[name] for name in ("contradiction", "entailment", "neutral")] == [
        int((y == label).sum()) for label in range(3)
    ]
    shares = probabilities_of(z)
    called = z.argmax(axis=1)
    assert predicted_labels(z, None).tolist() == called.tolist()
    assert confidence_of(z, None) == pytest.approx(shares.max(axis=1))
    assert found["loss"] == pytest.approx(sk.log_loss(y, shares, labels=[0, 1, 2]), abs=1e-6)
    at = found["at_argmax"]
    assert at["accuracy"] == pytest.approx(sk.accuracy_score(y, called))
    matrix = sk.confusion_matrix(y, called, labels=[0, 1, 2])
    assert [list(line.values()) for line in at["confusion"].values()] == matrix.tolist()
    each = sk.precision_recall_fscore_support(y, called, labels=[0, 1, 2], zero_division=0)
    assert at["macro_f1"] == pytest.approx(each[2].mean())
    one_hot = np.eye(3)[y]
    assert found["brier"] == pytest.approx(((shares - one_hot) ** 2).sum(axis=1).mean() / 2)
    if len(set(y.tolist())) < 3:
        assert found["auc"] is found["average_precision"] is None
    else:
        area = sk.roc_auc_score(y, shares, multi_class="ovr")
        assert found["auc"] == pytest.approx(area)
        precision = sk.average_precision_score(one_hot, shares, average="macro")
        assert found["average_precision"] == pytest.approx(precision)


def test_three_classes_have_no_threshold() -> None:
    found = evaluate_logits([0, 1, 2, 2], [[9, 0, 0], [0, 9, 0], [0, 0, 9], [0, 9, 0]])
    assert found["threshold"] is found["at_threshold"] is found["at_half"] is None
    assert decided(found) is found["at_argmax"]
    assert found["at_argmax"]["neutral"] == {
        "precision": 1.0,
        "recall": 0.5,
        "f1": pytest.approx(2 / 3),
        "rows": 2,
    }
    with pytest.raises(ValueError, match="one probability a row"):
        binary_metrics([0, 1], [[0.2, 0.8], [0.4, 0.6]], 0.5)
    with pytest.raises(ValueError, match="labels 0 to 2"):
        evaluate_logits([0, 3], [[0, 0, 1], [0, 1, 0]])
    with pytest.raises(ValueError, match="not finite"):
        evaluate_logits([0, 1], [[0, 0, np.nan], [0, 1, 0]])


def test_a_given_threshold_is_applied_to_probabilities() -> None:
    """0.55 lies between logits 0.1 (p = 0.525) and 0.3 (p = 0.574)."""
    found = evaluate_logits(np.array([0, 1]), np.array([0.1, 0.3]), threshold=0.55)
    assert found["threshold"] == 0.55
    assert found["at_threshold"]["accuracy"] == 1
    assert found["at_half"]["accuracy"] == 0.5
