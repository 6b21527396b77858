"""Runs trained together, sharing each batch, against the same runs one at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.loop import new_training, patient
from benchmarks.measuring import ratios, seconds_of, spread, written
from benchmarks.sizes import STUDY, Size
from benchmarks.steps import random_batch, release
from benchmarks.synthetic import SyntheticProject
from benchmarks.tables import table
from trainer.batches import Batch
from trainer.features import prepare
from trainer.model.cached import build_cached_model
from trainer.run.engine import Engines
from trainer.run.fit import fit, train_together
from trainer.run.optimizer import make_optimizer
from trainer.run.step import Stepper, make_stepper
from trainer.run.training import wait_for_pictures

HEADS = (2, 4, 8, 16, 52)
"""Heads of one step; 52 linear probes are searched over DINOv2 (Oquab et al. 2023, appendix)."""


def measure(
    runs: int = 8,
    groups: int = 2,
    images: int = 1000,
    rows: int = 2000,
    epochs: int = 2,
    rounds: int = 2,
    heads: Sequence[int] = HEADS,
    size: Size = STUDY,
    scratch: str | None = None,
) -> dict[str, Any]:
    """Train the same runs both ways, over one store, with k_txt 0, as a search's worker does.

    Args:
        runs: How many are trained together; they differ in the learning rate.
        groups: Times that many are trained one after the other, the models kept.
        images: Rows of the store.
        rows: Rows of the data set; 80 % train.
        epochs: Epochs of each run.
        rounds: In each, both ways run once, from new models on.
        heads: Numbers of models whose bare steps are compared as well.
        size: Of the features.
        scratch: Folder for the store; None takes the system's temporary one.

    Returns:
        For each way the trials an hour, building and tracing included, and
        the seconds of a group's steps of the last epoch; and their ratios. By number of heads,
        the seconds of their steps one after the other and in one.
    """
    whole: dict[str, list[float]] = {"alone": [], "together": []}
    steps: dict[str, list[float]] = {"alone": [], "together": []}
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        root = Path(folder)
        project = SyntheticProject(root, size, rows, images)
        prepare(project, 0)
        vision = project.images()
        for i in range(0, images, size.rows):  # checksums, which no run should pay alone
            vision.gather(vision.live()[i : i + size.rows])

        def one_group(name: str, engines: Engines, at_once: int) -> float:
            """Train a group's runs, so many at once; return the seconds of its last epoch."""
            seconds = 0.0
            for first in range(0, runs, at_once):
                made = []
                for number in range(first, first + at_once):
                    drawn = {"lr": 1e-4 * (1 + number)}
                    train = patient(size, 0, epochs, **drawn)
                    own = f"{name}-{number}"
                    made.append(new_training(root, own, project, train, engines, drawn))
                if at_once == 1:
                    fit(made[0])
                elif failed := [failure for failure in train_together(made) if failure]:
                    raise failed[0]
                # The time of a shared step is in the record of every run.
                seconds += max(float(one.progress.history[-1]["seconds"]) for one in made)
                for training in made:
                    training.release()
            return seconds

        for number in range(rounds):
            for way, at_once in (("alone", 1), ("together", runs)):
                engines = Engines()
                taken: list[float] = []

                def all_groups(
                    way: str = way,
                    at_once: int = at_once,
                    number: int = number,
                    engines: Engines = engines,
                    taken: list[float] = taken,
                ) -> None:
                    for group in range(groups):
                        taken.append(one_group(f"{way}-{number}-{group}", engines, at_once))
                    wait_for_pictures()

                whole[way].append(seconds_of(all_groups))
                steps[way].append(float(np.median(taken)))
                del engines
                release()
    return {
        "size": size.name,
        "runs": runs,
        "groups": groups,
        "images": images,
        "rows": rows,
        "batch_size": size.rows,
        "epochs": epochs,
        "rounds": rounds,
        "trials_an_hour": {
            way: spread([3600 * runs * groups / seconds for seconds in taken], 1)
            for way, taken in whole.items()
        },
        "last_epoch_seconds": {way: spread(taken, 4) for way, taken in steps.items()},
        "whole_ratio": ratios(whole["alone"], whole["together"]),
        "steps_ratio": ratios(steps["alone"], steps["together"]),
        "heads": {str(count): bare_steps(count, size) for count in heads},
    }


def bare_steps(count: int, size: Size = STUDY, rounds: int = 5) -> dict[str, Any]:
    """Compare one step of many models with as many steps of one.

    Args:
        count: Models.
        size: Of the features.
        rounds: In each, both sides run for as long.
    """
    train = size.train(0)

    def member() -> Any:
        model = build_cached_model(size.text_config, size.width, size.tokens, train)
        return model, make_optimizer(train)

    batch = random_batch(size.rows, 1, size=size)
    one, many = make_stepper([member()]), make_stepper([member() for _ in range(count)])
    for stepper in (one, many):
        stepper.train(batch)
    alone, together = [], []
    for _ in range(rounds):
        alone.append(seconds_of(lambda: [_loss(one, batch) for _ in range(count)]))
        together.append(seconds_of(lambda: _loss(many, batch)))
    release()
    return {
        "alone_seconds": spread(alone),
        "together_seconds": spread(together),
        "ratio": ratios(alone, together),
    }


def _loss(stepper: Stepper, batch: Batch) -> float:
    """Take a step and wait for it."""
    return float(np.asarray(stepper.train(batch)[-1]))


def report(figures: dict[str, Any]) -> str:
    """Return the figures as Markdown tables."""
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
        f"{figures['groups']} times {figures['runs']} runs with k_txt 0 of {figures['epochs']}"
        f" epochs over {figures['rows']:,} rows on {figures['images']:,} images."
    )
    heads = [
        [
            count,
            written(found["alone_seconds"], " ms", 0, 1e3),
            written(found["together_seconds"], " ms", 0, 1e3),
            written(found["ratio"], "×", 2),
        ]
        for count, found in figures["heads"].items()
    ]
    return (
        f"{head}\n\n{table(['', 'one at a time', 'together', 'ratio'], rows)}\n\n"
        "A step of so many heads on one batch:\n\n"
        + table(["heads", "one after the other", "in one", "ratio"], heads)
    )
