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
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from featstore.errors import Advice, RunError, UsageError, counted
from featstore.publish import may_write
from trainer.config import Config
from trainer.run.folder import Run
from trainer.tuning.space import KEEP_ALL, Space
from trainer.tuning.storage import masked, open_storage, quiet_optuna

# A trial that ends its worker as often as this without finishing an epoch is given up.
MOST_ATTEMPTS = 3


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
        with quiet_optuna():
            self.storage = open_storage(folder, url)
        with self._deciding(), quiet_optuna():
            self.study = self._opened()
            self._check_same_study()

    def _opened(self) -> optuna.Study:
        """Return the study, made where there is none of this name.

        Raises:
            RunError: There is none, though it had trials: their places would be taken anew.
        """
        directions = optuna.study.StudyDirection
        named: Any = {
            "storage": self.storage,
            "study_name": self.name,
            "pruner": self._pruner(),
        }
        # Making a study that is there would write a line at each look.
        with contextlib.suppress(KeyError):
            return optuna.load_study(**named)
        if kept := len([*self.folder.glob("trial-*")]):
            where = "study.journal" if self.url is None else masked(self.url)
            raise RunError(
                f"{self.folder}: {where} has no study {self.name!r}, though"
                f" {counted(kept, 'trial')} left a folder here",
                Advice("put it back, or move these folders away to begin anew"),
            )
        direction = directions.MINIMIZE if self.space.search.minimises else directions.MAXIMIZE
        return optuna.create_study(**named, direction=direction, load_if_exists=True)

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
            known = frozen.user_attrs.get("attempts")
            epochs, attempts = known or [0, 0]
            if len(frozen.intermediate_values) > epochs:
                epochs, attempts = len(frozen.intermediate_values), 0
            # None, where the process died, or the journal was cut, right after the draw.
            if known != [epochs, attempts]:
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

    def trained_config(self, number: int) -> Config:
        """Return the settings of a trial's run, also where its folder is gone."""
        run = self.run_of(number)
        if run.exists:
            return run.config
        return self.config_of(self.study.get_trials(deepcopy=False)[number].params)

    def config_of(self, stored: Mapping[str, Any]) -> Config:
        """Return the settings of a trial's run from its parameters in the study."""
        return self.space.config(self.base, stored)
