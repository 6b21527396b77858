"""From a run and rows to logits: the one way, for evaluation, parity and whatever judges a run."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from glob import glob
from os.path import exists, isabs
from typing import TYPE_CHECKING

import keras
import numpy as np
from numpy.typing import NDArray

from featstore.data.examples import NO_PHOTO
from featstore.data.images import ImageIndex
from featstore.data.table_rows import has_photos
from featstore.errors import Advice, Command, MissingFeaturesError, RunError, counted
from featstore.progress import SILENT, Show, working
from featstore.project import Project
from featstore.settings import paths_in
from trainer.batches import CachedRows
from trainer.features import cached_rows
from trainer.model.apart import Apart
from trainer.run.checkpoint import load_best
from trainer.run.folder import Run
from trainer.run.step import Predictor, make_predictor, predict_logits

if TYPE_CHECKING:
    from featstore.data.dataset import RowSource

NAMED = 5


@dataclass(frozen=True)
class Scores:
    """What a run says of some rows.

    Attributes:
        rows: int64 of shape (n,): the rows of the data set that could be read, in order.
        logits: float32 of shape (n,): of entailment; of three classes (n, 3): of each.
        labels: int8 of shape (n,), as of `Examples`; -1 unlabelled.
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
        config = run.config
        self.train, self.classes = config.train, config.data.classes
        self.logit_shape = () if self.classes == 2 else (self.classes,)

    def photos(
        self, images: str | os.PathLike[str] | None, rows: RowSource
    ) -> str | os.PathLike[str] | ImageIndex | None:
        """Return where the photos of other rows are: given, in their file (None), or the run's."""
        if images:
            return images
        if isinstance(rows, str | os.PathLike) and has_photos(rows):
            return None
        return self.project.config.data.images or self.project.dataset.images

    @functools.cached_property
    def model(self) -> keras.Model:
        """The cached model with the weights of the best epoch."""
        with working("building the model"):
            return load_best(self.run)

    @functools.cached_property
    def predictor(self) -> Predictor:
        """What runs the model on a batch."""
        return make_predictor([self.model])

    @functools.cached_property
    def apart(self) -> Apart:
        """The model's layers one by one, for what is asked of them beside the logits."""
        return Apart(self.model)

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
        check_store(self.run, self.project)
        rows, unread = self.project.usable(split)
        self.project.forget_photos()
        self.project.compare_photos(split, show)
        self.project.extract("text", k_txt=self.train.k_txt, show=show)
        self.project.forget_encoders()
        cached = self.rows(split, control)
        size = self.train.batch_size
        predictor = self.predictor
        with show.slow_bar(len(cached), f"rows of {split}") as progress:
            (logits,) = predict_logits(predictor, cached, size, progress)
        return Scores(rows, logits, cached.labels, unread)


def project_of(run: Run) -> Project:
    """Open the very rows and features that a run was trained on.

    Raises:
        RunError: The rows, the split or an encoder changed since.
    """
    project = opened(run)
    check_same_data(run, project)
    check_same_features(run, project)
    check_store(run, project)
    return project


def opened(run: Run) -> Project:
    """Open what a run's settings mean, whatever is there of it."""
    return Project(run.config, file=run.config_path)


def _refuse_absent(run: Run, absent: dict[str, str]) -> None:
    """Say what of a run's data is not where it was, and how to name where it is.

    Args:
        run: The run.
        absent: Option that names it, and where it was.

    Raises:
        RunError: Something is absent.
    """
    if absent:
        places = ", ".join(f"{path} ({option})" for option, path in absent.items())
        raise RunError(
            f"{run.folder}: not there, or not readable from here: {places}; if that was moved, name"
            f" where it is now with {' and '.join(absent)}, or with --config a configuration of the"
            " same data; the run's digests tell whether it is the same"
        )


def check_store(run: Run, project: Project) -> None:
    """See that the run's features are in the store, and have the store know who reads it.

    Raises:
        RunError: There is no such store.
        MissingFeaturesError: It has no features of the photos.
    """
    root = project.root
    _refuse_absent(run, {} if root.is_dir() else {"--root": str(root)})
    folder = project.vision_spec.folder(root)
    if not folder.is_dir():
        raise MissingFeaturesError(
            f"{run.folder}: the store {root} does not have the features of the photos that the run"
            f" was trained on ({folder.name})",
            Advice(
                "if they are in another store, name it with --root; else run ",
                Command("extract-vit", config=run.config_path),
            ),
        )
    run.record_use(root)


def check_same_data(run: Run, project: Project) -> None:
    """Refuse to measure a run on a split that is not the one it was trained with.

    Raises:
        RunError: The rows or the split differ from the run's, or are not there.
    """
    expected, data = run.manifest["data"], project.config.data
    absent = {
        option: path
        for option, path in (
            *(("--data-rows", path) for path in paths_in(data.rows)),
            ("--data-images", data.images),
            ("--split-file", data.split_file),
        )
        if path and not exists(path) and not glob(path)
    }
    if project.config.is_demo and not project.has_dataset:
        absent["--root"] = str(project.root)
    _refuse_absent(run, absent)
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
        RunError: A fingerprint differs, or an encoder's folder is not there.
    """
    expected, encoders = run.manifest["features"], project.config.encoders
    absent = [name for name in (encoders.vit, encoders.text) if isabs(name) and not exists(name)]
    _refuse_absent(run, {"--config": " and ".join(absent)} if absent else {})
    for name, spec in (
        ("vision", project.vision_spec),
        ("text", project.text_spec(run.config.train.k_txt)),
    ):
        if expected[name]["fingerprint"] != spec.fingerprint:
            raise RunError(
                f"{run.folder}: trained on {name} features {expected[name]['fingerprint']},"
                f" the configuration asks for {spec.fingerprint}; the encoder's files changed,"
                " or --config names another encoder"
            )
