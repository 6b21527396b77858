"""How good a search is for what it spends: TPE with pruning against random search.

Both search the same space of the fusion head on the user's own rows, with the
same most epochs of a trial. The budget is counted in epochs.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.study_search import search
from benchmarks.tables import table

QUALITY_SPACE = """
[search]
trials = {trials}
sampler = "{sampler}"
pruner = "{pruner}"
seed = {seed}
together = 1

[train]
k_txt = 0
epochs = {epochs}
lr = {{log_uniform = [1e-5, 3e-3]}}
weight_decay = {{log_uniform = [1e-6, 1e-2]}}
dropout = {{uniform = [0.0, 0.6]}}
clipnorm = {{log_uniform = [0.01, 3.0]}}
"""


def measure(config: Path, seeds: int = 3, trials: int = 20, epochs: int = 3) -> dict[str, Any]:
    """Compare TPE with pruning and random search, by the best value for a budget.

    Args:
        config: Settings of the data and the encoders.
        seeds: Searches of each kind.
        trials: Trials of a random search. Pruned ones cost less, so TPE has half
            as many more; the budget cuts both off at the same place.
        epochs: Most epochs of a trial.

    Returns:
        For each kind and seed: the best value after each epoch that was spent,
        in the order in which the trials ran.
    """
    figures: dict[str, Any] = {"trials": trials, "epochs": epochs, "searches": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        kinds = (
            ("random", "random", "none", trials),
            ("tpe", "tpe", "median", math.ceil(1.5 * trials)),
        )
        for name, sampler, pruner, count in kinds:
            curves = []
            for seed in range(seeds):
                space = folder / f"{name}-{seed}.toml"
                space.write_text(
                    QUALITY_SPACE.format(
                        trials=count, sampler=sampler, pruner=pruner, seed=seed, epochs=epochs
                    )
                )
                found = search(folder, config, f"{name}-{seed}", "--space", str(space))
                best, spent, curve = -math.inf, 0, []
                for trial in found["trials"]:
                    spent += trial["epoch"]
                    best = max(best, -math.inf if trial["value"] is None else trial["value"])
                    curve.append([spent, round(best, 5)])
                curves.append(curve)
            figures["searches"][name] = curves
    return figures


def best_after(curve: Sequence[Sequence[float]], budget: float) -> float:
    """Return the best value of the trials that ended within a budget of epochs."""
    return max((value for spent, value in curve if spent <= budget), default=math.nan)


def report(figures: dict[str, Any]) -> str:
    """Return best value against budget as Markdown: mean over seeds, and their spread."""
    most = figures["trials"] * figures["epochs"]
    budgets = [most // 4, most // 2, 3 * most // 4, most]
    rows = []
    for name, searches in figures["searches"].items():
        cells = []
        for budget in budgets:
            values = [best_after(curve, budget) for curve in searches]
            cells.append(f"{statistics.fmean(values):.4f} ({min(values):.4f}–{max(values):.4f})")
        spent = statistics.fmean(len(curve) for curve in searches)
        title = {"random": "random", "tpe": "TPE, median pruning"}[name]
        rows.append([title, *cells, f"{spent:.0f}"])
    header = [
        f"best val macro-F1 of {len(searches)} seeds",
        *(f"{budget} epochs" for budget in budgets),
        "trials",
    ]
    return table(header, rows)
