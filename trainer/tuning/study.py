"""A search: many runs over one store, whose settings Optuna draws.

runs/<name>/
    search.json        the space, the search's settings, digests of rows and features
    config.toml        the settings that all trials share
    study.journal      Optuna's journal, unless another storage is used
    trial-0000/        one run folder a trial, like any other
    leaderboard.csv    every trial, the best first
    *.png              history, importance, parallel coordinates
    worker-*.log       what each worker printed

A trial belongs to the process that holds its run folder's lock. The system
takes the lock back when the process dies, on whichever machine shares the
folder; the next worker then goes on with that trial where its run was saved.
So no trial is lost, and none is counted twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from featstore.config import material
from featstore.encoders.spec import differing_fields
from featstore.errors import Advice, Command, RunError, UsageError
from featstore.extract.plan import Job
from featstore.project import Project
from featstore.publish import command_line, may_write, package_versions, write_json
from featstore.settings import complete
from featstore.store.users import record_use, user_of
from trainer.config import SECTIONS, Config
from trainer.features import read_by_training
from trainer.run.folder import SEARCH_FILE, Run, find_run, moved_run
from trainer.tuning.space import KEEP_ALL, Space, space_from_json
from trainer.tuning.storage import masked, open_storage, quiet_optuna

FORMAT = 1
# A trial that ends its worker as often as this without finishing an epoch is given up.
MOST_ATTEMPTS = 3
LONGEST_CHANGE = 80


@dataclass
class Claim:
    """A trial that this process holds.

    Attributes:
        trial: The trial, its parameters drawn.
        run: Its run folder.
        held: Holds the run folder's lock until closed.
    """

    trial: optuna.Trial
    run: Run
    held: contextlib.ExitStack


class Search:
    """One search: its folder, what it varies, and its study.

    Args:
        folder: The folder; it exists.
        base: The settings that all trials share.
        space: What is varied and how.
        init_from: Run that each trial starts from.
        url: The study's storage; None: a journal in the folder.
    """

    def __init__(
        self, folder: Path, base: Config, space: Space, init_from: Run | None, url: str | None
    ) -> None:
        self.folder, self.name = folder, folder.name
        self.base, self.space, self.init_from, self.url = base, space, init_from, url
        self.elsewhere: Mapping[str, Mapping[str, Any]] = {}
        directions = optuna.study.StudyDirection
        with quiet_optuna():
            self.storage = open_storage(folder, url)
        with self._deciding(), quiet_optuna():
            self.study = optuna.create_study(
                storage=self.storage,
                study_name=self.name,
                direction=directions.MINIMIZE if space.search.minimises else directions.MAXIMIZE,
                pruner=self._pruner(),
                load_if_exists=True,
            )
            self._check_same_study()

    def _deciding(self) -> contextlib.AbstractContextManager[Any]:
        """Hold the right to draw trials, among all workers."""
        if not may_write(self.folder):
            # It is only looked at.
            return contextlib.nullcontext()
        return filelock.FileLock(self.folder / ".lock")

    def _check_same_study(self) -> None:
        """Fill a new study; refuse a study of this name that is another search's."""
        content = json.loads(json.dumps(self.space.to_json()["parameters"]))
        known = self.study.user_attrs.get("parameters")
        if known is None:
            self.study.set_metric_names([self.space.search.metric])
            first = list(self.space.enqueue)
            if self.space.search.sampler == "grid":
                first += self.space.grid()
            # Some are there where an earlier start was killed among them.
            for values in first[len(self.study.get_trials(deepcopy=False)) :]:
                self.study.enqueue_trial(values)
            self.study.set_user_attr("folder", str(self.folder.absolute()))
            self.study.set_user_attr("parameters", content)
        elif known != content:
            raise UsageError(
                f"{self.folder}: the storage has another study named {self.name!r} (of"
                f" {self.study.user_attrs.get('folder')}); choose another --name"
            )

    def _pruner(self) -> optuna.pruners.BasePruner:
        epochs = self.base.train.epochs
        match self.space.search.pruner:
            case "median":
                return optuna.pruners.MedianPruner(n_startup_trials=4)
            case "halving":
                return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)
            case "hyperband":
                return optuna.pruners.HyperbandPruner(
                    min_resource=1, max_resource=epochs, reduction_factor=2
                )
        return optuna.pruners.NopPruner()

    def _sampler(self, ordinal: int) -> optuna.samplers.BaseSampler:
        """Return the sampler of one trial: its seed follows from the trial's place alone.

        So a study that was stopped draws what it would have drawn.
        """
        seeds = np.random.SeedSequence([self.space.search.seed, ordinal])
        seed = int(seeds.generate_state(1)[0])
        match self.space.search.sampler:
            case "tpe":
                # A trial that runs elsewhere counts as a poor one, so that nobody repeats it.
                return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
            case "cma":
                return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
        return optuna.samplers.RandomSampler(seed=seed)

    def run_of(self, number: int) -> Run:
        """Return the run of a trial."""
        return Run(self.folder / f"trial-{number:04d}", self.elsewhere)

    def drawn(self) -> list[FrozenTrial]:
        """Return the trials that were drawn; those killed while being drawn are not counted."""
        return [
            trial
            for trial in self.study.get_trials(deepcopy=False)
            if trial.state != TrialState.WAITING and not trial.user_attrs.get("void")
        ]

    @property
    def unfinished(self) -> bool:
        """Whether a trial is left to draw or to end."""
        drawn = self.drawn()
        return len(drawn) < self.space.trials or not all(t.state.is_finished() for t in drawn)

    def claim(self, limit: int, may_draw: Callable[[], bool] = lambda: True) -> list[Claim]:
        """Take trials to run: those whose process died first, then new ones.

        Args:
            limit: Most trials to take.
            may_draw: Whether a new trial may be drawn.

        Returns:
            The trials, their runs locked. None at all: nothing is left to do.
        """
        with self._deciding():
            claims = list(self._orphans(limit))
            while len(claims) < limit and may_draw():
                drawn = len(self.drawn())
                if drawn >= self.space.trials:
                    break
                claims.append(self._draw(drawn))
        return claims

    def _draw(self, ordinal: int) -> Claim:
        with quiet_optuna():
            self.study.sampler = self._sampler(ordinal)
            trial = self.study.ask({p.name: p.distribution() for p in self.space.parameters})
        run = self.run_of(trial.number)
        held = contextlib.ExitStack()
        held.enter_context(run.writing())
        trial.set_user_attr("attempts", [0, 0])
        return Claim(trial, run, held)

    def _orphans(self, limit: int) -> Iterator[Claim]:
        """Yield running trials that no process holds."""
        taken = 0
        for frozen in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if taken == limit:
                return
            held = contextlib.ExitStack()
            try:
                held.enter_context(self.run_of(frozen.number).writing())
            except RunError:
                continue
            if len(frozen.params) < len(self.space.parameters):
                self._void(frozen)
                held.close()
                continue
            trial = optuna.Trial(self.study, frozen._trial_id)
            epochs, attempts = frozen.user_attrs.get("attempts", [0, 0])
            if len(frozen.intermediate_values) > epochs:
                epochs, attempts = len(frozen.intermediate_values), 0
                trial.set_user_attr("attempts", [epochs, attempts])
            if attempts >= MOST_ATTEMPTS:
                self.fail(
                    Claim(trial, self.run_of(frozen.number), held),
                    f"its process ended {attempts} times in epoch {epochs + 1}; out of memory?",
                )
                continue
            taken += 1
            yield Claim(trial, self.run_of(frozen.number), held)

    def _void(self, frozen: FrozenTrial) -> None:
        """Give up a trial that was killed while it was drawn.

        It is drawn again under another number, with the values that it was
        given, if it is a fixed one or one of a grid.
        """
        given = frozen.system_attrs.get("fixed_params")
        others = self.study.get_trials(deepcopy=False)
        if given and not any(t.user_attrs.get("instead_of") == frozen.number for t in others):
            self.study.enqueue_trial(given, user_attrs={"instead_of": frozen.number})
        trial = optuna.Trial(self.study, frozen._trial_id)
        trial.set_user_attr("void", True)
        trial.set_user_attr("reason", "its process ended while it was drawn")
        self.study.tell(trial, state=TrialState.FAIL)

    def idle(self) -> set[int]:
        """Return the numbers of the running trials that no process is at work on."""
        found = set()
        # With the right to draw, so that no worker takes one of them for held meanwhile.
        with self._deciding():
            for frozen in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                with contextlib.suppress(RunError), self.run_of(frozen.number).writing():
                    found.add(frozen.number)
        return found

    def drop_weights(self) -> None:
        """Delete the weights of ended trials that are not among the best; see `[search] keep`.

        A trial that was passed by others stays so, so any number of workers may do this.
        """
        sign = 1 if self.space.search.minimises else -1
        ended = [t for t in self.study.get_trials(deepcopy=False) if t.state.is_finished()]
        best = sorted(
            (sign * trial.value, trial.number)
            for trial in ended
            if trial.state == TrialState.COMPLETE and trial.value is not None
        )
        kept = {number for _, number in best[: self.space.search.kept]}
        for trial in ended if self.space.search.keep != KEEP_ALL else ():
            if trial.number not in kept:
                run = self.run_of(trial.number)
                for path in (run.weights_path, run.checkpoint_path):
                    path.unlink(missing_ok=True)

    def fail(self, claim: Claim, reason: str) -> None:
        """Record a trial as failed, with the reason, and let go of it."""
        claim.trial.set_user_attr("reason", reason)
        self.study.tell(claim.trial, state=TrialState.FAIL)
        claim.held.close()

    def config_of(self, stored: Mapping[str, Any]) -> Config:
        """Return the settings of a trial's run from its parameters in the study."""
        return self.space.config(self.base, stored)


