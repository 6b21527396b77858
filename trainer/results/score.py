"""From a run and rows to logits: the one way, for evaluation, parity and whatever judges a run."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import keras
import numpy as np
from numpy.typing import NDArray

from featstore.data.examples import NO_PHOTO
from featstore.errors import RunError, counted
from featstore.progress import SILENT, Show
from featstore.project import Project
from trainer.batches import CachedRows
from trainer.features import cached_rows
from trainer.run.checkpoint import load_best
from trainer.run.folder import Run
from trainer.run.step import Predictor, make_predictor, predict_logits

NAMED = 5


@dataclass(frozen=True)
class Scores:
    """What a run says of some rows.

    Attributes:
        rows: int64 of shape (n,): the rows of the data set that could be read, in order.
        logits: float32 of shape (n,): of entailment.
        labels: int8 of shape (n,): 1 entailment, 0 contradiction, -1 unlabelled.
        unread: Image id to reason of photos that could not be read; their rows are left out.
        unfit: Sentence to reason of those whose features do not fit the stored number
            format; their rows are left out.
    """

    rows: NDArray[np.int64]
    logits: NDArray[np.float32]
    labels: NDArray[np.int8]
    unread: dict[str, str]
    unfit: dict[str, str] = field(default_factory=dict)


class Scorer:
    """A run's best weights over the features of a project; no optimizer is made.

    Args:
        run: A run with weights.
        project: Where the features come from: that of `project_of(run)`, or one
            of other rows with the same encoders and store.

    Raises:
        RunError: The project's features are not those that the run was trained on.
    """

    def __init__(self, run: Run, project: Project) -> None:
        check_same_features(run, project)
        self.run, self.project = run, project
        self.train = run.config.train

    def photos(self, images: str | os.PathLike[str] | None) -> str | os.PathLike[str]:
        """Return the folder of photos that is given, or else the run's own."""
        return images or self.project.config.data.images or self.project.dataset.images.folder

    @functools.cached_property
    def model(self) -> keras.Model:
        """The cached model with the weights of the best epoch."""
        return load_best(self.run)

    @functools.cached_property
    def predictor(self) -> Predictor:
        """What runs the model on a batch."""
        return make_predictor([self.model])

    def rows(self, split: str, control: str = "none") -> CachedRows:
        """Return a split's rows ("all": every row), ready to be read in batches."""
        return cached_rows(self.project, self.train, split, control)

    def score(self, split: str, control: str = "none", show: Show = SILENT) -> Scores:
        """Compute the logit of every row of a split, labelled or not, each exactly once.

        Args:
            split: "train", "val", "test" or "all".
            control: Show the model no picture ("hypothesis-only") or another
                photo ("shuffled-images").
            show: Shows the encoding of sentences that the store lacks, and a pass that
                takes long.

        Raises:
            MissingFeaturesError: A photo was never extracted.
            StaleFeaturesError: A photo was replaced since it was extracted.
            DataError: No row's photo could be read.
        """
        rows, unread = self.project.usable(split)
        self.project.forget_photos()
        self.project.compare_photos(split, show)
        self.project.extract("text", k_txt=self.train.k_txt, show=show)
        self.project.forget_encoders()
        cached = self.rows(split, control)
        size = self.train.batch_size
        with show.slow_bar(len(cached), f"rows of {split}") as progress:
            (logits,) = predict_logits(self.predictor, cached, size, progress)
        return Scores(rows, logits, cached.labels, unread)


def project_of(run: Run) -> Project:
    """Open the very rows and features that a run was trained on.

    Raises:
        RunError: The rows, the split or an encoder changed since.
    """
    project = Project(run.config)
    check_same_data(run, project)
    check_same_features(run, project)
    return project


def check_same_data(run: Run, project: Project) -> None:
    """Refuse to measure a run on a split that is not the one it was trained with.

    Raises:
        RunError: The rows or the split differ from the run's.
    """
    expected = run.manifest["data"]
    for what, found in (
        ("rows", project.dataset.examples.digest()),
        ("splits", project.dataset.splits.digest()),
    ):
        if expected[f"{what}_digest"] != found:
            _refuse_lost_photos(run, project)
            raise RunError(
                f"{run.folder}: the {what} changed since the run was trained (expected"
                f" {expected[f'{what}_digest']}, found {found}); its test split could hold"
                " training rows; restore them or train again"
            )


def _refuse_lost_photos(run: Run, project: Project) -> None:
    """Say which photos are gone, where that is why the rows are others.

    Raises:
        RunError: Some are.
    """
    issues = project.dataset.issues
    absent = list(dict.fromkeys(i.image_id for i in issues if i.reason == NO_PHOTO))
    extracted = project.images().lookup(absent) >= 0
    gone = [image_id for image_id, was in zip(absent, extracted, strict=True) if was]
    if gone:
        raise RunError(
            f"{run.folder}: {counted(len(gone), 'photo')} gone since the features were extracted"
            f" ({some(gone)}), so the rows are not the run's; put them back in"
            f" {project.dataset.images.folder}"
        )


def some(names: Sequence[str]) -> str:
    """Return the first few of some names, for a message."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(repr(name) for name in names[:NAMED]) + more


def check_same_features(run: Run, project: Project) -> None:
    """Refuse features of another spec than the run was trained on.

    Raises:
        RunError: A fingerprint differs.
    """
    expected = run.manifest["features"]
    for name, spec in (
        ("vision", project.vision_spec),
        ("text", project.text_spec(run.config.train.k_txt)),
    ):
        if expected[name]["fingerprint"] != spec.fingerprint:
            raise RunError(
                f"{run.folder}: trained on {name} features {expected[name]['fingerprint']},"
                f" the configuration asks for {spec.fingerprint}; the encoder's files changed"
            )
