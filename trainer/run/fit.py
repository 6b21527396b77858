"""The training loop: steps and epochs of one run, or of several in one pass over the store.

With k_txt and k_vit 0 a step is so short that reading, widening and multiplying its features is a
part worth sharing. Runs that see the same batches can therefore be trained
together; each ends with what it would have reached alone, but for the last digits
(`trainer.model.together`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.encoders.framework import pinned_framework
from featstore.errors import RunError, StoppedError, UsageError, WriteError
from featstore.progress import working
from trainer.config import DECIDE_BATCHES
from trainer.prefetch import Prefetcher
from trainer.run.optimizer import averaged
from trainer.run.step import Stepper, predict_logits
from trainer.run.training import Training

LOSS_EVERY_STEPS = 50


def fit(training: Training) -> dict[str, Any]:
    """Train a run to its end and return the metrics of the best epoch.

    Ends after `epochs`, or when the monitored metric has not improved for
    `early_stop_patience` epochs. The state is saved every two minutes and when
    asked to stop; a later call with a new `Training` goes on from there, or from
    the start, and gives what one uninterrupted call gives.

    Raises:
        RunError: The loss is no longer finite.
        WriteError: A file cannot be written; a later call goes on from the last state saved.
        StoppedError: `reporter.stopping` said so; the state is saved.
    """
    (failure,) = train_together([training])
    if failure is not None:
        raise failure
    return training.run.metrics


def check_same_batches(trainings: Sequence[Training]) -> None:
    """Refuse to train runs together whose steps read different batches.

    Raises:
        UsageError: They differ in one of the settings that decide the batches,
            or a layer of an encoder trains.
    """
    first = trainings[0]
    if len(trainings) > 1 and (first.train_config.k_txt or first.train_config.k_vit):
        raise UsageError("runs can be trained together with k_txt 0 and k_vit 0 only")
    for training in trainings[1:]:
        for name in ("k_txt", "k_vit", *DECIDE_BATCHES):
            ours, theirs = getattr(training.train_config, name), getattr(first.train_config, name)
            if ours != theirs:
                raise UsageError(
                    f"{training.run.name} cannot be trained together with {first.run.name}:"
                    f" [train] {name} is {ours!r} and {theirs!r}"
                )
        if training.manifest["data"] != first.manifest["data"] or (
            training.manifest["features"] != first.manifest["features"]
        ):
            raise UsageError(
                f"{training.run.name} cannot be trained together with {first.run.name}:"
                " they read different rows or features"
            )


@pinned_framework()
def train_together(trainings: Sequence[Training]) -> list[Exception | None]:
    """Train runs to their ends, sharing each batch among those that stand at the same step.

    A run that was stopped earlier, and so stands elsewhere, catches up first.

    Args:
        trainings: One run, or several that read the same batches. The caller
            holds their locks.

    Returns:
        For each run the exception that ended it, or None. A loss that is no
        longer finite, or an exception of a run's own `reporter.epoch`, ends
        that run alone.

    Raises:
        UsageError: The runs read different batches.
        WriteError: A file cannot be written, which is no run's own fault; each goes on
            from the last state saved.
        StoppedError: A run's `reporter.stopping` said so; all states are saved.
    """
    check_same_batches(trainings)
    failures: dict[int, Exception] = {}
    going = list(trainings)
    members: list[Training] = []
    try:
        for training in trainings:
            training.begin()
        while True:
            for training in list(going):
                if id(training) in failures or training.finished:
                    going.remove(training)
                    training.end("stopped" if id(training) in failures else "finished")
            if not going:
                break
            rearmost = min(position(training) for training in going)
            standing = [training for training in going if position(training) == rearmost]
            if members != standing:
                members = standing
                stepper = members[0].engines.stepper([t.engine for t in members])
            _run_epoch(members, stepper, failures)
    except BaseException:
        for training in going:
            # The first error is the one to be read, whatever its end meets.
            with contextlib.suppress(Exception):
                training.end("stopped")
        raise
    return [failures.get(id(training)) for training in trainings]


def position(training: Training) -> tuple[int, int]:
    """Return where a run stands: epoch and step."""
    return training.progress.epoch, training.progress.step


def _run_epoch(
    trainings: Sequence[Training], stepper: Stepper, failures: dict[int, Exception]
) -> None:
    """Run the rest of an epoch and judge it; what ends a single run goes to `failures`."""
    first = trainings[0]
    train = first.train_config
    steps = first.rows.epoch(train.batch_size, train.seed, first.progress.epoch)
    wait_seconds = _take_steps(trainings, stepper, steps, failures)
    if all(id(training) in failures for training in trainings):
        return
    with working(f"epoch {first.progress.epoch + 1}: measuring val"):
        stepper.sync()
        _end_epoch(trainings, stepper, len(steps), wait_seconds, failures)


def _end_epoch(
    trainings: Sequence[Training],
    stepper: Stepper,
    steps: int,
    wait_seconds: float,
    failures: dict[int, Exception],
) -> None:
    """Measure val with the weights that stand, and judge the epoch."""
    first = trainings[0]
    train = first.train_config
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        for training in trainings:
            stack.enter_context(averaged(training.model, training.optimizer))
        logits = predict_logits(stepper, first.val_rows, train.batch_size)
    # Of the averages, and of a learning rate that may be cut.
    stepper.forget()
    val_seconds = time.perf_counter() - started
    for training, own in zip(trainings, logits, strict=True):
        if id(training) in failures:
            continue
        try:
            training.end_epoch(steps, own, wait_seconds, val_seconds)
        except WriteError:
            raise
        except Exception as error:
            failures[id(training)] = error


def _take_steps(
    trainings: Sequence[Training],
    stepper: Stepper,
    steps: list[NDArray[np.int64]],
    failures: dict[int, Exception],
) -> float:
    """Take the rest of an epoch's steps; return the time spent waiting for data."""
    first = trainings[0]
    rest = steps[first.progress.step :]
    pending: list[tuple[list[Any], int]] = []
    since_collect = time.perf_counter()

    def collect() -> None:
        nonlocal since_collect
        losses = [(np.asarray(loss), rows) for loss, rows in pending]
        pending.clear()
        now = time.perf_counter()
        for i, training in enumerate(trainings):
            try:
                training.collect([(loss[i], rows) for loss, rows in losses], now - since_collect)
            except RunError as error:
                failures.setdefault(id(training), error)
        since_collect = now

    def save() -> None:
        stepper.sync()
        for training in trainings:
            if id(training) not in failures:
                training.save()

    with (
        Prefetcher(first.rows, rest, first.train_config.batch_size) as batches,
        first.reporter.bar(first.progress.epoch + 1, len(steps)) as bar,
    ):
        bar.update(first.progress.step)
        for batch in batches:
            for training in trainings:
                training.schedule(len(steps))
            pending.append((stepper.train(batch), len(batch.rows)))
            for training in trainings:
                training.progress.step += 1
            bar.update()
            if len(pending) >= LOSS_EVERY_STEPS:
                collect()
                if all(id(training) in failures for training in trainings):
                    break
                bar.set_postfix(loss=f"{first.progress.loss_sum / first.progress.rows:.4f}")
                if any(training.state_is_due for training in trainings):
                    save()
            if any(training.reporter.stopping() for training in trainings):
                collect()
                save()
                raise StoppedError(
                    f"{first.run.name}: stopped in epoch {first.progress.epoch + 1} after step"
                    f" {first.progress.step} of {len(steps)}; the same command with"
                    f" --name {first.run.name} goes on"
                )
        collect()
        bar.set_postfix(loss=f"{first.progress.loss_sum / max(first.progress.rows, 1):.4f}")
        return batches.wait_seconds
