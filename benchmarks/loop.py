"""The real training loop: what it waits for data, and what it adds to the bare step."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import ratios, seconds_of, spread, written
from benchmarks.sizes import STUDY, Size
from benchmarks.steps import cached_step, release
from benchmarks.synthetic import SyntheticProject
from benchmarks.tables import table
from featstore.project import Project
from trainer.config import TrainConfig
from trainer.features import prepare
from trainer.run.engine import Engines
from trainer.run.fit import fit
from trainer.run.folder import Run
from trainer.run.training import Training


def new_training(
    folder: Path,
    name: str,
    project: Project,
    train: TrainConfig,
    engines: Engines | None = None,
    hparams: dict[str, Any] | None = None,
) -> Training:
    """Return a training that starts anew under a name of its own; with `hparams`, a trial's."""
    folder = folder / "runs" / name
    folder.mkdir(parents=True)
    return Training(Run(folder), project, train, hparams=hparams, engines=engines)


def patient(size: Size, k_txt: int, epochs: int, **settings: Any) -> TrainConfig:
    """Return settings under which a run goes on to its last epoch, whatever it learns."""
    return size.train(k_txt, epochs=epochs, early_stop_patience=epochs + 1, **settings)


def _bare_seconds(step: Callable[[], Any], steps: int) -> float:
    return seconds_of(lambda: [step() for _ in range(steps)]) / steps


def measure(
    images: int = 2000,
    rows: int = 4000,
    epochs: int = 2,
    rounds: int = 3,
    size: Size = STUDY,
    scratch: str | None = None,
) -> dict[str, Any]:
    """Run the training loop with k_txt 0 over a synthetic store.

    Args:
        images: Rows of the store.
        rows: Rows of the data set; 80 % train.
        epochs: Epochs of a run; all but the first count, which traces and
            checks each row's checksum.
        rounds: Runs, each between two measurements of the bare step.
        size: Of the features.
        scratch: Folder for the store; None takes the system's temporary one.

    Returns:
        The loop's seconds a step and share of waiting by epoch, and the ratio
        to the bare step over batches that lie in memory.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        root = Path(folder)
        project, train = SyntheticProject(root, size, rows, images), patient(size, 0, epochs)
        prepare(project, train.k_txt)
        bare_step = cached_step(0, size.rows, [1], size)
        bare_step()
        step_seconds: list[float] = []
        bare_seconds: list[float] = []
        waits: list[float] = []
        first_waits: list[float] = []
        for number in range(rounds):
            before = _bare_seconds(bare_step, 20)
            training = new_training(root, f"loop-{number}", project, train)
            fit(training)
            bare = float(np.mean([before, _bare_seconds(bare_step, 20)]))
            history = training.progress.history
            first_waits.append(history[0]["wait_share"])
            for record in history[1:]:
                step_seconds.append(record["seconds"] / record["steps"])
                waits.append(record["wait_share"])
                bare_seconds.append(bare)
        release()
    return {
        "size": size.name,
        "images": images,
        "rows": rows,
        "batch_size": size.rows,
        "epochs": epochs,
        "rounds": rounds,
        "steps_an_epoch": history[0]["steps"],
        "step_seconds": spread(step_seconds, 6),
        "bare_step_seconds": spread(bare_seconds, 6),
        "loop_to_bare": ratios(step_seconds, bare_seconds, 3),
        "wait_share": spread(waits, 4),
        "first_epoch_wait_share": spread(first_waits, 4),
    }


def report(figures: dict[str, Any]) -> str:
    """Return the figures as a Markdown table."""
    head = (
        f"The training loop with k_txt 0: {figures['steps_an_epoch']} steps of"
        f" {figures['batch_size']} rows an epoch, {figures['images']:,} images,"
        f" {figures['rounds']} runs."
    )
    row = [
        written(figures["step_seconds"], " ms", 1, 1e3),
        written(figures["bare_step_seconds"], " ms", 1, 1e3),
        written(figures["loop_to_bare"], "×", 2),
        written(figures["wait_share"], " %", 1, 100),
        written(figures["first_epoch_wait_share"], " %", 1, 100),
    ]
    header = [
        "a step in the loop",
        "the bare step",
        "ratio",
        "waiting for data",
        "in the first epoch, checksums included",
    ]
    return f"{head}\n\n{table(header, [row])}"
