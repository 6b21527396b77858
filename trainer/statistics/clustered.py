"""Rows grouped by image, and the bootstrap draws of images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.stats import chi2

from trainer.logits import FloatArray
from trainer.metrics import IntArray

LEVEL = 0.95
CHUNK_VALUES = 2**20
"""Numbers that are held at once for one quantity: 8 MB."""


class Interval(TypedDict):
    low: float
    high: float


class Clustered:
    """Rows grouped by image, and bootstrap draws of the images.

    The draws depend on which images there are, on `draws` and `seed`; not on the order of
    the rows nor on how many an image has. So two runs on the same rows are measured on the
    same draws, and the first draws of a longer series are those of a shorter one.

    Args:
        groups: Image id of each row, of shape (rows,).
        draws: Number of draws, each of as many images as there are, with replacement.
        seed: Of the draws.

    Raises:
        ValueError: No rows, or no draws.

    Cost: draws are made again whenever they are read, a few MB at a time, so memory does not
    grow with `draws` times images.
    """

    def __init__(
        self, groups: Sequence[str] | npt.NDArray[Any], draws: int = 2000, seed: int = 0
    ) -> None:
        names, at = np.unique(np.asarray(groups), return_inverse=True)
        if len(names) == 0:
            raise ValueError("no rows to draw from")
        if draws < 1:
            raise ValueError(f"expected at least 1 draw, found {draws}")
        self.image_of_row: IntArray = at.reshape(-1).astype(np.int64)
        self.rows, self.images = len(self.image_of_row), len(names)
        self.draws, self.seed = draws, seed

    def counts(self) -> Iterator[FloatArray]:
        """Yield how often each image is drawn, some draws at a time.

        Yields:
            float64 of shape (draws of this part, images), whole numbers; each row's sum is
            `images`.
        """
        rng = np.random.default_rng(self.seed)
        part = max(1, CHUNK_VALUES // self.rows)
        for start in range(0, self.draws, part):
            size = min(part, self.draws - start)
            drawn = rng.integers(self.images, size=(size, self.images))
            drawn += np.arange(size)[:, None] * self.images
            counts = np.bincount(drawn.reshape(-1), minlength=size * self.images)
            yield counts.reshape(size, self.images).astype(np.float64)

    def by_image(self, values: npt.ArrayLike, kinds: int = 1, at: Any = 0) -> sparse.csr_array:
        """Add up a number of each row by image.

        Args:
            values: Float of shape (rows,).
            kinds: Number of kinds of rows to tell apart.
            at: int64 of shape (rows,): each row's kind, below `kinds`.

        Returns:
            float64 of shape (images, kinds); sparse, since an image has few rows, which
            makes `counts @ table` some fifty times faster.
        """
        weights = np.asarray(values, np.float64)
        cells = (self.image_of_row, np.broadcast_to(at, self.rows))
        return sparse.csr_array((weights, cells), shape=(self.images, kinds))

    def sums(self, table: sparse.csr_array) -> FloatArray:
        """Return the column sums of (images, n) in each draw: float64 of shape (draws, n)."""
        return np.concatenate([counts @ table for counts in self.counts()])


def percentiles(values: FloatArray, clustered: Clustered, level: float = LEVEL) -> Interval | None:
    """Return the middle `level` of a figure's bootstrap values.

    Args:
        values: float64 of shape (draws,); NaN where a draw had no such figure.
        clustered: What was drawn.
        level: Share of the draws within, such as 0.95.

    Returns:
        Their percentiles; None for rows of a single image, which say nothing of others,
        where no draw has the figure, and where they have no width: that all rows here are
        right does not say that all others would be.
    """
    found = middle(values, clustered, level)
    return found if found is not None and found["low"] < found["high"] else None


def middle(values: FloatArray, clustered: Clustered, level: float = LEVEL) -> Interval | None:
    """Return `percentiles`, also where they have no width."""
    if not 0 < level < 1:
        raise ValueError(f"expected a level between 0 and 1, such as 0.95, found {level:g}")
    known = values[~np.isnan(values)]
    if clustered.images < 2 or not len(known):
        return None
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return {"low": float(low), "high": float(high)}


def wilson(share: float, trials: int, level: float = LEVEL) -> Interval:
    """Return Wilson's interval of a share of some trials (1927,
    doi:10.1080/01621459.1927.10502953); the share need not be of whole ones.
    """
    z2 = float(chi2.ppf(level, 1))
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    spread = z2 * share * (1 - share) / trials + z2**2 / (4 * trials**2)
    half = spread**0.5 / (1 + z2 / trials)
    return {"low": max(middle - half, 0.0), "high": min(middle + half, 1.0)}


def check_length(rows: int, clustered: Clustered) -> None:
    if rows != clustered.rows:
        raise ValueError(f"expected one value for each of {clustered.rows} rows, found {rows}")
