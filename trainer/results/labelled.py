"""Labelled rows to measure a run on: those of a split, or those of a file it has not seen."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from featstore.config import SPLITS
from featstore.data.dataset import Dataset, rows_to_predict
from featstore.data.images import ImageIndex
from featstore.data.labels import NEUTRAL, UNLABELLED, labels_of
from featstore.errors import Advice, Command, DataError, RunError, counted
from featstore.progress import Show
from featstore.project import Project
from trainer.config import CONTROLS
from trainer.logits import finite_rows
from trainer.results.score import Scorer, Scores
from trainer.results.unseen import score_dataset
from trainer.run.folder import Run

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Scored:
    """Labelled rows, in the order in which they came, and what a run says of them.

    Attributes:
        rows: int64 of shape (rows,): which rows of the split's data set, or of the file's.
        image_ids: object of shape (rows,), str.
        hypotheses: object of shape (rows,), str.
        labels: int8 of shape (rows,), as of `Examples`.
        logits: float64 of shape (rows,): of entailment; of three classes (rows, 3): of each.
        total: Rows that there are, with those that cannot be measured.
        unread: Image id to reason of photos that could not be read.
        left_out: Reason to the number of rows that cannot be measured, photos apart.
    """

    rows: NDArray[np.int64]
    image_ids: NDArray[np.object_]
    hypotheses: NDArray[np.object_]
    labels: NDArray[np.int8]
    logits: NDArray[np.float64]
    total: int
    unread: dict[str, str]
    left_out: dict[str, int]

    def __len__(self) -> int:
        return len(self.rows)


class Labelled(Protocol):
    """Rows on which any run can be measured that reads the same features."""

    name: str

    def score(self, scorer: Scorer, control: str) -> Scored: ...


class SplitRows:
    """The rows of a split.

    Args:
        project: Whose split.
        split: "train", "val" or "test".
        show: Shows the encoding of sentences, and a pass that takes long.
    """

    def __init__(self, project: Project, split: str, show: Show) -> None:
        self.project, self.name, self.show = project, split, show

    def score(self, scorer: Scorer, control: str) -> Scored:
        """Compute the logit of each row.

        Raises:
            MissingFeaturesError: A photo of the split was never extracted.
            RunError: A logit is not finite.
        """
        scores = scorer.score(self.name, control, self.show)
        total = len(self.project.dataset.rows(self.name))
        return _scored(scorer, self.project.dataset, scores, total, {})


class UnseenRows:
    """Labelled rows of a file or a table, whose features are extracted where they are missing.

    Args:
        run: Its name is in what is said of rows without labels.
        root: The store's.
        rows: The file or the table; see `trainer.results.predict.predict`.
        images: Folder of the photos, or what was found in it; None: they are in `rows`.
        show: Shows the extraction and the scoring.
        cache: Keep the features in the run's store.
        encoding: Of the file's text; "": UTF-8, or told from the bytes, which is shown.

    Raises:
        RowError, DataError: No row can be used, or none has a label.
    """

    def __init__(
        self,
        run: Run,
        root: Path,
        rows: str | os.PathLike[str] | pd.DataFrame,
        images: str | os.PathLike[str] | ImageIndex | None,
        show: Show,
        cache: bool = True,
        encoding: str = "",
    ) -> None:
        self.show, self.cache = show, cache
        self.file = os.fspath(rows) if isinstance(rows, str | os.PathLike) else None
        stem = "rows" if self.file is None else Path(self.file).stem
        # The files of a split, and of a control, have names of their own.
        taken = stem in SPLITS or any(stem.endswith(f"-{control}") for control in CONTROLS)
        self.name = f"rows-{stem}" if taken else stem
        classes, names = run.config.data.classes, run.config.data.label_names
        self.dataset = rows_to_predict(rows, images, root, encoding, classes, names)
        labels = self.dataset.examples.labels
        # Said before anything is extracted.
        self.notes = [*self.dataset.notes(), *_absent_classes(labels, classes)]
        for line in self.notes:
            show.note(line)
        if (labels == UNLABELLED).all():
            raise DataError(
                f"{self.file or 'the rows'}: none of {counted(len(labels), 'row')} has a label to"
                " measure by;"
                f" expected a column Label with {' or '.join(labels_of(classes))}",
                Advice(
                    "to predict them, run ", Command("predict", run.name, rows=self.file or "FILE")
                ),
            )

    def score(self, scorer: Scorer, control: str) -> Scored:
        """Compute the logit of each row that has a label.

        Raises:
            DataError: No photo could be read, or one has the id of another in the store.
            RunError: A logit is not finite.
        """
        dataset = self.dataset
        scores = score_dataset(scorer, dataset, show=self.show, cache=self.cache, control=control)
        dropped = [issue.reason for issue in dataset.issues if issue.kind == "dropped"]
        # Of a run of two classes neutral is no label.
        neutral = {issue.line for issue in dataset.issues if issue.reason == NEUTRAL}
        lines = dataset.examples.source_lines[dataset.examples.labels == UNLABELLED].tolist()
        why = Counter(NEUTRAL if line in neutral else "no label" for line in lines)
        left_out = Counter(dropped) + why
        total = len(dataset.examples) + len(dropped)
        return _scored(scorer, dataset, scores, total, dict(left_out.most_common()))


def _absent_classes(labels: NDArray[np.int8], classes: int) -> list[str]:
    """Say which of three classes no row has, in a line: figures over classes lack it."""
    absent = [name for name, label in labels_of(classes).items() if not (labels == label).any()]
    if classes == 2 or not absent or len(absent) == classes:
        return []
    return [
        f"no row is {' or '.join(absent)}: macro-F1 counts such a class as 0 and AUC is undefined,"
        " for the run tells three classes apart; accuracy stays what it is"
    ]


def seen_photos(project: Project, image_ids: NDArray[np.object_]) -> dict[str, dict[str, int]]:
    """Count the photos of rows that a run was trained on, or its threshold chosen by.

    Args:
        project: The run's own.
        image_ids: object of shape (rows,), str: of the rows.

    Returns:
        For "train" and "val" the number of `photos`, and of `rows` with one.
    """
    found = {}
    for split in ("train", "val"):
        own = project.dataset.examples.image_ids[project.dataset.rows(split)]
        seen = np.isin(image_ids.astype(str), own.astype(str))
        found[split] = {"photos": len(set(image_ids[seen])), "rows": int(seen.sum())}
    return found


def _scored(
    scorer: Scorer, dataset: Dataset, scores: Scores, total: int, left_out: dict[str, int]
) -> Scored:
    labelled = scores.labels != UNLABELLED
    rows, logits = scores.rows[labelled], scores.logits[labelled].astype(np.float64)
    if not len(rows):
        raise DataError("no labelled row has a photo that could be read")
    bad = int((~finite_rows(logits)).sum())
    if bad:
        raise RunError(
            f"{scorer.run.folder}: {bad} of {len(logits)} logits are not finite; its weights are"
            " damaged, or training diverged: train again"
        )
    examples: Any = dataset.examples.select(rows)
    return Scored(
        rows,
        examples.image_ids,
        examples.hypotheses,
        examples.labels,
        logits,
        total,
        scores.unread,
        left_out,
    )
