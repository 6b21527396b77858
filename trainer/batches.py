"""Rows and stores to batches, in an order that (seed, epoch) alone decides."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
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
        labels: float32 of shape (batch,), 1 for entailment; of three classes (batch, 3), 1 for
            the row's own; smoothed where they are to be.
        weights: float32 of shape (batch,), that of the row and of its class, or 0.
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


def drawn_views(rows: int, views: int, seed: int, epoch: int) -> IntArray:
    """Return which photometric view each row is shown under.

    A pure function of its arguments: a row that is drawn twice in an epoch has one view.

    Args:
        rows: Of the split.
        views: How many there are; each is as likely.
        seed, epoch: Decide them.

    Returns:
        int64 of shape (rows,), in [0, views).
    """
    # Another sequence than those of the order and of the draws.
    return np.random.default_rng([seed, epoch, 2]).integers(0, views, rows)


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


@dataclass(frozen=True)
class Emphasis:
    """How often the rows of a split are trained on, and how much each says in the loss.

    Attributes:
        draws: float64 of shape (rows,): expected draws of each row an epoch, at least 1; None:
            each row once.
        class_weights: float32 of shape (classes,): weight of a row by its label; None: 1.
        label_smoothing: Share of a label that is spread over all classes.
        recorded: What a run's manifest says of it.
        row_weights: float32 of shape (rows,): weight of each row; None: 1.
    """

    draws: NDArray[np.float64] | None = None
    class_weights: NDArray[np.float32] | None = None
    label_smoothing: float = 0.0
    recorded: Mapping[str, Any] = field(default_factory=dict)
    row_weights: NDArray[np.float32] | None = None

    def drawn(self, count: int, seed: int, epoch: int) -> IntArray:
        """Return the rows of an epoch, in order, each as often as it is drawn.

        A pure function of its arguments. A row of 2.3 draws stands there twice, and a third
        time in three epochs of ten.

        Args:
            count: Rows of the split.
            seed, epoch: Decide which rows are drawn once more.
        """
        if self.draws is None:
            return np.arange(count)
        whole = np.floor(self.draws)
        # Another sequence than that of the order.
        chance = np.random.default_rng([seed, epoch, 1]).random(count)
        return np.repeat(np.arange(count), (whole + (chance < self.draws - whole)).astype(int))


class ImageFeatures(Protocol):
    """What batches need of image features; a `VisionStore` has it."""

    spec: dict[str, Any]

    @property
    def row_shape(self) -> tuple[int, int]: ...

    def gather_stored(self, positions: IntArray) -> Numbers: ...

    def will_need(self, positions: IntArray) -> None: ...


class NoPhotos:
    """Zeros in the place of image features: the control without the picture.

    Args:
        vision: What they stand for.
    """

    def __init__(self, vision: ImageFeatures) -> None:
        self.spec, self.row_shape = vision.spec, vision.row_shape

    def gather_stored(self, positions: IntArray) -> Numbers:
        """Return zeros for rows."""
        found = Numbers.empty((len(positions), *self.row_shape), self.spec["dtype"])
        for array in found.arrays:
            array.fill(0)
        return found

    def will_need(self, positions: IntArray) -> None:
        """Nothing to do."""


class SentenceFeatures(Protocol):
    """What batches need of sentence features; a `TextStore` has it."""

    def lengths(self, positions: IntArray) -> IntArray: ...

    def gather_stored(
        self, positions: IntArray, length: int
    ) -> tuple[Numbers, NDArray[np.bool_]]: ...


class CachedRows:
    """The rows of one split, each with its place in both stores.

    Args:
        vision: Image features: a `VisionStore`, what is held in memory of one, or of several
            photometric views `ViewedImages`. May be replaced by what is on the device
            (`trainer.resident`).
        text: Sentence features: a `TextStore`, or what is held in memory of one.
        image_positions: int64 of shape (views × rows,), in `vision`: of each row under view 0,
            then under view 1, and so on. There may be one view.
        text_positions: int64 of shape (rows,), in `text`.
        labels: int8 of shape (rows,).
        whole: Read all tokens of a sentence; else the first one's state alone.
        classes: 2 or 3.
        control: "none", "hypothesis-only" (features are zeros) or
            "shuffled-images" (another image's).
        control_seed: Decides which other image.
        emphasis: Of rows that are trained on.
    """

    def __init__(
        self,
        vision: ImageFeatures,
        text: SentenceFeatures,
        image_positions: IntArray,
        text_positions: IntArray,
        labels: NDArray[np.int8],
        *,
        whole: bool,
        classes: int = 2,
        control: str = "none",
        control_seed: int = 0,
        emphasis: Emphasis | None = None,
    ) -> None:
        self.vision = NoPhotos(vision) if control == "hypothesis-only" else vision
        self.text, self.labels = text, labels
        self.emphasis = emphasis or Emphasis()
        self.views = len(image_positions) // len(labels)
        if control == "shuffled-images":
            image_positions = self._shuffled(image_positions, control_seed)
        self.image_positions = image_positions
        self.text_positions = text_positions
        self.whole, self.classes = whole, classes
        self.lengths = text.lengths(text_positions) if whole else np.ones(len(labels), np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def _shuffled(self, positions: IntArray, seed: int) -> IntArray:
        """Return positions with another image's in the place of each; one for all of its views."""
        plain = positions[: len(self)]
        others = other_images(plain, seed)
        if self.views == 1:
            return others
        row_of = {position: row for row, position in enumerate(plain.tolist())}
        partners = np.array([row_of[position] for position in others.tolist()])
        return positions.reshape(self.views, len(self))[:, partners].reshape(-1)

    def batch(self, rows: IntArray, batch_size: int) -> Batch:
        """Read some rows as one batch.

        Args:
            rows: int64 of shape (n,), n in 1..batch_size. A row under view v is given as the
                row + v × rows of the split.
            batch_size: Rows of the result; the missing repeat the first with
                weight 0.
        """
        filled = np.concatenate([rows, np.repeat(rows[:1], batch_size - len(rows))])
        positions = self.image_positions[filled]
        if self.views > 1:
            rows, filled = rows % len(self), filled % len(self)
        features = self.vision.gather_stored(positions)
        length = int(self.lengths[rows].max())
        hidden, mask = self.text.gather_stored(self.text_positions[filled], length)
        given, smoothing = self.emphasis.class_weights, self.emphasis.label_smoothing
        weights = np.zeros(batch_size, np.float32)
        weights[: len(rows)] = 1 if given is None else given[self.labels[rows]]
        if self.emphasis.row_weights is not None:
            weights[: len(rows)] *= self.emphasis.row_weights[rows]
        labels = self.labels[filled]
        if self.classes > 2:
            labels = labels[:, None] == np.arange(self.classes)
        labels = labels.astype(np.float32)
        if smoothing:
            # As Keras smooths labels.
            labels = labels * np.float32(1 - smoothing) + np.float32(smoothing / self.classes)
        return Batch(features, hidden, mask, labels, weights, rows)

    def will_need(self, rows: IntArray) -> None:
        """Have the system read a later batch's features from the disk meanwhile."""
        # What is wrong with a row is said when it is read.
        with contextlib.suppress(IndexError):
            self.vision.will_need(self.image_positions[rows])

    def epoch(self, batch_size: int, seed: int, epoch: int) -> list[IntArray]:
        """Return the rows of each training step of an epoch, each under one of its views.

        See `Emphasis.drawn` and `drawn_views`; `batch` takes them.
        """
        rows = self.emphasis.drawn(len(self), seed, epoch)
        batches = epoch_batches(self.lengths[rows], batch_size, seed, epoch, group=self.whole)
        if self.views > 1:
            rows = rows + len(self) * drawn_views(len(self), self.views, seed, epoch)[rows]
        return [rows[batch] for batch in batches]

    def in_order(self, batch_size: int) -> list[IntArray]:
        """Return every row once, for prediction: by length, so that little is padded."""
        order = np.argsort(self.lengths, kind="stable")
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
