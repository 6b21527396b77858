"""What a search found: its trials in order, as a table, a CSV file and plots."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from featstore.publish import write_text
from trainer.tuning.plots import draw_plots
from trainer.tuning.study import Search

FIGURES = ("best_epoch", "val_loss", "val_accuracy", "val_macro_f1", "val_auc", "threshold")


def trial_rows(search: Search) -> list[dict[str, Any]]:
    """Return what is known of each trial that was drawn, in the order drawn.

    Returns:
        For each trial: `trial`, `run`, `state` (running, complete, pruned or
        fail), `value` (best so far, None before the first epoch), `epoch`
        (finished ones), `params` (as the settings have them), `seconds`,
        `together` (trials that share its passes over the store), `memory_bytes`,
        `worker`, `reason` of a failure, and `FIGURES`.
    """
    return [_row(search, trial) for trial in search.drawn()]


def rows_now(search: Search) -> list[dict[str, Any]]:
    """Return `trial_rows`; running trials that no process is at work on are `stopped`.

    Their `seconds` are None: when their process ended was not written down.
    """
    rows, idle = trial_rows(search), search.idle()
    for row in rows:
        if row["trial"] in idle:
            row |= {"state": "stopped", "seconds": None}
    return rows


def is_open(row: dict[str, Any]) -> bool:
    """Tell whether a trial has not ended."""
    return row["state"] in ("running", "stopped")


def without_folder(search: Search, rows: Sequence[dict[str, Any]]) -> str | None:
    """Say which trials have figures but no run folder any more; None where all have one."""
    ended = [row for row in rows if row["state"] in ("complete", "pruned")]
    gone = sorted(row["run"] for row in ended if not search.run_of(row["trial"]).exists)
    if not gone:
        return None
    return (
        f"{search.folder}: no run folder is left of {', '.join(gone)}: what is said of"
        f" {'it' if len(gone) == 1 else 'them'} is the study's, and there are no weights"
    )


def _row(search: Search, trial: FrozenTrial) -> dict[str, Any]:
    attrs, reported = trial.user_attrs, trial.intermediate_values
    value: float | None = None
    if trial.state == TrialState.COMPLETE:
        value = trial.value
    elif reported:
        pick = min if search.space.search.minimises else max
        value = pick(reported.values())
    seconds = attrs.get("seconds")
    if trial.state == TrialState.RUNNING and "began" in attrs:
        seconds = max(0.0, time.time() - attrs["began"])
    return {
        "trial": trial.number,
        "run": search.run_of(trial.number).folder.name,
        "state": trial.state.name.lower(),
        "value": value,
        "epoch": len(reported),
        "params": {p.name: p.setting(trial.params[p.name]) for p in _parameters(search, trial)},
        "seconds": seconds,
        "together": attrs.get("together", 1),
        "memory_bytes": attrs.get("memory_bytes"),
        "worker": attrs.get("worker"),
        "reason": attrs.get("reason"),
        **{name: attrs.get(name) for name in FIGURES},
    }


def _parameters(search: Search, trial: FrozenTrial) -> list[Any]:
    return [p for p in search.space.parameters if p.name in trial.params]


def ranked(search: Search, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return trials, the best first: complete ones, then pruned, running, failed ones."""
    sign = 1 if search.space.search.minimises else -1
    states = ("complete", "pruned", "running", "stopped", "fail")

    def place(row: dict[str, Any]) -> tuple[int, float, int]:
        value = row["value"]
        return states.index(row["state"]), math.inf if value is None else sign * value, row["trial"]

    return sorted(rows, key=place)


def best_row(search: Search, rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the best complete trial, or None."""
    first = next(iter(ranked(search, rows)), None)
    return first if first is not None and first["state"] == "complete" else None


def seconds_left(search: Search, rows: Sequence[dict[str, Any]], workers: int) -> float | None:
    """Estimate the time to the end from the epochs that were run; None before the first one."""
    open_rows = [row for row in rows if is_open(row)]
    costs = {row["trial"]: cost for row in rows if (cost := _expected(search, row)) is not None}
    if not costs:
        return None
    mean = float(np.mean(list(costs.values())))
    left = (search.space.trials - len(rows)) * mean
    for row in open_rows:
        left += max(0.0, costs.get(row["trial"], mean) - _share(row))
    at_once = sum(1 / row["together"] for row in open_rows) + search.space.trials - len(rows)
    return left / max(1.0, min(workers, at_once))


def _expected(search: Search, row: dict[str, Any]) -> float | None:
    """Return what a trial will have taken of a worker's time; None where nothing tells."""
    if not is_open(row):
        return _share(row)
    if not row["epoch"] or row["seconds"] is None:
        return None
    return _share(row) / row["epoch"] * float(epochs_of(search, row))


def _share(row: dict[str, Any]) -> float:
    """Return a trial's part of the time that it and those trained with it took."""
    return float(row["seconds"] or 0.0) / row["together"]


def epochs_of(search: Search, row: dict[str, Any]) -> int:
    """Return the most epochs of a trial."""
    return int(row["params"].get("epochs", search.base.train.epochs))


def write_leaderboard(search: Search, rows: list[dict[str, Any]] | None = None) -> list[Path]:
    """Write `leaderboard.csv` and the plots into the search's folder.

    Args:
        search: The search.
        rows: Of its trials; None: `rows_now`.

    Returns:
        The files. A plot for which there are too few trials is left out.
    """
    rows = ranked(search, rows_now(search) if rows is None else rows)
    paths = [search.folder / "leaderboard.csv"]
    names = [parameter.name for parameter in search.space.parameters]
    text = io.StringIO(newline="")
    kept = [key for key in (rows[0] if rows else {"trial": 0}) if key != "params"]
    writer = csv.DictWriter(text, ["rank", *kept, *names], lineterminator="\n")
    writer.writeheader()
    for rank, row in enumerate(rows, 1):
        writer.writerow({"rank": rank, **{key: row[key] for key in kept}, **row["params"]})
    write_text(paths[0], text.getvalue())
    return paths + draw_plots(search, rows)
