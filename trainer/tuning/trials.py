"""The trials of a search: take, train, prune, record how each ended."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import TrialState

from featstore.errors import FeatstoreError, RunError, StoppedError
from trainer.config import Config
from trainer.run.folder import Run
from trainer.tuning.study import Claim, Search, open_search

if TYPE_CHECKING:
    from featstore.data.dataset import Dataset
    from trainer.features import Features
    from trainer.run.training import Training


OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"


def _count_attempt(trial: optuna.Trial, by: int) -> None:
    epochs, attempts = trial.user_attrs["attempts"]
    trial.set_user_attr("attempts", [epochs, attempts + by])


class FeaturesOf:
    """Opens the features of trials, each set once.

    Args:
        dataset: The search's rows.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self._opened: dict[Any, Features] = {}

    def __call__(self, config: Config) -> Features:
        """Return the features of a configuration; missing sentences are encoded."""
        from trainer.features import open_features

        key = (config.encoders, config.store, config.train.k_txt)
        if key not in self._opened:
            self._opened[key] = open_features(config, self.dataset)
        return dataclasses.replace(self._opened[key], config=config)


def work(
    search: Search,
    dataset: Dataset,
    stopping: Callable[[], bool] = lambda: False,
    deadline: float = float("inf"),
    growth: float = float("inf"),
) -> bool:
    """Run trials until none is left.

    Args:
        search: The search.
        dataset: Its rows.
        stopping: Asked after each step; True saves the running trials' state
            and ends. They are gone on with by whoever comes next.
        deadline: No trial is drawn after this `time.time()`.
        growth: End when this process holds as many times the memory that it
            held after its first trials; the framework keeps some of each.

    Returns:
        Whether it ended because of `growth`.

    Raises:
        StoppedError: `stopping` said so.
    """
    first_bytes = 0
    features_of = FeaturesOf(dataset)
    ks = {config.train.k_txt for config in search.space.feature_configs(search.base)}
    limit = search.space.search.group_size if 0 in ks else 1
    while not stopping():
        claims = search.claim(limit, lambda: time.time() < deadline)
        if not claims:
            return False
        try:
            for group in _groups(search, claims):
                _run_group(search, group, features_of, stopping)
        finally:
            for claim in claims:
                claim.held.close()
        first_bytes = first_bytes or anonymous_bytes()
        if anonymous_bytes() > growth * first_bytes > 0:
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
        if train.k_txt == 0 and not claim.trial.user_attrs["attempts"][1]:
            key = (config.encoders, config.store, train.seed, train.batch_size, train.control)
        groups.setdefault(key, []).append(claim)
    return list(groups.values())


def _run_group(
    search: Search,
    claims: Sequence[Claim],
    features_of: FeaturesOf,
    stopping: Callable[[], bool],
) -> None:
    """Run trials in one pass over the store and record how each ended."""
    from trainer.run.fit import train_together

    pairs: list[tuple[Claim, Training]] = []
    alone: list[Claim] = []
    for claim in claims:
        claim.trial.set_user_attr("together", len(claims))
        try:
            training = _training(search, claim, features_of, stopping)
        except Exception as error:
            _end(search, claim, error)
        else:
            pairs.append((claim, training))
    if pairs:
        try:
            failures = train_together([training for _, training in pairs])
        except StoppedError:
            for claim, _ in pairs:
                if _is_pruned(search, claim):
                    _set_status(claim.run, "pruned")
                else:
                    _count_attempt(claim.trial, -1)
            raise
        except Exception as error:
            failures = [error for _ in pairs]
            if len(pairs) > 1:
                # Of their shared step, such as the memory of all of them: each may do alone.
                alone = [claim for claim, _ in pairs if not _is_pruned(search, claim)]
        for (claim, training), failure in zip(pairs, failures, strict=True):
            if claim not in alone:
                _end(search, claim, failure, training)
    # A model refers to itself; its arrays would otherwise wait for a later collection.
    pairs.clear()
    import keras

    keras.backend.clear_session()
    gc.collect()
    for claim in alone:
        _count_attempt(claim.trial, -1)
        _run_group(search, [claim], features_of, stopping)