CHANGEABLE = ("trials", "together", "keep")
"""What of `[search]` may change while a search goes on."""


def _identity(
    base: Config, space: Space, init_from: Run | None, url: str | None, project: Project
) -> dict[str, Any]:
    """Return what must stay the same while a search goes on."""
    varied = space.to_json()
    varied["search"] = {
        key: value for key, value in varied["search"].items() if key not in CHANGEABLE
    }
    features = set()
    for config in space.feature_configs(base):
        own = project.with_config(config)
        features |= own.fingerprints
    content = {
        "space": varied,
        "settings": dataclasses.asdict(base),
        "init_from": None if init_from is None else str(init_from.folder.resolve()),
        "storage": None if url is None else masked(url),
        "rows": project.dataset.examples.digest(),
        "split": project.dataset.splits.digest(),
        "features": sorted(features),
    }
    return dict(json.loads(json.dumps(content)))


def jobs_of(project: Project, configs: Sequence[Config]) -> list[Job]:
    """Return what has to be in the store before trials can start, each set of features once.

    Args:
        project: The search's.
        configs: `Space.feature_configs`.
    """
    found: dict[str, Job] = {}
    for config in configs:
        own, train = project.with_config(config), config.train
        for kind, split, view in read_by_training(train.views):
            fingerprint = own.spec(kind, train.k_txt, view).fingerprint
            if fingerprint not in found:
                found[fingerprint] = own.job(kind, split, train.k_txt, view=view)
    return list(found.values())


