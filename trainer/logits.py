"""From a run's logits to what rows are called: probabilities, labels, confidence.

Of two classes, label 1 (entailment) is the positive one. A row has one logit and is called
positive where its *probability* is at least the threshold; thresholds and logits never meet.

Of three, a row has a logit for each, in the order of their labels. Their softmax is the
probabilities; a row is called what has the largest, and there is no threshold.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.special import softmax

from featstore.data.labels import labels_of

Values = npt.ArrayLike
FloatArray = npt.NDArray[np.float64]


def sigmoid(logits: Values) -> FloatArray:
    """Return 1 / (1 + exp(-logits)) without overflow.

    Args:
        logits: Float of any shape.

    Returns:
        float64 of the same shape, in [0, 1].
    """
    values = np.asarray(logits, dtype=np.float64)
    small = np.exp(-np.abs(values))
    return np.where(values >= 0, 1.0, small) / (1.0 + small)


def probabilities_of(logits: Values) -> FloatArray:
    """Return the probability of entailment of each row; of three classes that of each class.

    Args:
        logits: Float of shape (rows,), or (rows, classes).

    Returns:
        float64 of the same shape: the sigmoid, or the softmax of each row.
    """
    values = np.asarray(logits, dtype=np.float64)
    return sigmoid(values) if values.ndim < 2 else np.asarray(softmax(values, axis=-1))


def predicted_labels(logits: Values, threshold: float | None) -> npt.NDArray[np.int8]:
    """Return what each row is called.

    Args:
        logits: Float of shape (rows,), or (rows, classes).
        threshold: On the probability of entailment; None of three classes, whose largest
            logit decides (of equals the first).

    Returns:
        int8 of shape (rows,): labels.
    """
    values = np.asarray(logits, dtype=np.float64)
    if values.ndim == 2:
        return values.argmax(axis=1).astype(np.int8)
    assert threshold is not None
    return np.asarray(sigmoid(values) >= threshold, np.int8)


def confidence_of(logits: Values, threshold: float | None) -> FloatArray:
    """Return the probability of what each row is called; see `predicted_labels`."""
    probabilities = probabilities_of(logits)
    if probabilities.ndim == 2:
        return np.asarray(probabilities.max(axis=1))
    assert threshold is not None
    return np.where(probabilities >= threshold, probabilities, 1 - probabilities)


def by_class(name: str, values: FloatArray) -> dict[str, FloatArray]:
    """Return the columns of a table that probabilities or logits are: `NAME_entailment` and so on.

    Args:
        name: What they are.
        values: float64 of shape (rows,), of entailment; or (rows, classes).
    """
    if values.ndim == 1:
        return {f"{name}_entailment": values}
    labels = labels_of(values.shape[1])
    return {f"{name}_{label}": values[:, number] for label, number in labels.items()}


def finite_rows(logits: Values) -> npt.NDArray[np.bool_]:
    """Return which rows have finite logits: bool of shape (rows,)."""
    finite = np.isfinite(np.asarray(logits))
    return finite if finite.ndim == 1 else np.asarray(finite.all(axis=1))
