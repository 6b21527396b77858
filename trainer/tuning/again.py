"""The best trial of a search, trained again: more epochs, several seeds, mean and deviation."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

from featstore.progress import SILENT, Show
from featstore.project import Project
from featstore.publish import command_line, package_versions, write_json
from trainer.config import Config
from trainer.features import prepare
from trainer.metrics import decided
from trainer.results.evaluate import evaluate
from trainer.results.score import Scorer
from trainer.run.fit import fit
from trainer.run.folder import Run
from trainer.run.training import Reporter, Training
from trainer.tuning.study import Search


def retrain(
    search: Search,
    best: dict[str, Any],
    epochs: int | None,
    seeds: int,
    split: str,
    reporter: Reporter,
    show: Show = SILENT,
) -> dict[str, Any]:
    """Train a trial's settings again and measure them.

    Each seed is a run in the search's folder, `best-<trial>-e<epochs>-s<seed>`.
    A run that is there already is not trained again, and a stopped one goes on.

    Args:
        search: The search.
        best: The trial, from `trainer.tuning.table`.
        epochs: Epochs; None: as many as the trial had.
        seeds: Runs, with the trial's seed and those that follow it.
        split: "val" or "test", on which the runs are measured, under the
            control that they are trained with.
        reporter: How their epochs are shown.
        show: How the rest is shown.

    Returns:
        Each run's accuracy and macro-F1 at its threshold, and their mean and
        standard deviation (n - 1; None of a single run). Also written to
        `best.json`.

    Raises:
        MissingFeaturesError: The split was not extracted.
        StoppedError: `reporter.stopping` said so.
    """
    base = search.trained_config(best["trial"])
    count = epochs or base.train.epochs
    project = Project(base, file=search.folder / "config.toml")
    project.save_dataset(search.folder)
    # A split without features would be found out after the training.
    project.usable(split)
    prepare(project, base.train.k_txt, show, views=base.train.views)
    figures = []
    for seed in range(base.train.seed, base.train.seed + seeds):
        train = dataclasses.replace(base.train, epochs=count, seed=seed)
        run = Run(search.folder / f"best-{best['trial']:04d}-e{count}-s{seed}", search.elsewhere)
        if not (run.exists and run.manifest["status"] == "finished"):
            with run.writing():
                run.check_free_or_same(Config.of(base, train))
                fit(Training(run, project, train, search.init_from, reporter))
        at = decided(evaluate(Scorer(run, project), split, show=show))
        figures.append(
            {
                "run": str(run.folder),
                "seed": seed,
                "accuracy": at["accuracy"],
                "macro_f1": at["macro_f1"],
            }
        )
    found: dict[str, Any] = {
        "trial": best["trial"],
        "params": best["params"],
        "epochs": count,
        "split": split,
        "runs": figures,
    }
    for name in ("accuracy", "macro_f1"):
        values = [run[name] for run in figures]
        deviation = statistics.stdev(values) if len(values) > 1 else None
        found[name] = {"mean": statistics.fmean(values), "deviation": deviation}
    about = {"command": command_line(), "versions": package_versions()}
    write_json(search.folder / "best.json", {**about, **found})
    return found