def _training(
    search: Search,
    claim: Claim,
    features_of: FeaturesOf,
    stopping: Callable[[], bool],
) -> Training:
    from trainer.run.training import Reporter, Training

    trial, config = claim.trial, search.config_of(claim.trial.params)
    trial.set_user_attr("worker", f"{socket.gethostname()} {os.getpid()}")
    _count_attempt(trial, 1)
    metric, epochs = search.space.search.metric, config.train.epochs

    def report(record: dict[str, Any]) -> None:
        if record[metric] is None:
            raise RunError(f"{metric} cannot be computed: the val split has one class")
        trial.set_user_attr("memory_bytes", anonymous_bytes())
        trial.report(record[metric], record["epoch"])

    def prune(record: dict[str, Any]) -> None:
        if record["epoch"] < epochs and trial.should_prune():
            # Told here: the trials that share its passes may be stopped before they end.
            _add_figures(trial, training)
            search.study.tell(trial, state=TrialState.PRUNED)
            raise optuna.TrialPruned

    def judge(record: dict[str, Any]) -> None:
        report(record)
        prune(record)

    training = Training(
        claim.run, features_of(config), search.init_from, Reporter(epoch=judge, stopping=stopping)
    )
    trial.set_user_attr("began", time.time() - training.progress.total_seconds)
    _write_hparams(claim.run, trial.params)
    known = search.study.get_trials(deepcopy=False)[trial.number].intermediate_values
    history = training.progress.history
    for record in history:
        # The process may have died between saving an epoch and reporting it,
        if record["epoch"] not in known:
            report(record)
    if history and not training.finished:
        # or between that and its judgement.
        prune(history[-1])
    return training


def _is_pruned(search: Search, claim: Claim) -> bool:
    """Tell whether a trial was recorded as pruned already."""
    found = search.study.get_trials(deepcopy=False)[claim.trial.number]
    return found.state == TrialState.PRUNED


def _end(
    search: Search, claim: Claim, failure: Exception | None, training: Training | None = None
) -> None:
    """Record how a trial ended and let go of it."""
    trial = claim.trial
    if _is_pruned(search, claim):
        _set_status(claim.run, "pruned")
    elif failure is not None or training is None:
        _set_status(claim.run, "failed")
        if training is not None:
            trial.set_user_attr("seconds", training.manifest["wall_seconds"].get("total"))
        search.fail(claim, _reason(failure).removeprefix(f"{claim.run.name}: "))
    else:
        record = _add_figures(trial, training)
        search.study.tell(trial, record[search.space.search.metric])
    claim.held.close()


def _reason(error: Exception | None) -> str:
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
    if run.exists:
        run.write_manifest({**run.manifest(), "status": status})


def _add_figures(trial: optuna.Trial, training: Training) -> dict[str, Any]:
    """Keep the figures of the best epoch with the trial; return its record."""
    progress = training.progress
    record = dict(progress.history[progress.best_epoch])
    trial.set_user_attr("best_epoch", record["epoch"])
    trial.set_user_attr("seconds", training.manifest["wall_seconds"]["total"])
    for name in ("val_loss", "val_accuracy", "val_macro_f1", "val_auc", "threshold"):
        trial.set_user_attr(name, record[name])
    return record


def _write_hparams(run: Run, params: dict[str, Any]) -> None:
    """Write a trial's settings where TensorBoard's HParams tab finds them."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.plugins.hparams import api
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    values = {k: v if isinstance(v, bool | int | float) else str(v) for k, v in params.items()}
    writer = EventFileWriter(str(run.tensorboard_path))
    summary = api.hparams_pb(values, trial_id=run.name)
    event = Event(wall_time=time.time(), step=0)
    event.summary.ParseFromString(summary.SerializeToString())
    writer.add_event(event)
    writer.close()


def anonymous_bytes(pid: int | str = "self") -> int:
    """Return the memory of a process that is its own, without mapped files; 0 where unknown."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def work_in(
    folder: Path,
    url: str | None,
    stopping: Callable[[], bool],
    deadline: float,
    growth: float = float("inf"),
) -> bool:
    """Open a search and run its trials, see `work`: what a worker process does.

    Raises:
        RunError, UsageError: The search cannot be opened.
        StoppedError: `stopping` said so.
    """
    from featstore.data.dataset import load_dataset

    search = open_search(folder, url)
    dataset = load_dataset(search.base.data, Path(search.base.store.root))
    return work(search, dataset, stopping, deadline, growth)
