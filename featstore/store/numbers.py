"""int8 features: each token in 127 steps on either side of zero, and the size of its step.

Symmetric, one scale a token: `scale = max|x| / 127` and `q = round(x / scale)`,
so that `q · scale` is within half a scale of `x`. A token's numbers have one
order of magnitude (the encoder's last normalisation makes them so), tokens of
one image have not.

Scales are float32. That costs 4 bytes beside a token's hundreds, and rounds
nothing: a float16 scale would move every number of a token together, by up to
a sixteenth of a step, and would overflow or vanish where float32 encoders do
not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

SCALE_DTYPE = np.dtype(np.float32)
LEVELS = 127


def quantise(values: NDArray[Any]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round tokens to int8.

    Args:
        values: Float of shape (..., width), at most float32.

    Returns:
        int8 of shape (..., width), from -127 to 127, and float32 scales of
        shape (...,). A token of zeros has scale 0. The scale of a token that
        is not finite is not finite either.
    """
    values = values.astype(np.float32, copy=False)
    peaks = np.abs(values).max(axis=-1)
    finite = np.isfinite(peaks)
    # A subnormal scale would have few digits, and compiled graphs take it for zero.
    smallest = np.finfo(np.float32).smallest_normal
    scales = np.where(peaks > 0, np.maximum(peaks / np.float32(LEVELS), smallest), np.float32(0))
    # In float64: a quotient rounded to float32 could be half a step off and a little more.
    steps = np.where(finite & (peaks > 0), scales, 1).astype(np.float64)[..., None]
    levels = np.rint(np.where(finite[..., None], values, 0) / steps)
    return levels.astype(np.int8), np.where(finite, scales, peaks)


def dequantise(features: NDArray[np.int8], scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the numbers that stored levels stand for, as the trainer's graph widens them.

    Args:
        features: int8 of shape (..., width).
        scales: float32 of shape (...,).

    Returns:
        float32 of shape (..., width).
    """
    return features.astype(np.float32) * scales[..., None]
