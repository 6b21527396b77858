"""The public face: train, search, and what can be done with a run."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featstore.progress import SHOWN, Show
from featstore.project import Project
from trainer.config import config_of
from trainer.features import prepare
from trainer.results.score import Scorer, project_of
from trainer.run import folder
from trainer.run.fit import fit
from trainer.run.folder import find_run, free_name, run_folder
from trainer.run.shown import SHOWN_REPORTER
from trainer.run.training import Reporter, Training

if TYPE_CHECKING:
    import keras
    import pandas as pd


class Run(folder.Run):
    """A run's folder, and what can be done with the run; see `load_run`."""

    def __repr__(self) -> str:
        if not self.exists:
            return f"<Run {str(self.folder)!r}: nothing there yet>"
        manifest = self.manifest
        figures = ""
        if self.metrics_path.exists():
            at = self.metrics["at_threshold"]
            figures = (
                f", epoch {self.metrics['epoch']}: val accuracy {at['accuracy']:.2%},"
                f" macro-F1 {at['macro_f1']:.2%}"
            )
        return f"<Run {str(self.folder)!r}: {manifest['status']}{figures}>"

    @functools.cached_property
    def project(self) -> Project:
        """The rows and features that the run was trained on.

        Raises:
            RunError: They changed since.
        """
        return project_of(self)

    @functools.cached_property
    def scorer(self) -> Scorer:
        """The run's best weights over its project."""
        return Scorer(self, self.project)

    @property
    def model(self) -> keras.Model:
        """The cached model with the weights of the best epoch; see `build_cached_model`."""
        return self.scorer.model

    def evaluate(
        self, split: str = "test", control: str | None = None, show: Show = SHOWN
    ) -> dict[str, Any]:
        """Measure the run on a split; see `trainer.results.evaluate.evaluate`."""
        from trainer.results.evaluate import evaluate

        return evaluate(self.scorer, split, control, show)

    def parity(
        self, split: str = "test", rows: int = 64, seed: int = 0, show: Show = SHOWN
    ) -> dict[str, Any]:
        """Compare the run with the end-to-end model; see `trainer.results.parity.check_parity`.

        Returns:
            The figures; `failure` is None where both agree.
        """
        from trainer.results.parity import check_parity

        return check_parity(self, split, rows, seed, show)[0]

    def predict(
        self,
        rows: str | os.PathLike[str] | pd.DataFrame,
        images: str | os.PathLike[str] | None = None,
        show: Show = SHOWN,
    ) -> pd.DataFrame:
        """Predict rows that need no label; see `trainer.results.predict.predict`.

        Args:
            rows: A row file or a table.
            images: Folder of the photos; None: the run's own.
            show: Shows the extraction.
        """
        from trainer.results.predict import predict

        return predict(self.scorer, rows, images or self.project.dataset.images.folder, show)


def load_run(name: str | os.PathLike[str], runs: str | os.PathLike[str] = "runs") -> Run:
    """Open a run by its folder, or by its name in the folder of the runs.

    Raises:
        RunError: There is none; the message lists the nearest names.
    """
    return Run(find_run(Path(runs), os.fspath(name)).folder)


def train(
    project: Project,
    *,
    name: str | None = None,
    runs: str | os.PathLike[str] = "runs",
    init_from: str | None = None,
    reporter: Reporter | None = None,
    show: Show = SHOWN,
    **settings: Any,
) -> Run:
    """Train the fusion head and the last text layers on a project's features.

    The photos' features must be there (`project.extract("vit")`); sentences that
    are missing are encoded. An unfinished run of that name goes on.

    Args:
        project: The rows and features.
        name: Of the run; None: from `k_txt` and the time.
        runs: Folder of the runs.
        init_from: Run to take the head, and shared text layers, from.
        reporter: How the epochs are shown, and who may stop them; None: as the commands do.
        show: How the encoding of sentences is shown.
        settings: `[train]` settings, such as `k_txt=3, lr=3e-5`.

    Returns:
        The run, trained.

    Raises:
        MissingFeaturesError: A photo of the train or val split was not extracted.
        UsageError: The name is taken.
        RunError: Training diverged, or the run was started on something else.
        StoppedError: `reporter.stopping` said so; the state is saved.
    """
    config = config_of(project, **settings)
    project = project.with_config(config)
    folders = Path(runs)
    source = find_run(folders, init_from) if init_from else None
    name = free_name(folders, f"k{config.train.k_txt}") if name is None else name
    run = Run(run_folder(folders, name))
    run.check_free_or_same(config)
    project.dataset.save()
    prepare(project, config.train.k_txt, show)
    with run.writing():
        run.check_free_or_same(config)
        training = Training(run, project, config.train, source, reporter or SHOWN_REPORTER)
        count = training.manifest["parameters"]["trainable"]
        show.note(f"run {run.folder}: {count:,} trainable parameters")
        fit(training)
    return run


def evaluate(run: Run | str, split: str = "test", **options: Any) -> dict[str, Any]:
    """Measure a run on a split; see `Run.evaluate`."""
    return (run if isinstance(run, Run) else load_run(run)).evaluate(split, **options)


def predict(
    run: Run | str, rows: str | os.PathLike[str] | pd.DataFrame, **options: Any
) -> pd.DataFrame:
    """Predict rows with a run; see `Run.predict`."""
    return (run if isinstance(run, Run) else load_run(run)).predict(rows, **options)
