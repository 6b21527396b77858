"""The public face: train, search, and what can be done with a run.

Long, for what is asked of a run is said in one place, each of it a few lines under its docstring.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featstore.config import runs_folder
from featstore.errors import RunError, StoppedError, UsageError
from featstore.progress import SHOWN, Show, says, showing, shows_work, working
from featstore.project import Project
from featstore.quantities import both_shares
from trainer.config import config_of
from trainer.features import extract_missing, oversample_line, prepare, rows_line
from trainer.metrics import decided
from trainer.results.score import Scorer, check_same_data, opened, project_of
from trainer.run import folder
from trainer.run.fit import fit
from trainer.run.folder import find_run, free_name, run_folder
from trainer.run.resume import check_resumable
from trainer.run.shown import reporter_of, threshold_line
from trainer.run.tracking import check_trackers
from trainer.run.training import Reporter, Training
from trainer.unused import refuse_unused, unused

if TYPE_CHECKING:
    import keras
    import pandas as pd

    from featstore.data.dataset import RowSource
    from trainer.results.explain.explain import Explanation
    from trainer.results.predict import Predictions


class Run(folder.Run):
    """A run's folder, and what can be done with the run; see `load_run`."""

    def __repr__(self) -> str:
        if not self.exists:
            return f"<Run {str(self.folder)!r}: nothing there yet>"
        try:
            manifest, metrics = self.manifest, self.metrics if self.metrics_path.exists() else None
        except RunError as error:
            # A debugger shows it too: it must not raise.
            return f"<Run {str(self.folder)!r}: damaged: {error.message}>"
        figures = ""
        if metrics is not None:
            at = decided(metrics)
            epoch = "imported" if "imported" in manifest else f"epoch {metrics['epoch']}"
            figures = f", {epoch}: val {both_shares(at)}"
        return f"<Run {str(self.folder)!r}: {manifest['status']}{figures}>"

    @functools.cached_property
    def project(self) -> Project:
        """The rows and features that the run was trained on.

        Raises:
            RunError: They changed since.
        """
        project = self.scorer.project
        check_same_data(self, project)
        return project

    @functools.cached_property
    def scorer(self) -> Scorer:
        """The run's best weights over its encoders and store, whose rows are not looked at."""
        return Scorer(self, opened(self))

    @property
    def model(self) -> keras.Model:
        """The cached model with the weights of the best epoch; see `build_cached_model`."""
        return self.scorer.model

    @shows_work
    def evaluate(
        self,
        split: str = "test",
        control: str | None = None,
        show: Show = SHOWN,
        *,
        with_controls: bool = False,
        **options: Any,
    ) -> dict[str, Any]:
        """Measure the run on a split, or on labelled rows of a file, beside its controls.

        Args:
            split: "train", "val" or "test".
            control: Measure without the picture; None: as the run was trained.
            show: How it is shown.
            with_controls: `train_control` first.
            options: `rows`, `images`, `encoding`, `cache`, `buckets`, `out`; see
                `trainer.results.evaluate.evaluate`, also for what is returned and left.
        """
        from trainer.results.evaluate import evaluate

        if with_controls:
            self.train_control(show=show)
        return evaluate(self.scorer, split, control, show, **options)

    @shows_work
    def train_control(self, reporter: Reporter | None = None, show: Show = SHOWN) -> Run:
        """Train the same run on the sentence alone, beside this one, unless that was done.

        Args:
            reporter: How the epochs are shown, and who may stop them; None: as the commands do.
            show: How the rest is shown.

        Returns:
            The run: one trained by hand with these settings, or `<name>-hypothesis-only`.

        Raises:
            UsageError: This run was itself trained without the right photos.
            StoppedError: `reporter.stopping` said so; it goes on with the next call.
        """
        from trainer.results import controls

        if (own := self.config.train.control) != "none":
            raise UsageError(f"{self.folder}: trained with {own}; a control has no controls")
        if (blind := controls.find_blind(self)) is not None:
            return Run(blind.folder, self.elsewhere)
        runs, name = controls.blind_place(self)
        settings = vars(controls.blind_config(self).train)
        source = self.source
        try:
            return train(
                self.project,
                name=name,
                runs=runs,
                init_from=source,
                reporter=reporter,
                show=show,
                **settings,
            )
        except StoppedError as error:
            raise StoppedError(f"{runs / name}: stopped; the same command goes on") from error

    @shows_work
    def compare(
        self, *others: folder.Run | str, split: str = "test", show: Show = SHOWN, **options: Any
    ) -> dict[str, Any]:
        """Compare other runs with this one, on the same rows.

        Args:
            others: Runs, their folders, or their names beside this one.
            split: "test", "val" or "train".
            show: Shows the runs done.
            options: `rows`, `images`, `encoding`, `buckets`, `draws` and `seed` of
                `trainer.results.compare.compare`, where the result is described too.
        """
        from trainer.results.compare import compare

        runs = self.folder.parent
        found = [find_run(runs, other) if isinstance(other, str) else other for other in others]
        return compare([self, *found], split, show=show, **options)

    @shows_work
    @says("drawing the page")
    def report(
        self,
        path: str | os.PathLike[str] | None = None,
        split: str | None = None,
        show: Show = SHOWN,
    ) -> dict[str, Any]:
        """Write the run's page: one HTML file; see `trainer.results.report.run_page.report`."""
        from trainer.results.report.run_page import report

        return report(self, lambda: self.scorer, path, split, show)

    @shows_work
    def explain(
        self,
        split: str = "test",
        *,
        rows: int | None = None,
        ids: Sequence[str] | str = (),
        errors: int | None = None,
        show: Show = SHOWN,
        **options: Any,
    ) -> Explanation:
        """Show what the run looks at in some rows; see `trainer.results.explain.explain.explain`.

        Args:
            split: "test", "val" or "train".
            rows: A sample of so many rows, as many right as wrong; 12 where no choice is given.
            ids: All rows of these photos.
            errors: So many errors, the most confident first.
            show: Shows the work.
            options: `file`, `images` and `encoding` of other rows; `sample` and `seed`.

        Returns:
            The rows with their arrays; `.page(path)`, `.pngs(folder)`, `.save(path)` write them.
        """
        from trainer.results.explain.explain import explain

        return explain(self.scorer, split, rows=rows, ids=ids, errors=errors, show=show, **options)

    @shows_work
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
        rows: RowSource,
        images: str | os.PathLike[str] | None = None,
        show: Show = SHOWN,
        cache: bool = True,
        encoding: str = "",
    ) -> pd.DataFrame:
        """Predict rows that need no label; see `trainer.results.predict.predict`.

        Args:
            rows: A row file, one that is open for reading bytes, or a table.
            images: Folder of the photos; None: the run's own.
            show: Shows the extraction and the scoring.
            cache: Keep the features that were missing.
            encoding: Of a row file's text; "": UTF-8, or told from the bytes.

        Returns:
            One line for each row, in their order: `Image_ID`, `Hypothesis`, `Label`
            ("entailment", "contradiction", of three classes "neutral", or missing),
            `probability_entailment` (0 to 1; of three classes that of each),
            `confidence` (probability of the label), and `reason`: why a row has none, else
            "". `attrs["metrics"]` has the metrics of the labelled rows, None without any.
        """
        return self.predictions(rows, images, show, cache, encoding).frame()

    @shows_work
    def predictions(
        self,
        rows: RowSource,
        images: str | os.PathLike[str] | None = None,
        show: Show = SHOWN,
        cache: bool = True,
        encoding: str = "",
    ) -> Predictions:
        """Predict as `predict`; return the lines one by one, the metrics and the counts."""
        from trainer.results.predict import predict

        return predict(self.scorer, rows, self.scorer.photos(images, rows), show, cache, encoding)

    @shows_work
    def predict_pair(
        self, image: str | os.PathLike[str], text: str, show: Show = SHOWN
    ) -> dict[str, Any]:
        """Ask of one photo and one sentence; see `trainer.results.predict.predict_pair`."""
        from trainer.results.predict import predict_pair

        return predict_pair(self.scorer, image, text, show)

    @shows_work
    def export(
        self,
        path: str | os.PathLike[str],
        format: str | None = None,
        *,
        split: str = "test",
        rows: int = 16,
        force: bool = False,
        show: Show = SHOWN,
    ) -> dict[str, Any]:
        """Write the run as one model from pixels; see `trainer.results.export.export.export`."""
        from trainer.results.export.export import export

        return export(self.scorer, path, format, split=split, rows=rows, force=force, show=show)


