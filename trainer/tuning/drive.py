"""A search from its features to its table: extract, run the trials, write what they found."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featstore.config import runs_folder
from featstore.encoders.presets import resolve_preset
from featstore.errors import Advice, Command, FeatstoreError, RunError, counted
from featstore.extract.extract import extract
from featstore.extract.plan import Plan
from featstore.progress import SHOWN, SILENT, Show, says, shows_work, working
from featstore.project import Project
from featstore.ray_cluster import Actors
from trainer.config import Config, config_of
from trainer.features import plan_jobs
from trainer.model.sizes import count_parameters
from trainer.run import folder as folder_of_run
from trainer.run.folder import find_run, free_name, places, run_folder
from trainer.run.tracking import check_trackers
from trainer.tuning.live import live_view, no_view
from trainer.tuning.plots import no_importance
from trainer.tuning.search_file import exists, jobs_of, known_search, open_search, start_search
from trainer.tuning.space import SearchConfig, Space, shown
from trainer.tuning.space_file import read_space
from trainer.tuning.study import Search
from trainer.tuning.table import (
    best_row,
    is_open,
    ranked,
    rows_now,
    without_folder,
    write_leaderboard,
)
from trainer.tuning.unused import unused_in_space
from trainer.tuning.workers import Watched, run_workers
from trainer.unused import refuse_unused

if TYPE_CHECKING:
    import pandas as pd

    from trainer.api import Run
    from trainer.run.training import Reporter

View = Callable[[Search], AbstractContextManager[Callable[[Watched], None]]]


@dataclass(frozen=True)
class Places:
    """Where a search's trials run.

    Attributes:
        workers: Trials at once; None: 1, on Ray as many as fit.
        ray: Address of a Ray cluster, see `featstore.ray_cluster.connect`; None: this machine.
        num_gpus, num_cpus: Of a worker on Ray.
    """

    workers: int | None = None
    ray: str | None = None
    num_gpus: float | None = None
    num_cpus: float | None = None


@dataclass
class Outcome:
    """How running a search ended.

    Attributes:
        watched: What was seen of the workers.
        files: The table and the plots.
        seconds: Wall time, extraction included.
        rows: What is known of each trial, see `trainer.tuning.table`.
    """

    watched: Watched
    files: list[Path] = field(default_factory=list)
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)


def plan_features(project: Project, configs: Sequence[Config], show: Show = SILENT) -> list[Plan]:
    """Say what has to be extracted before trials can start, and what it takes; change nothing.

    Args:
        project: The search's.
        configs: `Space.feature_configs`.
        show: Its notes have sizes and times, by the real encoders on this machine.

    Returns:
        What is missing, of each set of features that is not whole. Each is
        looked for once.
    """
    return plan_jobs(jobs_of(project, configs), show)


def kept_bytes(project: Project, space: Space, base: Config) -> int:
    """Return about what the weights take that a search keeps, were its largest trials the best."""
    largest = 0
    for config in space.feature_configs(base):
        vision = project.with_config(config).vision_spec.architecture
        text = resolve_preset(config.encoders.text).tower("text").config
        classes = config.data.classes
        largest = max(largest, count_parameters(text, vision, config.train, classes))
    return 4 * largest * min(space.search.kept, space.trials)


@shows_work
def run_search(
    search: Search,
    project: Project,
    places: Places,
    deadline: float = float("inf"),
    stopping: Callable[[], bool] = lambda: False,
    show: Show = SILENT,
    view: View | None = None,
) -> Outcome:
    """Run a search to its end: features, trials, table.

    Args:
        search: The search, started or gone on with.
        project: Of its settings.
        places: Where its trials run.
        deadline: No trial is drawn after this `time.time()`.
        stopping: Asked all the time; True has the workers save and end.
        show: How extraction is shown.
        view: Shows the trials while they run; None: as `show` does.

    Raises:
        StoppedError: `stopping` said so; the running trials are saved.
        RunError: Workers die without getting anywhere.
        UsageError: The Ray cluster cannot be used.
    """
    started = time.time()
    with _tensorflow_quiet():
        for plan in plan_features(project, search.space.feature_configs(search.base), show):
            extract(plan.job, show)
    project.forget_encoders()
    view = view or (no_view if show.silent else live_view)
    with view(search) as watch:
        if places.ray is None:
            watched = run_workers(search, places.workers or 1, deadline, stopping, watch)
        else:
            from trainer.tuning.ray import run_on_ray

            actors = Actors(places.workers, places.num_gpus, places.num_cpus)
            watched = run_on_ray(places.ray, search, actors, deadline, stopping, watch, show.note)
    search.drop_weights()
    with working("drawing the plots"):
        rows = rows_now(search)
        files = write_leaderboard(search, rows)
    if why := no_importance(search, rows):
        show.note(why)
    return Outcome(watched, files, time.time() - started, rows)


@contextlib.contextmanager
def _tensorflow_quiet() -> Iterator[None]:
    """Each boundary has a graph of its own, which TensorFlow would warn of as one traced again."""
    logger = logging.getLogger("tensorflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class SearchResults:
    """A search, and what it found; see `search` and `load_search`.

    Attributes:
        search: The search: its space and its study.
        outcome: How running it ended; None where it was only opened.
    """

    def __init__(self, search: Search, outcome: Outcome | None = None) -> None:
        self.search, self.outcome = search, outcome
        self.name, self.folder = search.name, search.folder

    def __repr__(self) -> str:
        try:
            rows, best = self.rows(), self.best
        except FeatstoreError as error:
            # A debugger shows it too: it must not raise.
            return f"<Search {str(self.folder)!r}: damaged: {error.message}>"
        ended = sum(not is_open(row) for row in rows)
        found = ""
        if best is not None:
            params = ", ".join(f"{key} {shown(value)}" for key, value in best["params"].items())
            metric = self.search.space.search.metric
            found = f", best {metric} {best['value']:.4f} ({best['run']}: {params})"
        trials = counted(self.search.space.trials, "trial")
        return f"<Search {str(self.folder)!r}: {ended} of {trials}{found}>"

    def rows(self) -> list[dict[str, Any]]:
        """Return what is known of each trial, the best first; see `trainer.tuning.table`."""
        return ranked(self.search, rows_now(self.search))

    @property
    def trials(self) -> pd.DataFrame:
        """One line for each trial, the best first; searched settings in columns of their own."""
        import pandas as pd

        flat = [{**row, **row["params"]} for row in self.rows()]
        return pd.DataFrame(flat).drop(columns="params", errors="ignore")

    @property
    def best(self) -> dict[str, Any] | None:
        """The best complete trial; None before there is one."""
        return best_row(self.search, self.rows())

    @property
    def best_run(self) -> Run:
        """The run of the best trial.

        Raises:
            RunError: No trial is complete yet, or its run folder is gone.
        """
        from trainer.api import Run

        best = self._known_best()
        if gone := without_folder(self.search, [best]):
            again = Command("search", "best", os.fspath(self.folder), seeds=1)
            raise RunError(gone, Advice("put it back, or train it again: ", again))
        return Run(self.search.run_of(best["trial"]).folder)

    def _known_best(self) -> dict[str, Any]:
        if (best := self.best) is None:
            raise RunError(f"{self.folder}: no trial is complete yet")
        return best

    @says("drawing the page")
    def report(self, path: str | os.PathLike[str] | None = None) -> dict[str, Any]:
        """Write the search's page: one HTML file; see `trainer.tuning.report.report`.

        Args:
            path: Of the page; None: `report.html` in the search's folder.
        """
        from trainer.tuning.report import report

        return report(self.search, path)

    @shows_work
    def retrain(
        self,
        epochs: int | None = None,
        seeds: int = 1,
        split: str = "val",
        reporter: Reporter | None = None,
        show: Show = SHOWN,
    ) -> dict[str, Any]:
        """Train the best trial again, with more epochs or seeds; see `trainer.tuning.again`.

        Raises:
            RunError: No trial is complete yet.
        """
        from trainer.run.shown import reporter_of
        from trainer.tuning.again import retrain

        best = self._known_best()
        return retrain(self.search, best, epochs, seeds, split, reporter or reporter_of(show), show)


@says("reading the search")
def load_search(
    name: str | os.PathLike[str],
    runs: str | os.PathLike[str] | None = None,
    storage: str | None = None,
    *,
    config: str | os.PathLike[str] | None = None,
    root: str | os.PathLike[str] | None = None,
    images: str | os.PathLike[str] | None = None,
    rows: str | os.PathLike[str] | None = None,
    split_file: str | os.PathLike[str] | None = None,
) -> SearchResults:
    """Open a search that was started, by its name or its folder.

    Args:
        name: The name, or the folder.
        runs: Folder of the runs; None: the configuration's.
        storage: Its database, where it has one.
        config, root, images, rows, split_file: Where its data are now, if they were moved; see
            `trainer.load_run`.

    Raises:
        RunError: There is none, or its file is damaged.
        UsageError: The storage is another.
    """
    folder = Path(name)
    if not exists(folder):
        folder = run_folder(Path(runs or runs_folder(config)), os.fspath(name))
    elsewhere = places(config, root, images, rows, split_file)
    return SearchResults(open_search(folder, storage, elsewhere))


@dataclass(frozen=True)
class Meant:
    """What a search is asked to be.

    Attributes:
        project: Its rows and features.
        base: The settings that all trials share.
        space: What is varied.
        init_from: The run that each trial starts from.
        notes: What has no effect in any trial, said where a search begins.
    """

    project: Project
    base: Config
    space: Space
    init_from: folder_of_run.Run | None
    notes: tuple[str, ...] = ()


@says("reading the search")
def meant(
    config: Config | None,
    space: str | os.PathLike[str] | Mapping[str, Any] | None,
    folder: Path,
    init_from: str | None,
    search_settings: Mapping[str, Any],
    settings: Mapping[str, Mapping[str, Any]],
    dry_run: bool = False,
) -> Meant:
    """Return what a search is asked to be, by its settings or by its name alone.

    Args:
        config: The settings; None: as the search of that folder was started.
        space: A space file, its tables, or None for the reference study's.
        folder: The search's folder.
        init_from: Run that each trial starts from.
        search_settings: `[search]` settings; they win.
        settings: Section to key to value of settings that are fixed.
        dry_run: See `Project`.

    Raises:
        ConfigError: The space or a setting is wrong, or has no effect in any trial.
        RunError: There is no such search, or no such run.
    """
    source = find_run(folder.parent, init_from) if init_from else None
    notes: list[str] = []
    if config is None:
        base, varied, source = known_search(folder, search_settings)
    else:
        file = Path(space) if isinstance(space, str | os.PathLike) else space
        varied = read_space(file, search_settings, settings, config.is_demo)
        base = varied.base(config)
        if not exists(folder):
            found = unused_in_space(varied, base)
            refuse_unused(found, {**settings, "search": search_settings})
            notes = [one.line for one in found]
    project = Project(base, dry_run=dry_run, file=folder / "config.toml")
    check_trackers(base.track)
    return Meant(project, base, varied, source, tuple(notes))


@shows_work
def search(
    project: Project | None,
    space: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
    runs: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    timeout: float | None = None,
    init_from: str | None = None,
    storage: str | None = None,
    ray: str | None = None,
    num_gpus: float | None = None,
    num_cpus: float | None = None,
    stopping: Callable[[], bool] = lambda: False,
    show: Show = SHOWN,
    **settings: Any,
) -> SearchResults:
    """Search settings: many trials over one store, drawn by Optuna.

    Trials run in processes of their own, which import the main module again: a
    script calls this below `if __name__ == "__main__":`.

    Args:
        project: The rows and features; None goes on with the search of that name.
        space: What to vary: a TOML file, or its tables, such as
            `{"train": {"lr": {"log_uniform": [2e-5, 1e-4]}}}`; None: the
            reference study's.
        name: Of the search; one of that name goes on.
        runs: Folder of the runs; None: the project's.
        workers: Trials at once; None: 1, on Ray as many as fit.
        timeout: Seconds after which no trial starts; extraction counts.
        init_from: Run that every trial starts from.
        storage: Database URL for many machines; None: a journal in the folder.
        ray, num_gpus, num_cpus: A Ray cluster to run on, and a worker's part of it.
        stopping: Asked all the time; True has the workers save and end.
        show: How extraction is shown.
        settings: `[search]` settings, such as `trials=20, sampler="tpe"` (its
            seed is `search_seed`), and `[train]` settings, which are fixed.

    Raises:
        ConfigError: A setting or the space is wrong.
        UsageError: The name is taken by something else.
        StoppedError: `stopping` said so; the running trials are saved.
        RunError: Workers die without getting anywhere.
    """
    started = time.time()
    keys = {field.name for field in dataclasses.fields(SearchConfig)} - {"seed"}
    searched = {key: value for key, value in settings.items() if key in keys}
    if "search_seed" in settings:
        searched["seed"] = settings["search_seed"]
    fixed = {k: v for k, v in settings.items() if k not in searched and k != "search_seed"}
    config = None if project is None else config_of(project, **fixed)
    folders = Path(runs or runs_folder(project.file if project else None))
    name = free_name(folders, "search") if name is None else name
    folder = run_folder(folders, name)
    what = meant(config, space, folder, init_from, searched, {"train": fixed})
    for line in what.notes:
        show.note(line)
    own = what.project if project is None else project.with_config(what.base)
    found = start_search(folder, what.base, what.space, what.init_from, storage, own)
    own.save_dataset(folder)
    deadline = float("inf") if timeout is None else started + timeout
    places = Places(workers, ray, num_gpus, num_cpus)
    return SearchResults(found, run_search(found, own, places, deadline, stopping, show))
