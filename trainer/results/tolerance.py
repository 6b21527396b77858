"""How far two computations of one number may differ."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.encoders.spec import QUANTISED
from featstore.store.numbers import LEVELS, Numbers, feature_dtype

Floats = NDArray[Any]

EXACT_LOGITS = 1e-4
"""Most that logits may differ where nothing was rounded: float32 alone gives about 1e-5."""


def unit_roundoff(dtype: str) -> float:
    """Return the largest relative error of rounding to a number format: 2⁻¹¹ for float16.

    Of int8, half a step over the token's largest number, 1/254.
    """
    import ml_dtypes

    if dtype == QUANTISED:
        return 1 / (2 * LEVELS)
    return float(ml_dtypes.finfo(feature_dtype(dtype)).eps) / 2


def arithmetic_noise(precision: str) -> float:
    """Return how far two computations of a feature may differ, over its row's root mean square.

    1e-4 in float32, where another batch size alone moves features of twelve
    blocks by 2e-5; 256 units of roundoff in less.
    """
    return max(1e-4, 256 * unit_roundoff(precision))


def feature_tolerance(stored: Numbers, fresh: Floats, precision: str) -> Floats:
    """Return how far each stored number may be from its recomputed value.

    Half a unit in the last place of the stored format, or half a step of the
    token's scale, for the rounding, and `arithmetic_noise` times the
    recomputed row's root mean square.

    Args:
        stored: Shape (rows, tokens, width).
        fresh: float32 of the same shape.
        precision: Arithmetic of the encoder while it extracted.

    Returns:
        float64 of the same shape.
    """
    import ml_dtypes

    half: Floats
    if stored.scales is not None:
        half = stored.scales.astype(np.float64)[..., None] / 2
    else:
        limits = ml_dtypes.finfo(stored.values.dtype)
        # A number in [2^(e-1), 2^e) is rounded by at most 2^(e-1) · eps / 2, a subnormal one as
        # the smallest normal number is.
        magnitudes = np.maximum(
            np.abs(stored.values.astype(np.float64)), float(limits.smallest_normal)
        )
        half = np.ldexp(float(limits.eps) / 4, np.frexp(magnitudes)[1])
    squares = np.square(fresh, dtype=np.float64)
    noise = arithmetic_noise(precision) * np.sqrt(squares.mean(axis=(1, 2), keepdims=True))
    return np.broadcast_to(half + noise, stored.shape)


def logit_tolerance(dtype: str, precision: str) -> float:
    """Return how far two logits of one row may differ.

    `EXACT_LOGITS`, and 16 units of roundoff of the stored format and of the
    encoder's arithmetic: the head averages over tokens, so the rounding of
    single numbers largely cancels.

    Args:
        dtype: Stored number format.
        precision: Arithmetic of the encoder while it extracted.
    """
    return EXACT_LOGITS + 16 * (unit_roundoff(dtype) + unit_roundoff(precision))