def load_run(
    name: str | os.PathLike[str],
    runs: str | os.PathLike[str] | None = None,
    *,
    config: str | os.PathLike[str] | None = None,
    root: str | os.PathLike[str] | None = None,
    images: str | os.PathLike[str] | None = None,
    rows: str | os.PathLike[str] | Sequence[str] | None = None,
    split_file: str | os.PathLike[str] | None = None,
) -> Run:
    """Open a run by its folder, or by its name in the folder of the runs.

    Where its data or its store are at another place than they were, name it: digests of the
    rows and the split, and the features' fingerprints, tell whether they are the same.

    Args:
        name: The name, or the folder.
        runs: Folder of the runs; None: the configuration's.
        config: A configuration of the same data; None: what the run recorded.
        root: Folder of the store.
        images: Folder of the photos.
        rows: Row file.
        split_file: The user's own split.

    Raises:
        RunError: There is none; the message lists the nearest names.
        ConfigError: The configuration cannot be read.
    """
    found = find_run(Path(runs or runs_folder(config)), os.fspath(name))
    return Run(found.folder, folder.places(config, root, images, rows, split_file))


@shows_work
def train(
    project: Project | folder.Run,
    *,
    name: str | None = None,
    runs: str | os.PathLike[str] | None = None,
    init_from: str | None = None,
    extract: bool = False,
    reporter: Reporter | None = None,
    show: Show = SHOWN,
    **settings: Any,
) -> Run:
    """Train the fusion head and the last layers of the encoders on a project's features.

    The photos' features must be there (`project.extract("vit")`, or `extract`);
    sentences that are missing are encoded. An unfinished run of that name goes on. A
    finished one that kept its state does with more `epochs`, or a larger
    `early_stop_patience`, and gives what these would have given from the start.

    Args:
        project: The rows and features; or a run, which goes on with its own settings but for
            those that are given.
        name: Of the run; None: from `k_txt` and the time.
        runs: Folder of the runs; None: the project's.
        init_from: Run to take the head, and shared layers of the encoders, from.
        extract: Extract missing features first.
        reporter: How the epochs are shown, and who may stop them; None: as the commands do.
        show: How the encoding of sentences is shown.
        settings: `[train]` settings, such as `k_txt=3, lr=3e-5`.

    Returns:
        The run, trained.

    Raises:
        MissingFeaturesError: A photo of the train or val split was not extracted.
        UsageError: The name is taken.
        RunError: Training diverged, or the run was started on something else.
        WriteError: A file cannot be written; the run goes on once it can.
        StoppedError: `reporter.stopping` said so; the state is saved.
    """
    if isinstance(project, folder.Run):
        known = project
        if name not in (None, known.name):
            raise UsageError(f"{known.folder}: goes on under its own name, not as {name!r}")
        name, runs = known.name, known.folder.parent
        project = opened(known) if extract else project_of(known)
        init_from = init_from or known.source
    folders = Path(runs or runs_folder(project.file))
    config = config_of(project, **settings)
    check_trackers(config.track)
    project = project.with_config(config)
    source = find_run(folders, init_from) if init_from else None
    name = free_name(folders, f"k{config.train.k_txt}") if name is None else name
    run = Run(run_folder(folders, name))
    check_resumable(run, config)
    without_effect = unused(config)
    if not run.exists:
        refuse_unused(without_effect, {"train": settings})
    for one in without_effect:
        show.note(one.line)
    project.forget_photos()
    if extract:
        extract_missing(project, config.train.k_txt, show, config.train.views)
    prepare(project, config.train.k_txt, show, views=config.train.views)
    if not project.save_dataset(run.folder):
        show.note(f"{project.root}: may not be written; the split is kept in {run.folder}")
    with run.writing():
        check_resumable(run, config)
        with working("building the model"):
            training = Training(run, project, config.train, source, reporter or reporter_of(show))
        count = training.manifest["parameters"]["trainable"]
        show.note(f"run {run.folder}: {count:,} trainable parameters")
        show.note(rows_line(training.manifest["data"]))
        if "oversample" in training.manifest:
            show.note(oversample_line(training.manifest["oversample"]))
        if line := project.cut_sentences(("train", "val"), config.train.k_txt).line():
            show.note(line)
        fit(training)
        if line := threshold_line(run.metrics):
            show.note(line)
    return run


