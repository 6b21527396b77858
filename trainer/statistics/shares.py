"""Shares of rows, such as an accuracy: intervals, and paired tests of two runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.stats import binomtest, chi2, permutation_test

from trainer.logits import FloatArray
from trainer.statistics.clustered import (
    CHUNK_VALUES,
    LEVEL,
    Clustered,
    Interval,
    check_length,
    percentiles,
    wilson,
)

FEW_IMAGES = 10
"""Images with a right row, and with a wrong one, from which on a share is bootstrapped; and
images on which two runs differ from which on their difference is."""

PERMUTATIONS = 9999


def proportion_interval(
    values: npt.ArrayLike, clustered: Clustered, level: float = LEVEL
) -> dict[str, Any]:
    """Return the interval of a share of rows, such as the accuracy of a bucket.

    Where at least `FEW_IMAGES` images have a row that counts, and as many a row that does
    not, it is bootstrapped over images. With fewer, percentiles are too narrow, and with
    none, or where all images have the same share, they have no width; it is then Wilson's
    interval as if each image were one row, which is exact for one row an image and otherwise
    errs to the wide side.

    Args:
        values: Bool or 0/1 of shape (rows,).
        clustered: The images of these very rows.
        level: Such as 0.95.

    Returns:
        `low`, `high`, `method` ("bootstrap" or "wilson"), `images`.

    Raises:
        ValueError: Shapes differ, or a value other than 0 and 1.
    """
    counted = _zero_one(values, clustered)
    table = clustered.by_image(np.ones(len(counted)), 2, counted.astype(np.int64))
    if (table > 0).sum(axis=0).min() >= FEW_IMAGES:
        sums = clustered.sums(table)
        found = percentiles(sums[:, 1] / sums.sum(axis=1), clustered, level)
        if found is not None:
            return {**found, "method": "bootstrap", "images": clustered.images}
    found = wilson(float(counted.mean()), clustered.images, level)
    return {**found, "method": "wilson", "images": clustered.images}


def paired_difference(
    a: npt.ArrayLike, b: npt.ArrayLike, clustered: Clustered, level: float = LEVEL
) -> dict[str, Any]:
    """Return by how much the share of rows in `a` is above that in `b`, over the same rows.

    Where at least `FEW_IMAGES` images differ, the interval is bootstrapped over images.
    With fewer, percentiles are too narrow, and have no width where nothing differs, or every
    image alike; it is then that of Agresti and Min 2005 (doi:10.1002/sim.1781) for matched
    pairs, each image being one pair that counts as many times as its rows over the mean of
    all images.

    Args:
        a: Bool or 0/1 of shape (rows,): such as whether each row is right.
        b: The same of what it is compared with.
        clustered: The rows' images; both are measured on the same draws.
        level: Such as 0.95.

    Returns:
        `difference`, `low`, `high`, `method` ("bootstrap" or "agresti-min"),
        `differing_images`.

    Raises:
        ValueError: Shapes differ, or a value other than 0 and 1.
    """
    gap = _zero_one(a, clustered).astype(np.float64) - _zero_one(b, clustered)
    table = sparse.hstack(
        [clustered.by_image(gap), clustered.by_image(np.ones(len(gap)))], format="csr"
    )
    sums, total = clustered.sums(table), table.toarray()[:, 0]
    differing = clustered.by_image(gap != 0).toarray()[:, 0] > 0
    found = percentiles(sums[:, 0] / sums[:, 1], clustered, level)
    method = "bootstrap"
    if differing.sum() < FEW_IMAGES or found is None:
        found, method = (
            _agresti_min(total / (clustered.rows / clustered.images), level),
            "agresti-min",
        )
    return {
        "difference": float(gap.mean()),
        **found,
        "method": method,
        "differing_images": int(differing.sum()),
    }


def mcnemar(a_correct: npt.ArrayLike, b_correct: npt.ArrayLike) -> dict[str, float | int]:
    """Test whether two classifiers are right equally often on the same rows.

    McNemar 1947 (doi:10.1007/BF02295996): only rows on which one alone is right count. It
    takes rows as independent, which several rows of one image are not; `permutation` does
    not.

    Args:
        a_correct: Bool of shape (rows,).
        b_correct: Bool of shape (rows,).

    Returns:
        `only_a`, `only_b` (rows that it alone has right), `exact_p` (binomial, two-sided),
        `chi2` and `chi2_p` (with Edwards' continuity correction, one degree of freedom).

    Raises:
        ValueError: Shapes differ.
    """
    a, b = np.asarray(a_correct, bool), np.asarray(b_correct, bool)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"expected two of one shape (rows,), found {a.shape} and {b.shape}")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    differing = only_a + only_b
    statistic = max(abs(only_a - only_b) - 1, 0) ** 2 / differing if differing else 0.0
    return {
        "only_a": only_a,
        "only_b": only_b,
        "exact_p": float(binomtest(only_a, differing).pvalue) if differing else 1.0,
        "chi2": float(statistic),
        "chi2_p": float(chi2.sf(statistic, 1)),
    }


def permutation(
    a: npt.ArrayLike, b: npt.ArrayLike, groups: Clustered, resamples: int = PERMUTATIONS
) -> dict[str, Any]:
    """Test whether two runs could have been swapped, image by image.

    Under the null hypothesis the sign of an image's summed difference is a coin's toss:
    `scipy.stats.permutation_test` with one sample and `permutation_type="samples"`. All
    rows of an image flip together, so their dependence does no harm.

    Args:
        a: Float, bool or 0/1 of shape (rows,).
        b: The same of what it is compared with.
        groups: The rows' images; its seed decides the flips.
        resamples: Flips tried; all of them where there are no more than that.

    Returns:
        `p` (two-sided), `differing_images` (those that flips change), `exact` (whether
        all flips were tried).

    Raises:
        ValueError: Shapes differ.
    """
    gap = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    check_length(len(gap), groups)
    by_image = groups.by_image(gap).toarray()[:, 0]
    # Zero keeps its sign; without them, few differing images are tried exactly.
    by_image = by_image[by_image != 0]
    exact = 2 ** len(by_image) <= resamples
    if len(by_image) == 0:
        p = 1.0
    elif len(by_image) == 1:
        p = 1.0  # Either sign is as far from zero; scipy wants two observations.
    else:
        p = permutation_test(
            (by_image,),
            lambda values, axis: values.sum(axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=resamples,
            batch=max(1, CHUNK_VALUES // len(by_image)),
            rng=np.random.default_rng(groups.seed),
        ).pvalue
    return {"p": float(p), "differing_images": len(by_image), "exact": exact}


def _zero_one(values: npt.ArrayLike, clustered: Clustered) -> npt.NDArray[np.bool_]:
    found = np.asarray(values)
    check_length(len(found), clustered)
    if not np.isin(found, (0, 1)).all():
        raise ValueError(f"expected values 0 and 1, found {np.unique(found)[:5].tolist()}")
    return found.astype(bool)


def _agresti_min(gaps: FloatArray, level: float) -> Interval:
    """Return the interval of Agresti and Min of the mean of pairs' differences, -1 to 1."""
    pairs = len(gaps) + 2
    middle = gaps.sum() / pairs
    half = (chi2.ppf(level, 1) * ((gaps**2).sum() + 1 - pairs * middle**2)) ** 0.5 / pairs
    return {"low": float(max(middle - half, -1)), "high": float(min(middle + half, 1))}
