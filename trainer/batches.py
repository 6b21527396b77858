"""Rows and stores to batches, in an order that (seed, epoch) alone decides."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from featstore.errors import DataError
from featstore.store.numbers import Numbers

IntArray = NDArray[np.int64]

WINDOW_BATCHES = 64
# The model's inputs that hold the scales of int8 features.
SCALES_OF = {"features": "feature_scales", "hidden": "hidden_scales"}


@dataclass
class Batch:
    """One step's rows, always `batch_size` of them; the missing have weight 0.

    Attributes:
        features: As stored, shape (batch, tokens, width).
        hidden: As stored, shape (batch, length, text width).
        padding_mask: bool of shape (batch, length).
        labels: float32 of shape (batch,).
        weights: float32 of shape (batch,), 1 or 0.
        rows: int64 of shape (valid rows,): positions in the rows given.
    """

    features: Numbers
    hidden: Numbers
    padding_mask: NDArray[np.bool_]
    labels: NDArray[np.float32]
    weights: NDArray[np.float32]
    rows: IntArray

    def inputs(self) -> dict[str, NDArray[Any]]:
        """Return the model's inputs by name."""
        inputs: dict[str, NDArray[Any]] = {"padding_mask": self.padding_mask}
        for name, numbers in (("features", self.features), ("hidden", self.hidden)):
            inputs |= zip((name, SCALES_OF[name]), numbers.arrays, strict=False)
        return inputs


def epoch_batches(
    lengths: IntArray, batch_size: int, seed: int, epoch: int, group: bool
) -> list[IntArray]:
    """Return the rows of each step of an epoch.

    A pure function of its arguments. Every row stands in exactly one batch;
    all batches but one are full. Where `group` is set, rows of like length
    share a batch: the order is shuffled, sorted by length within windows of
    `WINDOW_BATCHES` batches, cut, and the batches are shuffled.

    Args:
        lengths: int64 of shape (rows,): what to group by.
        batch_size: Rows of a full batch.
        seed, epoch: Decide the order.
        group: Sort by length within windows.

    Returns:
        One int64 array a step, of positions in [0, rows).
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    if not group:
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    window = WINDOW_BATCHES * batch_size
    batches = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]


def other_images(positions: IntArray, seed: int) -> IntArray:
    """Give every row the picture of another one: the control against which sight is judged.

    Images are put in a circle, in an order that the seed decides, and each is
    replaced by the next; no row keeps its own.

    Raises:
        DataError: There is only one image.
    """
    distinct = np.unique(positions)
    if len(distinct) < 2:
        raise DataError("control shuffled-images needs rows on at least two images")
    circle = np.random.default_rng(seed).permutation(distinct)
    following = dict(zip(circle.tolist(), np.roll(circle, -1).tolist(), strict=True))
    return np.array([following[position] for position in positions.tolist()], np.int64)


class ImageFeatures(Protocol):
    """What batches need of image features; a `VisionStore` has it."""

    spec: dict[str, Any]

    @property
    def row_shape(self) -> tuple[int, int]: ...

    def gather_stored(self, positions: IntArray) -> Numbers: ...

    def will_need(self, positions: IntArray) -> None: ...


class SentenceFeatures(Protocol):
    """What batches need of sentence features; a `TextStore` has it."""

    def lengths(self, positions: IntArray) -> IntArray: ...

    def gather_stored(
        self, positions: IntArray, length: int
    ) -> tuple[Numbers, NDArray[np.bool_]]: ...


class CachedRows:
    """The rows of one split, each with its place in both stores.

    Args:
        vision: Image features: a `VisionStore`, or what is held in memory of one.
        text: Sentence features: a `TextStore`, or what is held in memory of one.
        image_positions: int64 of shape (rows,), in `vision`.
        text_positions: int64 of shape (rows,), in `text`.
        labels: int8 of shape (rows,).
        k_txt: 0 reads the `[CLS]` states alone.
        control: "none", "hypothesis-only" (features are zeros) or
            "shuffled-images" (another image's).
        control_seed: Decides which other image.
    """

    def __init__(
        self,
        vision: ImageFeatures,
        text: SentenceFeatures,
        image_positions: IntArray,
        text_positions: IntArray,
        labels: NDArray[np.int8],
        *,
        k_txt: int,
        control: str = "none",
        control_seed: int = 0,
    ) -> None:
        self.vision, self.text, self.labels = vision, text, labels
        self.image_positions = (
            other_images(image_positions, control_seed)
            if control == "shuffled-images"
            else image_positions
        )
        self.text_positions = text_positions
        self.blind = control == "hypothesis-only"
        self.k_txt = k_txt
        self.lengths = text.lengths(text_positions) if k_txt else np.ones(len(labels), np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: IntArray, batch_size: int) -> Batch:
        """Read some rows as one batch.

        Args:
            rows: int64 of shape (n,), n in 1..batch_size.
            batch_size: Rows of the result; the missing repeat the first with
                weight 0.
        """
        filled = np.concatenate([rows, np.repeat(rows[:1], batch_size - len(rows))])
        if self.blind:
            shape = (batch_size, *self.vision.row_shape)
            features = Numbers.empty(shape, self.vision.spec["dtype"])
            for array in features.arrays:
                array.fill(0)
        else:
            features = self.vision.gather_stored(self.image_positions[filled])
        length = int(self.lengths[rows].max())
        hidden, mask = self.text.gather_stored(self.text_positions[filled], length)
        weights = np.zeros(batch_size, np.float32)
        weights[: len(rows)] = 1
        labels = self.labels[filled].astype(np.float32)
        return Batch(features, hidden, mask, labels, weights, rows)

    def will_need(self, rows: IntArray) -> None:
        """Have the system read a later batch's features from the disk meanwhile."""
        # What is wrong with a row is said when it is read.
        with contextlib.suppress(IndexError):
            if not self.blind:
                self.vision.will_need(self.image_positions[rows])

    def epoch(self, batch_size: int, seed: int, epoch: int) -> list[IntArray]:
        """Return the rows of each training step of an epoch."""
        return epoch_batches(self.lengths, batch_size, seed, epoch, group=self.k_txt > 0)

    def in_order(self, batch_size: int) -> list[IntArray]:
        """Return every row once, for prediction: by length, so that little is padded."""
        order = np.argsort(self.lengths, kind="stable")
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
