"""The trials of a search: take, train, prune, record how each ended."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from featstore.errors import FeatstoreError, RunError, StoppedError, WriteError
from featstore.publish import check_space
from featstore.settings import toml_value
from trainer.config import DECIDE_BATCHES
from trainer.run.folder import Run
from trainer.tuning.memory import anonymous_bytes
from trainer.tuning.search_file import open_search
from trainer.tuning.study import Claim, Search

if TYPE_CHECKING:
    from featstore.project import Project
    from trainer.run.engine import Engines
    from trainer.run.training import Training


OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"


def work(
    search: Search,
    project: Project,
    stopping: Callable[[], bool] = lambda: False,
    deadline: float = float("inf"),
    growth: float = float("inf"),
) -> bool:
    """Run trials until none is left.

    Args:
        search: The search.
        project: Of its settings.
        stopping: Asked after each step; True saves the running trials' state
            and ends. They are gone on with by whoever comes next.
        deadline: No trial is drawn after this `time.time()`.
        growth: End when this process holds as many times the memory that it
            held after its first trials; the framework keeps some of each.

    Returns:
        Whether it ended because of `growth`.

    Raises:
        StoppedError: `stopping` said so.
        WriteError: A file cannot be written. The running trials are left as they were
            last saved, for whoever comes when there is space.
    """
    from trainer.run.engine import Engines

    first_bytes = 0
    configs = search.space.feature_configs(search.base)
    heads_alone = any(not (c.train.k_txt or c.train.k_vit) for c in configs)
    limit = search.space.search.group_size if heads_alone else 1
    engines = Engines()
    while not stopping():
        # What is drawn, counted and told must be written too.
        check_space(search.folder, 0)
        claims = search.claim(limit, lambda: time.time() < deadline)
        if not claims:
            return False
        try:
            for group in _groups(search, claims):
                _run_trials(search, group, project, stopping, engines)
        finally:
            for claim in claims:
                claim.held.close()
        # Kept models are no growth: they are few.
        held = max(0, anonymous_bytes() - engines.bytes)
        first_bytes = first_bytes or held
        if held > growth * first_bytes > 0:
            return True
    raise StoppedError(f"{search.name}: stopped")


def _groups(search: Search, claims: Sequence[Claim]) -> list[list[Claim]]:
    """Put trials together that read the same batches."""
    groups: dict[Any, list[Claim]] = {}
    for claim in claims:
        config = search.config_of(claim.trial.params)
        train = config.train
        key: Any = claim.trial.number
        # One that ended its process before runs alone: it may do so again.
        if train.k_txt == train.k_vit == 0 and not claim.trial.user_attrs["attempts"][1]:
            deciding = [getattr(train, name) for name in DECIDE_BATCHES]
            key = (config.encoders, config.store, toml_value(deciding))
        groups.setdefault(key, []).append(claim)
    return list(groups.values())


def _run_trials(
    search: Search,
    claims: Sequence[Claim],
    project: Project,
    stopping: Callable[[], bool],
    engines: Engines,
) -> None:
    """Train trials in one pass over the store, and tell the study how each ended."""
    from trainer.run.fit import train_together

    trials: list[_Trial] = []
    again: list[Claim] = []
    started = False
    try:
        for claim in claims:
            trial = _Trial(search, claim, len(claims))
            if trial.starts(project, stopping, engines):
                trials.append(trial)
        started = True
        failures = train_together([trial.training for trial in trials]) if trials else []
    except (StoppedError, WriteError):
        for trial in trials:
            trial.leave()
        raise
    except Exception as error:
        if not started:
            # Of the study, not of a training: told of no trial, they would be taken for ever.
            raise
        failures = [error] * len(trials)
        if len(trials) > 1:
            # Of their shared step, such as the memory of all of them: each may do alone.
            again = [trial.claim for trial in trials if not trial.pruned]
    for trial, failure in zip(trials, failures, strict=True):
        if trial.claim in again:
            trial.training.release()
        else:
            trial.tell(failure)
    trials.clear()
    for claim in again:
        count_attempt(claim.trial, -1)
        _run_trials(search, [claim], project, stopping, engines)


class _Trial:
    """A claimed trial: from its settings to what the study is told.

    Args:
        search: The search.
        claim: The trial and its run.
        together: Trials that share its passes over the store, itself included.
    """

    training: Training

    def __init__(self, search: Search, claim: Claim, together: int) -> None:
        self.search, self.claim = search, claim
        self.trial, self.run = claim.trial, claim.run
        self.trial.set_user_attr("together", together)

    def starts(self, project: Project, stopping: Callable[[], bool], engines: Engines) -> bool:
        """Make or restore the trial's training; what hinders it is told at once."""
        from trainer.features import prepare
        from trainer.run.training import Reporter, Training

        trial, search = self.trial, self.search
        trial.set_user_attr("worker", f"{socket.gethostname()} {os.getpid()}")
        count_attempt(trial, 1)
        try:
            config = search.config_of(trial.params)
            own = project.with_config(config)
            prepare(own, config.train.k_txt, views=config.train.views)
            reporter = Reporter(epoch=self._epoch, stopping=stopping)
            self.training = Training(
                self.run, own, config.train, search.init_from, reporter, trial.params, engines
            )
            trial.set_user_attr("began", time.time() - self.training.progress.total_seconds)
            known = self._found().intermediate_values
            history = self.training.progress.history
            for record in history:
                # The process may have died between saving an epoch and reporting it,
                if record["epoch"] not in known:
                    self._report(record)
            if history and not self.training.finished:
                # or between that and its judgement.
                self._prune(history[-1])
        except WriteError:
            self.leave()
            raise
        except Exception as error:
            self.tell(error)
            return False
        return True

    def _epoch(self, record: dict[str, Any]) -> None:
        self._report(record)
        self._prune(record)

    def _report(self, record: dict[str, Any]) -> None:
        metric = self.search.space.search.metric
        if record[metric] is None:
            raise RunError(f"{metric} cannot be computed: the val split lacks a class")
        self.trial.set_user_attr("memory_bytes", anonymous_bytes())
        self.trial.report(record[metric], record["epoch"])

    def _prune(self, record: dict[str, Any]) -> None:
        epochs = self.training.train_config.epochs
        if record["epoch"] < epochs and self.trial.should_prune():
            # Told here: the trials that share its passes may be stopped before they end.
            self._keep_figures()
            self.search.study.tell(self.trial, state=TrialState.PRUNED)
            raise optuna.TrialPruned

    def _found(self) -> FrozenTrial:
        """Return the trial as the storage has it."""
        return self.search.study.get_trials(deepcopy=False)[self.trial.number]

    @property
    def pruned(self) -> bool:
        """Whether it was told as pruned already."""
        return self._found().state == TrialState.PRUNED

    def _keep_figures(self) -> dict[str, Any]:
        """Keep the figures of the best epoch with the trial; return its record."""
        progress = self.training.progress
        record = dict(progress.history[progress.best_epoch])
        self.trial.set_user_attr("best_epoch", record["epoch"])
        self.trial.set_user_attr("seconds", self.training.manifest["wall_seconds"]["total"])
        for name in ("val_loss", "val_accuracy", "val_macro_f1", "val_auc", "threshold"):
            self.trial.set_user_attr(name, record[name])
        return record

    def tell(self, failure: Exception | None) -> None:
        """Tell the study how the trial ended, and let go of it."""
        if self.pruned:
            _set_status(self.run, "pruned")
        elif failure is not None:
            _set_status(self.run, "failed")
            if hasattr(self, "training"):
                seconds = self.training.manifest["wall_seconds"].get("total")
                self.trial.set_user_attr("seconds", seconds)
            self.search.fail(self.claim, _reason(failure).removeprefix(f"{self.run.name}: "))
        else:
            record = self._keep_figures()
            self.search.study.tell(self.trial, record[self.search.space.search.metric])
        self.claim.held.close()
        self.search.drop_weights()
        if hasattr(self, "training"):
            self.training.release()

    def leave(self) -> None:
        """Let a stopped trial be gone on with: its end was not its own."""
        # A full disk may refuse this too; the trial can then be started once less.
        with contextlib.suppress(WriteError):
            if self.pruned:
                _set_status(self.run, "pruned")
            else:
                count_attempt(self.trial, -1)