def exists(folder: Path) -> bool:
    """Tell whether a search was started in a folder."""
    return (folder / SEARCH_FILE).exists()


def _read(folder: Path) -> dict[str, Any]:
    path = folder / SEARCH_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise RunError(f"{path}: format {content['format']}, expected {FORMAT}")
        space_from_json(content["space"])
    except FileNotFoundError as error:
        raise RunError(
            f"{folder}: no search there",
            Advice("start one with ", Command("search", name=folder.name)),
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: cannot be read ({error})") from error
    return dict(content)


def open_search(
    folder: Path,
    url: str | None = None,
    elsewhere: Mapping[str, Mapping[str, Any]] | None = None,
) -> Search:
    """Open a search that was started.

    Args:
        folder: Its folder.
        url: Its storage, where that is not the journal; a password is not kept.
        elsewhere: Where its data are now; see `Run`.

    Raises:
        RunError: There is none, or its file is damaged.
        UsageError: `url` is missing, or another one.
    """
    expected, found = _read(folder)["storage"], None if url is None else masked(url)
    if expected != found:
        raise UsageError(
            f"{folder}: its storage is {expected or 'its own journal'}; give"
            f" {'that as --storage' if expected else 'no --storage'}"
        )
    search = Search(folder, *known_search(folder, {}, elsewhere), url)
    search.elsewhere = elsewhere or {}
    return search


def start_search(
    folder: Path,
    base: Config,
    space: Space,
    init_from: Run | None,
    url: str | None,
    project: Project,
) -> Search:
    """Start a search, or go on with the one of that folder.

    Args:
        folder: Its folder; made where it is missing.
        base: The settings that all trials share.
        space: What is varied. Another number of trials than before is taken over.
        init_from: Run that each trial starts from.
        url: The study's storage; None: a journal in the folder.
        project: Of `base`.

    Raises:
        UsageError: The folder has a run, or a search of something else.
    """
    if Run(folder).exists:
        raise UsageError(f"{folder}: a run, not a search; choose another --name")
    earlier = _read(folder) if exists(folder) else None
    if earlier is not None and earlier["storage"] != (None if url is None else masked(url)):
        open_search(folder, url)  # says what is wrong
    identity = _identity(base, space, init_from, url, project)
    settings = identity["settings"]
    if earlier is not None:
        before = {key: earlier[key] for key in identity}
        if before["init_from"] is not None:
            before["init_from"] = moved_run(before["init_from"], folder.parent)
        before["settings"] = {
            name: complete(section, before["settings"].get(name, {}))
            for name, section in SECTIONS.items()
        }
        # Where things are is no part of what a search is of; digests are.
        for one in (before, identity):
            one["settings"] = material(SECTIONS, one["settings"])
        before["space"]["search"] = {
            key: before["space"]["search"][key] for key in identity["space"]["search"]
        }
        changed = differing_fields(identity, before)
        identity["settings"] = settings
        if changed:
            # Of lists, such as the whole space, the name says enough.
            told = [c if len(c) <= LONGEST_CHANGE else c.partition(":")[0] for c in changed]
            raise UsageError(
                f"{folder}: a search of something else ({'; '.join(told)})",
                Advice(
                    "choose another --name, or go on with ",
                    Command("search", name=folder.name, bare=True),
                    " and no other settings",
                ),
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        search = Search(folder, base, space, init_from, url)
    except UsageError:
        # A folder of nothing, where the storage cannot be opened.
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise
    Run(folder).write_config(base)
    about = {"format": FORMAT, "command": command_line(), "versions": package_versions()}
    place = {"folder": os.path.abspath(folder)}
    write_json(folder / SEARCH_FILE, {**about, **place, **identity, "space": space.to_json()})
    needed = [*identity["features"], identity["rows"], identity["split"]]
    record_use(project.root, user_of(folder / "config.toml"), needed)
    return search


def known_search(
    folder: Path,
    search_flags: Mapping[str, Any],
    elsewhere: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[Config, Space, Run | None]:
    """Return what a search that was started varies, under the flags that may change.

    Args:
        folder: Its folder.
        search_flags: Key to value of `[search]`.
        elsewhere: Where its data are now; see `Run`.

    Returns:
        The settings that all trials share, the space, and the run to start from.
    """
    content = _read(folder)
    space = space_from_json(content["space"])
    searched = dataclasses.replace(space.search, **search_flags)
    init_from = content["init_from"]
    if init_from:
        init_from = moved_run(init_from, folder.parent)
    source = find_run(folder.parent, init_from) if init_from else None
    return (
        Run(folder, elsewhere).config,
        dataclasses.replace(space, search=searched),
        source,
    )
