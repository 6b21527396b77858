"""Which rows are explained: those asked for, the most confident errors, or a seeded sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.data.dataset import Dataset
from featstore.data.labels import UNLABELLED
from featstore.errors import DataError, UsageError
from featstore.settings import suggest
from trainer.logits import confidence_of, finite_rows, predicted_labels
from trainer.results.score import Scores, some

IntArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Called:
    """Rows that a run has scored, and what it calls them.

    Attributes:
        dataset: The rows, also those that could not be scored.
        rows: int64 of shape (n,): rows of the data set.
        logits: float32 of shape (n,), of three classes (n, 3).
        labels: int8 of shape (n,); -1 unlabelled.
        called: int8 of shape (n,).
        confidence: float64 of shape (n,): probability of what a row is called.
    """

    dataset: Dataset
    rows: IntArray
    logits: NDArray[np.float32]
    labels: NDArray[np.int8]
    called: NDArray[np.int8]
    confidence: NDArray[np.float64]

    @classmethod
    def of(cls, dataset: Dataset, scores: Scores, threshold: float | None) -> Called:
        """Return the rows with a logit that is finite.

        Raises:
            DataError: There is none.
        """
        finite = finite_rows(scores.logits)
        if not finite.any():
            raise DataError("no row has a finite logit; the run's weights are damaged: train again")
        logits = scores.logits[finite]
        return cls(
            dataset,
            scores.rows[finite],
            logits,
            scores.labels[finite],
            predicted_labels(logits, threshold),
            confidence_of(logits, threshold),
        )

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labelled(self) -> NDArray[np.bool_]:
        """Whether each row has a label."""
        return self.labels != UNLABELLED

    @property
    def image_ids(self) -> NDArray[Any]:
        """Image id of each row."""
        return self.dataset.examples.image_ids[self.rows]

    def sample(self, count: int, seed: int) -> IntArray:
        """Return positions of a seeded sample, in order."""
        rng = np.random.default_rng(seed)
        return np.sort(rng.permutation(len(self))[:count])

    def balanced(self, count: int, seed: int) -> IntArray:
        """Return positions of a seeded sample with as many right rows as wrong ones.

        Where there are too few of one, and of rows without a label, the rest is what there is.
        """
        order = np.random.default_rng([seed, 1]).permutation(len(self))
        wrong = self.labelled & (self.called != self.labels)
        chosen, left = order[wrong[order]], order[~wrong[order]]
        of_wrong = min(len(chosen), max(count // 2, count - len(left)))
        found = np.concatenate([chosen[:of_wrong], left[: count - of_wrong]])
        return np.sort(found)

    def errors(self, count: int) -> IntArray:
        """Return positions of the most confident errors, the most confident first.

        Raises:
            DataError: No row is wrong, or none has a label.
        """
        wrong = np.flatnonzero(self.labelled & (self.called != self.labels))
        if not len(wrong):
            known = int(self.labelled.sum())
            raise DataError(
                f"no errors among {known} labelled rows; expected at least one wrong row: choose"
                " rows with --rows N"
            )
        return wrong[np.argsort(-self.confidence[wrong], kind="stable")][:count]

    def of_photos(self, ids: Sequence[str], where: str) -> IntArray:
        """Return positions of all rows of some photos, photo by photo.

        Args:
            ids: Image ids, as the rows write them or as they were found.
            where: What the rows are called in an error.

        Raises:
            UsageError: No row has such a photo.
        """
        examples = self.dataset.examples
        written = examples.written_ids[self.rows]
        found: list[NDArray[Any]] = []
        unknown = []
        for image_id in dict.fromkeys(ids):
            at = np.flatnonzero((self.image_ids == image_id) | (written == image_id))
            if not len(at):
                unknown.append(image_id)
            found.append(at)
        if unknown:
            elsewhere = np.isin(unknown, examples.image_ids.astype(str))
            hint = suggest(unknown[0], sorted(set(self.image_ids.tolist())))
            if elsewhere.any():
                hint = "; in another split, or its photo could not be read: choose it with --split"
            raise UsageError(f"--id {some(unknown)}: no row of {where} has this photo{hint}")
        return np.concatenate(found)
