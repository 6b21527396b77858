"""Features as they are stored: plain numbers, or int8 levels and the scale of each token.

int8: each token in 127 steps on either side of zero, and the size of its step.
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

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from featstore.encoders.spec import QUANTISED

SCALE_DTYPE = np.dtype(np.float32)
LEVELS = 127
ALIGNMENT_BYTES = 64


def feature_dtype(name: str) -> np.dtype[Any]:
    """Return the NumPy dtype of a stored number format."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def token_bytes(dtype: str, width: int) -> int:
    """Return the bytes that one token of features takes on the disk, its scale included."""
    scale_bytes = SCALE_DTYPE.itemsize if dtype == QUANTISED else 0
    return width * feature_dtype(dtype).itemsize + scale_bytes


def aligned_empty(
    shape: tuple[int, ...], dtype: Any, alignment: int = ALIGNMENT_BYTES
) -> NDArray[Any]:
    """Return an uninitialised array that starts at a multiple of `alignment` bytes.

    NumPy's own large arrays start 16 bytes past a page. Copying to there from
    rows that start at a page takes twice the time on processors whose string
    moves are slow at such distances, AMD's Zen 3 and 4 among them.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + alignment, np.uint8)
    start = -memory.ctypes.data % alignment
    return memory[start : start + size].view(dtype).reshape(shape)


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


@dataclass(frozen=True, eq=False, slots=True)
class Numbers:
    """Features in a stored number format, int8's levels and scales as one.

    Rows and tokens are taken, set and joined as those of an array are; an
    index never reaches into the last axis, a token's own numbers.

    Attributes:
        values: Stored dtype, shape (..., width).
        scales: Of int8 only: float32 of shape (...,), one step of each token.
    """

    values: NDArray[Any]
    scales: NDArray[np.float32] | None = None

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: str) -> Numbers:
        """Return uninitialised numbers of a shape (..., width), aligned to 64 bytes."""
        scales = aligned_empty(shape[:-1], SCALE_DTYPE) if dtype == QUANTISED else None
        return cls(aligned_empty(shape, feature_dtype(dtype)), scales)

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype: str) -> Numbers:
        """Return zeros of a shape (..., width)."""
        scales = np.zeros(shape[:-1], SCALE_DTYPE) if dtype == QUANTISED else None
        return cls(np.zeros(shape, feature_dtype(dtype)), scales)

    @classmethod
    def rounded(cls, values: NDArray[Any], dtype: str) -> Numbers:
        """Round features to a stored number format.

        Args:
            values: Float of shape (..., width), at most float32.
            dtype: Stored number format. What does not fit it becomes infinite.
        """
        if dtype == QUANTISED:
            return cls(*quantise(values))
        with np.errstate(over="ignore"):
            return cls(values.astype(feature_dtype(dtype)))

    @classmethod
    def concatenate(cls, parts: Sequence[Numbers]) -> Numbers:
        """Join numbers of one format along their first axis."""
        columns = zip(*(part.arrays for part in parts), strict=True)
        return cls(*map(np.concatenate, columns))

    @property
    def arrays(self) -> tuple[NDArray[Any], ...]:
        """What is stored: the values and, of int8, the scales."""
        return (self.values,) if self.scales is None else (self.values, self.scales)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values, (..., width)."""
        return self.values.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the values and the scales."""
        return sum(array.nbytes for array in self.arrays)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, where: Any) -> Numbers:
        """Return rows or tokens; a view wherever NumPy gives one."""
        return Numbers(*(array[where] for array in self.arrays))

    def __setitem__(self, where: Any, numbers: Numbers) -> None:
        for array, part in zip(self.arrays, numbers.arrays, strict=True):
            array[where] = part

    def copy(self) -> Numbers:
        """Return a copy that holds on to no other memory."""
        return Numbers(*(array.copy() for array in self.arrays))

    def is_finite(self) -> bool:
        """Tell whether every number is finite."""
        # int8 levels always are; the scale of a token that was not tells it.
        numbers = self.arrays[-1]
        if numbers.itemsize != 2:
            return bool(np.isfinite(numbers).all())
        # What is not is the largest of its sign, as an integer; NumPy would widen each to float32.
        infinity = int(np.array(np.inf, numbers.dtype).view(np.uint16))
        most = numbers.view(np.int16).max(initial=0), numbers.view(np.uint16).max(initial=0)
        return bool(most[0] < infinity and most[1] < infinity | 0x8000)

    def plain(self, out: NDArray[np.float32] | None = None) -> NDArray[Any]:
        """Return the numbers that are meant, as one array.

        Args:
            out: Of int8 only: float32 of shape (..., width) to fill, or None
                to allocate.

        Returns:
            Shape (..., width): of int8 float32, each level times its token's
            scale, as the trainer's graph widens them; of other formats the
            values themselves, not copied.
        """
        if self.scales is None:
            return self.values
        return np.multiply(self.values, self.scales[..., None], out=out)

    def checksum(self, token_ids: NDArray[np.int32] | None = None) -> int:
        """Return the XXH3-64 of a row: a text row's token ids, values, scales if any."""
        state = xxhash.xxh3_64()
        for array in self.arrays if token_ids is None else (token_ids, *self.arrays):
            state.update(np.ascontiguousarray(array).view(np.uint8).data)
        return state.intdigest()