@shows_work
def import_weights(
    file: str | os.PathLike[str],
    project: Project,
    *,
    name: str,
    runs: str | os.PathLike[str] | None = None,
    labels: str | None = None,
    k_txt: int | None = None,
    k_vit: int | None = None,
    threshold: float | None = None,
    show: Show = SHOWN,
    **settings: Any,
) -> Run:
    """Make a run of weights that were trained elsewhere; see `trainer.results.imported`.

    Args:
        file: A `.weights.h5` or `.keras` file of the reference study's model, or an export.
        project: The rows and features.
        name: Of the run.
        runs: Folder of the runs; None: the project's.
        labels: "contradiction=1" where contradiction is the file's positive class.
        k_txt: Last text layers that were trained; None: those that are not the preset's.
        k_vit: Last vision blocks that were trained, likewise.
        threshold: On the probability of entailment; None: the export's own, or swept on val.
        show: How it is shown.
        settings: `[train]` settings, such as `num_heads=12`.

    Raises:
        RunError: The file cannot be read, does not fit, or would run code.
        MissingFeaturesError: A photo of the val split was not extracted.
        UsageError: The name is taken, or an option contradicts the file.
    """
    from trainer.results.imported import import_run

    project = project.with_config(config_of(project, **settings))
    run = Run(run_folder(Path(runs or runs_folder(project.file)), name))
    import_run(
        run,
        project,
        Path(file),
        labels=labels,
        k_txt=k_txt,
        k_vit=k_vit,
        threshold=threshold,
        show=show,
    )
    return run