def count_attempt(trial: optuna.Trial, by: int) -> None:
    """Count a trial's starts since its last epoch; one that ends its process again is given up."""
    epochs, attempts = trial.user_attrs["attempts"]
    trial.set_user_attr("attempts", [epochs, attempts + by])


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, FeatstoreError):
        return lines[0]
    kind = type(error).__name__
    # TensorFlow has a class for it, JAX and XLA's runtime a word.
    words = f"{kind} {lines[0]}"
    if isinstance(error, MemoryError) or "ResourceExhausted" in words or OUT_OF_MEMORY in words:
        return f"out of memory: {lines[0]}"
    return f"{kind}: {lines[0]}"


def _set_status(run: Run, status: str) -> None:
    # One that is damaged may be why the trial ended.
    with contextlib.suppress(RunError):
        if run.exists:
            run.write_manifest({**run.manifest, "status": status})


def work_in(
    folder: Path,
    url: str | None,
    stopping: Callable[[], bool],
    deadline: float,
    growth: float = float("inf"),
) -> bool:
    """Open a search and run its trials, see `work`: what a worker process does.

    Raises:
        RunError, UsageError: The search cannot be opened, or there is no device to compute on.
        StoppedError: `stopping` said so.
    """
    from featstore.encoders.framework import open_device
    from featstore.project import Project

    search = open_search(folder, url)
    # What this machine lacks must not end one trial after the other.
    open_device()
    project = Project(search.base, file=folder / "config.toml")
    project.save_dataset(folder)
    return work(search, project, stopping, deadline, growth)
