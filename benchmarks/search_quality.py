"""How good a search is for the time it takes: random, TPE with pruning, successive halving.

All search the same space of the fusion head on the user's own rows, features present, and are
cut off at the same wall time. The best of many validation scores is an optimistic one, the more
so the more trials there are; so the best trial of each search is measured on the test rows too.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.study_search import ROOT, search
from benchmarks.tables import table


@dataclass(frozen=True)
class Kind:
    """How a search draws its trials and ends poor ones.

    Attributes:
        title: In the table.
        sampler, pruner: Of `[search]`.
        longer: Most epochs of a trial, over those of the other kinds.
        trials: At most; None: as many as the time allows.
    """

    title: str
    sampler: str
    pruner: str
    longer: int = 1
    trials: int | None = None


KINDS = {
    "random": Kind("random", "random", "none"),
    "tpe": Kind("TPE, median pruning", "tpe", "median"),
    "halving": Kind("random, successive halving", "random", "halving", longer=2),
    "defaults": Kind("no search: the defaults", "random", "none", longer=2, trials=1),
}

SPACE = """
[search]
trials = {trials}
sampler = "{sampler}"
pruner = "{pruner}"
seed = {seed}
keep = "all"
{first}
[train]
seed = {seed}
k_txt = 0
epochs = {epochs}
lr = {{log_uniform = [1e-5, 3e-3]}}
weight_decay = {{log_uniform = [1e-6, 1e-2]}}
dropout = {{uniform = [0.0, 0.6]}}
clipnorm = {{log_uniform = [0.01, 3.0]}}
"""
SEARCHED = ("lr", "weight_decay", "dropout", "clipnorm")

START_SECONDS = 15
"""What a command may take before its first trial; the budget is counted from that one on."""


def measure(
    config: Path, seeds: int = 3, seconds: float = 120, epochs: int = 4, trials: int = 1000
) -> dict[str, Any]:
    """Run each kind of search for so long, and measure what it found on the test rows.

    Args:
        config: Settings of the data and the encoders.
        seeds: Searches of each kind; a seed decides the draws and the training.
        seconds: Wall time of all trials of a search, from the start of the first one.
        epochs: Most epochs of a trial; of halving and of the defaults twice as many.
        trials: Most trials of a search.

    Returns:
        For each kind and seed: when each trial ended, its value where it was not pruned, its
        epochs; the best one, with its macro-F1 on test and the interval of that.
    """
    figures: dict[str, Any] = {"seconds": seconds, "kinds": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        extract(folder, config)
        for name, kind in KINDS.items():
            found = []
            for seed in range(seeds):
                space = folder / f"{name}-{seed}.toml"
                space.write_text(space_of(kind, seed, epochs, trials))
                limit = ("--timeout", str(seconds + START_SECONDS))
                search(folder, config, f"{name}-{seed}", "--space", str(space), *limit)
                found.append(ended(folder / "runs" / f"{name}-{seed}"))
            about = {**asdict(kind), "epochs": kind.longer * epochs}
            figures["kinds"][name] = {**about, "searches": found}
        # Only now does this process import TensorFlow.
        for name, about in figures["kinds"].items():
            for seed, one in enumerate(about["searches"]):
                one |= tested(folder / "runs" / f"{name}-{seed}", one["trials"], seconds)
                figures["rows"] = one.pop("rows")
    return figures


def extract(folder: Path, config: Path) -> None:
    """Extract all that the searches and their tests read."""
    command = [sys.executable, str(ROOT / "cli.py")]
    for what in (("extract-vit",), ("extract-text", "--k-txt", "0")):
        given = ["--split", "all", "--config", str(config), "--root", str(folder / "cache")]
        subprocess.run([*command, *what, *given], check=True, capture_output=True)


def space_of(kind: Kind, seed: int, epochs: int, trials: int) -> str:
    """Return the space file of a search; the defaults are its one enqueued trial."""
    from trainer.config import TrainConfig

    values = "".join(f"{name} = {getattr(TrainConfig(), name)!r}\n" for name in SEARCHED)
    return SPACE.format(
        trials=kind.trials or trials,
        sampler=kind.sampler,
        pruner=kind.pruner,
        seed=seed,
        epochs=kind.longer * epochs,
        first=f"[[search.enqueue]]\n{values}" if kind.trials else "",
    )


def ended(folder: Path) -> dict[str, Any]:
    """Return the trials of a search in the order in which they ended.

    Returns:
        `trials`: for each its number, seconds from the start of the first one to its end, its
        value (None where it was pruned or failed) and its epochs.
    """
    from trainer.tuning.drive import load_search

    trials, starts = [], []
    for trial in load_search(folder).search.study.get_trials(deepcopy=False):
        if trial.datetime_start is None or trial.datetime_complete is None:
            continue
        starts.append(trial.datetime_start)
        complete = trial.state.name == "COMPLETE"
        value, epochs = trial.value if complete else None, len(trial.intermediate_values)
        seconds = (trial.datetime_complete - min(starts)).total_seconds()
        trials.append([trial.number, round(seconds, 2), value, epochs])
    return {"trials": sorted(trials, key=lambda trial: trial[1])}


def within(trials: Sequence[Sequence[Any]], seconds: float) -> list[Sequence[Any]]:
    """Return the trials, as `ended` lists them, that had ended after so many seconds."""
    return [trial for trial in trials if trial[1] <= seconds]


def best_after(trials: Sequence[Sequence[Any]], seconds: float) -> Sequence[Any] | None:
    """Return the best trial that had completed after so many seconds, or None."""
    complete = [trial for trial in within(trials, seconds) if trial[2] is not None]
    return max(complete, key=lambda trial: float(trial[2]), default=None)


def tested(folder: Path, trials: Sequence[Sequence[Any]], seconds: float) -> dict[str, Any]:
    """Measure on test what a search had found after so many seconds.

    Returns:
        Its best trial, that trial's macro-F1 on test at its own threshold with its 95 %
        interval, and the rows of val and test.
    """
    from featstore.progress import SILENT
    from trainer import load_run

    best = best_after(trials, seconds)
    if best is None:
        return {"best": None, "test": None, "interval": None, "rows": {}}
    run = load_run(folder / f"trial-{best[0]:04d}")
    figures = run.evaluate("test", show=SILENT)
    found = figures["intervals"]["macro_f1"]
    interval = None if found is None else [round(found["low"], 5), round(found["high"], 5)]
    rows = {"val": run.metrics["at_threshold"]["rows"], "test": figures["at_threshold"]["rows"]}
    value = round(figures["at_threshold"]["macro_f1"], 5)
    return {"best": best[0], "test": value, "interval": interval, "rows": rows}


def mean(values: Sequence[float]) -> str:
    """Return the mean over seeds, the least and the greatest; "" without any."""
    if not values:
        return ""
    return f"{statistics.fmean(values):.4f} ({min(values):.4f}–{max(values):.4f})"


def report(figures: dict[str, Any]) -> str:
    """Return best value against wall time as Markdown: mean over seeds, and their spread."""
    seconds = figures["seconds"]
    times = [seconds * quarter / 4 for quarter in (1, 2, 3, 4)]
    rows, halves = [], []
    for kind in figures["kinds"].values():
        found = kind["searches"]
        cells = []
        for time in times:
            best = [best_after(one["trials"], time) for one in found]
            # A mean over those seeds alone that have a value yet would be another one's.
            known = [float(trial[2]) for trial in best if trial is not None]
            cells.append(mean(known) if len(known) == len(found) else "none yet")
        inside = [within(one["trials"], seconds) for one in found]
        ran = statistics.fmean(len(trials) for trials in inside)
        full = statistics.fmean(sum(trial[2] is not None for trial in trials) for trials in inside)
        epochs = statistics.fmean(sum(trial[3] for trial in trials) for trials in inside)
        intervals = [one["interval"] for one in found if one["interval"] is not None]
        halves += [(high - low) / 2 for low, high in intervals]
        on_test = [one["test"] for one in found if one["test"] is not None]
        cells += [f"{ran:.0f}", f"{full:.0f}", f"{epochs:.0f}", mean(on_test)]
        rows.append([f"{kind['title']}, {kind['epochs']} epochs", *cells])
    header = [
        f"best val macro-F1 of {len(found)} seeds",
        *(f"after {time:.0f} s" for time in times),
        *("trials", "of them to the end", "epochs in all", "the best on test"),
    ]
    counts = figures["rows"]
    width = statistics.fmean(halves) if halves else math.nan
    head = (
        f"The head at k_txt 0, {seconds:.0f} s of trials of each search, features present;"
        f" {counts['val']:,} validation and {counts['test']:,} test rows. Means over seeds, the"
        f" least and the greatest. The 95 % interval of one test score is ±{width:.3f} wide."
    )
    return f"{head}\n\n{table(header, rows)}"