def evaluate(run: Run | str, split: str = "test", **options: Any) -> dict[str, Any]:
    """Measure a run on a split; see `Run.evaluate`."""
    return (run if isinstance(run, Run) else load_run(run)).evaluate(split, **options)


def compare(runs: Sequence[Run | str], split: str = "test", **options: Any) -> dict[str, Any]:
    """Compare runs on the same rows, the first being the base; see `Run.compare`."""
    from trainer.results.compare import compare

    options.setdefault("show", SHOWN)
    found = [run if isinstance(run, Run) else load_run(run) for run in runs]
    with showing(options["show"]):
        return compare(found, split, **options)


def predict(run: Run | str, rows: RowSource, **options: Any) -> pd.DataFrame:
    """Predict rows with a run; see `Run.predict`."""
    return (run if isinstance(run, Run) else load_run(run)).predict(rows, **options)


def report(
    runs: Sequence[Run | str],
    path: str | os.PathLike[str] | None = None,
    split: str = "test",
    **options: Any,
) -> dict[str, Any]:
    """Write a page that compares runs; see `trainer.results.report.compare_page`."""
    from trainer.results.report.compare_page import report_compared

    options.setdefault("show", SHOWN)
    found = [run if isinstance(run, Run) else load_run(run) for run in runs]
    with showing(options["show"]):
        return report_compared(found, path, split, **options)
