"""One run's training: its state, its verdicts on epochs, and its files.

`trainer.run.fit` has the loop that takes it from step to step.
"""

from __future__ import annotations

import csv
import functools
import io
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from featstore.encoders.framework import pinned_framework
from featstore.errors import RunError, counted
from featstore.progress import says
from featstore.project import Project
from featstore.publish import check_space, write_json, write_text
from trainer.config import LOWER_IS_BETTER, Config, TrainConfig
from trainer.features import cached_rows
from trainer.metrics import evaluate_logits, validation_figures
from trainer.resident import put_features
from trainer.run.checkpoint import (
    Progress,
    load_state,
    save_state,
    save_weights,
    start_from,
)
from trainer.run.curves import plot_learning_curves
from trainer.run.engine import Engines, variable_bytes
from trainer.run.folder import Run
from trainer.run.manifest import new_manifest
from trainer.run.optimizer import (
    averaged,
    check_length,
    cut_learning_rate,
    inner_optimizer,
    is_scheduled,
    learning_rate,
    rate_scale,
)
from trainer.run.tracking import Tracking

CURVES_SECONDS = 10.0
STATE_SECONDS = 120.0
"""Work that a kill may cost: only what takes longer to repeat is worth saving."""
FEW_VAL_ROWS = 500
"""With fewer rows of val, `metrics.json` has the interval of the threshold that they gave."""


class StepBar(Protocol):
    """What the loop tells a progress display."""

    def update(self, n: int = 1) -> Any: ...
    def set_postfix(self, **figures: Any) -> Any: ...


EpochBar = Callable[[int, int], AbstractContextManager[StepBar]]


class _Silent:
    def update(self, n: int = 1) -> None: ...
    def set_postfix(self, **figures: Any) -> None: ...


@dataclass
class Reporter:
    """How a run is shown while it goes; silent by default.

    Attributes:
        bar: Makes the progress display of an epoch from its number and steps.
        epoch: Called with the record of each finished epoch.
        stopping: Asked after each step; True saves the state and ends.
        note: Called with a line for people: from where a run goes on, why it ended early.
    """

    bar: EpochBar = lambda epoch, steps: nullcontext(_Silent())
    epoch: Callable[[dict[str, Any]], None] = lambda record: None
    stopping: Callable[[], bool] = lambda: False
    note: Callable[[str], None] = lambda line: None


def monitored(train: TrainConfig, record: dict[str, Any]) -> float:
    """Return the epoch's monitored value, turned so that higher is better."""
    value = record[train.monitor]
    if value is None:
        raise RunError(
            f"[train] monitor = {train.monitor!r} cannot be computed: the val split lacks a class"
        )
    return -float(value) if train.monitor in LOWER_IS_BETTER else float(value)


def judge(train: TrainConfig, progress: Progress, value: float) -> bool:
    """Update the plateau counters with an epoch's value.

    Args:
        train: Patience of the learning rate and of the stop.
        progress: Its counters are updated.
        value: Monitored value, higher is better.

    Returns:
        Whether the learning rate is to be cut.
    """
    if progress.improves(value):
        progress.best, progress.best_epoch = value, progress.epoch
        progress.waited = progress.waited_lr = 0
        return False
    progress.waited += 1
    progress.waited_lr += 1
    cut = progress.waited_lr >= train.reduce_lr_patience
    if cut:
        progress.waited_lr = 0
    return cut


