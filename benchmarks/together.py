"""Runs trained together, sharing each batch, against the same runs one at a time."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.loop import new_training, patient
from benchmarks.measuring import ratios, seconds_of, spread, written
from benchmarks.sizes import STUDY, Size
from benchmarks.steps import release
from benchmarks.synthetic import SyntheticProject
from benchmarks.tables import table
from trainer.features import prepare
from trainer.run.fit import fit, train_together
from trainer.run.training import Training


def measure(
    runs: int = 8,
    images: int = 1000,
    rows: int = 2000,
    epochs: int = 2,
    rounds: int = 2,
    size: Size = STUDY,
    scratch: str | None = None,
) -> dict[str, Any]:
    """Train the same runs both ways, over one store, with k_txt 0.

    Args:
        runs: How many; they differ in the learning rate.
        images: Rows of the store.
        rows: Rows of the data set; 80 % train.
        epochs: Epochs of each run.
        rounds: In each, both ways run once.
        size: Of the features.
        scratch: Folder for the store; None takes the system's temporary one.

    Returns:
        For each way the trials an hour, building and compiling included, and
        the seconds of all runs' steps of the last epoch; and their ratios.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        root = Path(folder)
        project = SyntheticProject(root, size, rows, images)
        prepare(project, 0)
        vision = project.images()
        for i in range(0, images, size.rows):  # checksums, which no run should pay alone
            vision.gather(vision.live()[i : i + size.rows])

        def trainings(name: str, numbers: range) -> list[Training]:
            made = []
            for number in numbers:
                train = patient(size, 0, epochs, lr=1e-4 * (1 + number))
                made.append(new_training(root, f"{name}-{number}", project, train))
            return made

        def last_epoch(trained: list[Training]) -> list[float]:
            return [float(training.progress.history[-1]["seconds"]) for training in trained]

        whole: dict[str, list[float]] = {"alone": [], "together": []}
        steps: dict[str, list[float]] = {"alone": [], "together": []}
        for number in range(rounds):
            ended: list[Training] = []

            def alone(name: str = f"alone-{number}", ended: list[Training] = ended) -> None:
                for run in range(runs):
                    (training,) = trainings(name, range(run, run + 1))
                    fit(training)
                    ended.append(training)

            def together(name: str = f"together-{number}", ended: list[Training] = ended) -> None:
                ended += trainings(name, range(runs))
                failures = [failure for failure in train_together(ended) if failure is not None]
                if failures:
                    raise failures[0]

            whole["alone"].append(seconds_of(alone))
            steps["alone"].append(sum(last_epoch(ended)))
            ended.clear()
            release()
            whole["together"].append(seconds_of(together))
            # The time of a shared step is in the record of every run.
            steps["together"].append(max(last_epoch(ended)))
            ended.clear()
            release()
    return {
        "size": size.name,
        "runs": runs,
        "images": images,
        "rows": rows,
        "batch_size": size.rows,
        "epochs": epochs,
        "rounds": rounds,
        "trials_an_hour": {
            way: spread([3600 * runs / seconds for seconds in taken], 1)
            for way, taken in whole.items()
        },
        "last_epoch_seconds": {way: spread(taken, 4) for way, taken in steps.items()},
        "whole_ratio": ratios(whole["alone"], whole["together"]),
        "steps_ratio": ratios(steps["alone"], steps["together"]),
    }


def report(figures: dict[str, Any]) -> str:
    """Return the figures as a Markdown table."""
    hours, steps = figures["trials_an_hour"], figures["last_epoch_seconds"]
    rows = [
        [
            "trials an hour, all included",
            written(hours["alone"], "", 0),
            written(hours["together"], "", 0),
            written(figures["whole_ratio"], "×", 2),
        ],
        [
            "the steps of an epoch of all",
            written(steps["alone"], " s", 2),
            written(steps["together"], " s", 2),
            written(figures["steps_ratio"], "×", 2),
        ],
    ]
    head = (
        f"{figures['runs']} runs with k_txt 0 of {figures['epochs']} epochs over"
        f" {figures['rows']:,} rows on {figures['images']:,} images."
    )
    return f"{head}\n\n{table(['', 'one at a time', 'together', 'ratio'], rows)}"