class Training:
    """A run's training, from its settings to its files.

    Args:
        run: Where it is kept; its lock is held by the caller.
        project: Its rows and features, see `trainer.features.prepare`.
        train: Its settings.
        init_from: A run to take the head (and shared layers of the encoders) from.
        reporter: How it is shown.
        hparams: What a search chose for it, for TensorBoard's HParams tab.
        engines: Where its model comes from, and goes when it is done; None: made for it.

    Raises:
        RunError: The run was started on other rows, features or weights; or
            `init_from` or the checkpoint does not fit.
    """

    @pinned_framework()
    def __init__(
        self,
        run: Run,
        project: Project,
        train: TrainConfig,
        init_from: Run | None = None,
        reporter: Reporter | None = None,
        hparams: Mapping[str, Any] | None = None,
        engines: Engines | None = None,
    ) -> None:
        self.run, self.project, self.train_config = run, project, train
        self.config = Config.of(project.config, train)
        self.reporter = reporter or Reporter()
        self.hparams = hparams
        self.started = self._drawn = self._saved = time.perf_counter()
        self.rows = cached_rows(project, train, "train", train.control, trained_on=True)
        check_length(train, len(self.rows.epoch(train.batch_size, train.seed, 0)))
        self.val_rows = cached_rows(project, train, "val", train.control)
        splits = {"train": self.rows, "val": self.val_rows}
        self.features_on = put_features(project, train.features_on, splits)
        row_shape = project.images().row_shape
        self.engines = engines or Engines(kept=0)
        text = project.text_spec(train.k_txt).fingerprint
        vision = project.vision_spec.fingerprint
        self.engine = self.engines.take(self.config, row_shape, text, vision)
        self.model, self.optimizer = self.engine.model, self.engine.optimizer
        self.initialised: list[str] = []
        if init_from is not None:
            weights = self.engines.starting_weights(init_from)
            self.initialised = start_from(self.model, init_from, weights)
        self.progress = Progress()
        self._source = None if init_from is None else str(init_from.folder.resolve())
        self.manifest = self._manifest(row_shape)
        if run.checkpoint_path.exists():
            self._check_same_start()
            self.progress = load_state(run.checkpoint_path, self.model, self.optimizer)
        self._earlier_seconds = self.progress.total_seconds
        self._tracking = Tracking(self.config, run, self.manifest, hparams, self.reporter.note)

    def _manifest(self, row_shape: tuple[int, int]) -> dict[str, Any]:
        manifest = new_manifest(
            self.run.name, self.project, self.train_config, self.model, row_shape
        )
        return {
            **manifest,
            "init_from": self._source,
            "initialised_layers": self.initialised,
            "features_on": self.features_on,
            **self.rows.emphasis.recorded,
        }

    def _check_same_start(self) -> None:
        """Refuse to go on with other inputs than those that the run was started with."""
        found, expected = self.manifest, self.run.manifest
        for what, ours, theirs in (
            ("rows", found["data"]["rows_digest"], expected["data"]["rows_digest"]),
            ("split", found["data"]["splits_digest"], expected["data"]["splits_digest"]),
            ("features", found["features"], expected["features"]),
            ("buckets", found.get("oversample"), expected.get("oversample")),
            ("--init-from", self._source, self.run.source),
            ("Keras backend", found["backend"], expected["backend"]),
        ):
            if ours != theirs:
                raise RunError(
                    f"{self.run.folder}: cannot go on: the {what} changed since the run was started"
                    f" (expected {theirs}, found {ours}); restore it, or choose another --name"
                )

    def _write_config(self) -> None:
        self.run.write_config(self.config)

    def _write_manifest(self, status: str) -> None:
        self.manifest["status"] = status
        self.manifest["wall_seconds"] = {
            "total": round(self._total_seconds(), 3),
            "training": round(sum(r["seconds"] for r in self.progress.history), 3),
            "validation": round(sum(r["val_seconds"] for r in self.progress.history), 3),
        }
        self.run.write_manifest(self.manifest)

    def _total_seconds(self) -> float:
        return self._earlier_seconds + time.perf_counter() - self.started

    def begin(self) -> None:
        """Write what a run's folder holds from the start.

        Raises:
            WriteError: The disk refuses, or has no room for what the run will hold.
        """
        self._check_space()
        # A run's settings are there before it is; those of one that goes on for longer
        # change once it is no longer called finished.
        writes = [self._write_config, lambda: self._write_manifest("running")]
        for write in reversed(writes) if self.run.exists else writes:
            write()
        self.run.record_use(self.project.root)
        self._tracking.begin(self.progress.history)
        if self._source is not None and "logit" not in self.initialised:
            self.reporter.note(
                f"{self._source}: of another number of classes: layer logit is not taken from it"
            )
        if self.progress.epoch or self.progress.step:
            self.reporter.note(f"{self.run.folder}: {self._where_it_goes_on()}")
        if self.progress.history:
            # A kill may have come after the state was saved and before its reports were.
            self._write_reports()

    def _check_space(self) -> None:
        """See that the disk holds the best weights and the state, and either once more."""
        run = self.run
        weights = sum(variable_bytes(v) for v in self.model.variables)
        state = sum(
            variable_bytes(v) for v in (*self.model.trainable_variables, *self.optimizer.variables)
        )
        there = sum(p.stat().st_size for p in (run.weights_path, run.checkpoint_path) if p.exists())
        check_space(run.folder, max(0, weights + state - there) + max(weights, state))

    def _where_it_goes_on(self) -> str:
        progress, train = self.progress, self.train_config
        if self.finished:
            return f"all of it was trained, {counted(progress.epoch, 'epoch')}"
        after = f" after step {progress.step}" if progress.step else ""
        return f"goes on with epoch {progress.epoch + 1} of {train.epochs}{after}"

    @says("writing the run")
    def end(self, status: str) -> None:
        """Write what a run's folder holds at the end.

        Of a finished run the state goes, unless it is to be kept; of one that ends by an
        error, the state that was saved last stays.
        """
        self._draw_curves()
        progress, train = self.progress, self.train_config
        if status == "finished":
            if train.keep_state:
                self.save()
            self.manifest["ended"] = progress.ended(train)
            if progress.ended(train) == "early stop" and progress.epoch < train.epochs:
                self.reporter.note(
                    f"early stop after epoch {progress.epoch} of {train.epochs}: {train.monitor}"
                    f" has not improved for {counted(progress.waited, 'epoch')}, since epoch"
                    f" {progress.best_epoch + 1}"
                )
        self._write_manifest(status)
        self._tracking.end(status, progress.history, progress.best_epoch)
        if status == "finished" and not train.keep_state:
            self.run.checkpoint_path.unlink(missing_ok=True)

    def release(self) -> None:
        """Let other runs have the model; this one must not touch it any more."""
        self.engines.give_back(self.engine)

    @property
    def finished(self) -> bool:
        """Whether no epoch is left to run."""
        return bool(self.progress.ended(self.train_config))

    def schedule(self, steps: int) -> None:
        """Set the learning rate of the next step, where it changes from step to step.

        Args:
            steps: Of the epoch.
        """
        if is_scheduled(self.train_config):
            done = self.progress.epoch + self.progress.step / steps
            inner_optimizer(self.optimizer).rate_scale = rate_scale(self.train_config, done)

    def collect(self, losses: Sequence[tuple[Any, int]], seconds: float) -> None:
        """Take over the losses of some steps.

        Args:
            losses: Mean loss, still on the device, and rows of each step.
            seconds: Wall time of these steps.

        Raises:
            RunError: A loss is not finite.
        """
        for loss, rows in losses:
            self.progress.loss_sum += float(loss) * rows
            self.progress.rows += rows
        self.progress.seconds += seconds
        self._check_finite(self.progress.loss_sum, "the loss")

    def end_epoch(
        self, steps: int, logits: NDArray[np.float32], wait_seconds: float, val_seconds: float
    ) -> None:
        """Judge an epoch by the logits of the val split and keep everything about it.

        Raises:
            RunError: A logit is not finite.
        """
        train, progress = self.train_config, self.progress
        self._check_finite(float(np.abs(logits).max()), "a val logit")
        metrics = evaluate_logits(self.val_rows.labels, logits)
        record = {
            "epoch": progress.epoch + 1,
            "steps": steps,
            "lr": learning_rate(self.optimizer),
            "loss": progress.loss_sum / progress.rows,
            **validation_figures(metrics),
            "threshold": metrics["threshold"],
            "seconds": round(progress.seconds, 3),
            "wait_share": round(wait_seconds / progress.seconds, 4) if progress.seconds else 0.0,
            "val_seconds": round(val_seconds, 3),
        }
        value = monitored(train, record)
        if progress.improves(value):
            # First: where they cannot be written, the best epoch is still the one before.
            with averaged(self.model, self.optimizer):
                save_weights(self.run, self.model)
            progress.best_metrics = metrics | self._threshold_interval(logits)
        cut = judge(train, progress, value)
        if cut and train.lr_schedule == "plateau":
            cut_learning_rate(self.optimizer, train.reduce_lr_factor, train.min_lr)
        progress.history.append(record)
        progress.epoch, progress.step = progress.epoch + 1, 0
        progress.loss_sum, progress.rows, progress.seconds = 0.0, 0, 0.0
        if self.state_is_due and not self.finished:
            self.save()
        self._write_reports()
        self._tracking.epoch(record)
        self.reporter.epoch(record)

    def _threshold_interval(self, logits: NDArray[np.float32]) -> dict[str, Any]:
        """Return how far τ could lie from where it is, where few rows decide it."""
        rows = self.val_rows
        if len(rows) >= FEW_VAL_ROWS or logits.ndim > 1:
            return {}
        from trainer.statistics import Clustered, threshold_interval

        images = Clustered(rows.image_positions)
        return {"threshold_interval": threshold_interval(rows.labels, logits, images)}

    def _check_finite(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            raise RunError(
                f"{self.run.name}: {what} is {value} in epoch {self.progress.epoch + 1}; training"
                " diverged: try a smaller --lr, or a --clipnorm, under another --name"
            )

    @property
    def state_is_due(self) -> bool:
        """Whether so much was done since the state was saved that it should be again."""
        return time.perf_counter() - self._saved > STATE_SECONDS

    def save(self) -> None:
        """Save the state between two steps."""
        self._saved = time.perf_counter()
        self.progress.total_seconds = self._total_seconds()
        save_state(self.run.checkpoint_path, self.model, self.optimizer.variables, self.progress)

    def _write_reports(self) -> None:
        run, history = self.run, self.progress.history
        text = io.StringIO(newline="")
        # A run that an older version began has fewer columns in its first epochs.
        columns = dict.fromkeys(name for record in history for name in record)
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        write_text(run.history_path, text.getvalue())
        write_json(
            run.metrics_path,
            {
                "split": "val",
                "epoch": self.progress.best_epoch + 1,
                "monitor": self.train_config.monitor,
                "control": self.train_config.control,
                **self.progress.best_metrics,
            },
        )
        # Drawing takes longer than a small model's epoch.
        if time.perf_counter() - self._drawn > CURVES_SECONDS:
            self._draw_curves()
        self._write_manifest("running")

    def _draw_curves(self) -> None:
        labels = self.val_rows.labels
        draw = functools.partial(
            plot_learning_curves,
            list(self.progress.history),
            self.run.curves_path,
            monitor=self.train_config.monitor,
            title=self.run.name,
            shares=(np.bincount(labels) / len(labels)).tolist(),
            cuts=not is_scheduled(self.train_config),
        )
        if self.progress.history:
            # The next trial does not wait for the picture of this one.
            draw() if self.hparams is None else _drawing().submit(draw)
        self._drawn = time.perf_counter()


@functools.cache
def _drawing() -> ThreadPoolExecutor:
    """Return the thread that draws; the process ends when it has drawn all."""
    return ThreadPoolExecutor(1, "drawing")


def wait_for_pictures() -> None:
    """Return once the pictures of all trials that have ended are drawn."""
    _drawing().submit(lambda: None).result()
