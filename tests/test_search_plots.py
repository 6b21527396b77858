"""The pictures of a search: which are drawn, their ticks, and the trials that stand out."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from matplotlib.figure import Figure

from trainer.tuning.live import _summary
from trainer.tuning.plots import IMPORTANCE_TRIALS, draw_plots, no_importance
from trainer.tuning.space import Parameter
from trainer.tuning.workers import Watched

LR = Parameter("train", "lr", "log_uniform", (2e-5, 1e-4))
DROPOUT = Parameter("train", "dropout", "uniform", (0.05, 0.3))


def made(folder: Path, trials: int, *parameters: Parameter) -> tuple[Any, list[dict[str, Any]]]:
    """A search of so many complete trials, and its rows, the best first."""
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=1))
    rows = []
    for number in range(trials):
        trial = study.ask({p.name: p.distribution() for p in parameters})
        value = 0.8 - abs(math.log(trial.params["lr"] / 6e-5))
        study.tell(trial, value)
        rows.append({"trial": number, "run": f"trial-{number:04d}", "state": "complete"})
        rows[-1] |= {"value": value, "params": dict(trial.params), "together": 1}
    settings = SimpleNamespace(metric="val_macro_f1", minimises=False)
    space = SimpleNamespace(parameters=parameters, search=settings, trials=trials)
    search = SimpleNamespace(name="s", folder=folder, study=study, space=space)
    return search, sorted(rows, key=lambda row: -row["value"])


@pytest.mark.parametrize(
    ("trials", "parameters", "why"),
    [
        (IMPORTANCE_TRIALS, (LR,), "only one is searched"),
        (IMPORTANCE_TRIALS - 1, (LR, DROPOUT), "9 complete trials, expected at least 10"),
        (IMPORTANCE_TRIALS, (LR, DROPOUT), ""),
    ],
)
def test_importance_of_one_setting_or_of_few_trials_is_not_drawn(
    tmp_path: Path, trials: int, parameters: tuple[Parameter, ...], why: str
) -> None:
    (tmp_path / "importance.png").write_bytes(b"of an earlier time")
    search, rows = made(tmp_path, trials, *parameters)
    assert why in no_importance(search, rows)
    assert bool(no_importance(search, rows)) == bool(why)
    names = [path.name for path in draw_plots(search, rows)]
    assert ("importance.png" in names) == (not why)
    assert (tmp_path / "importance.png").exists() == (not why)


def test_ticks_are_round_and_the_best_trials_stand_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    search, rows = made(tmp_path, 20, LR, DROPOUT)
    draw_plots(search, rows)
    history, _, parallel = (figure.axes[0] for figure in figures)
    texts = [text.get_text() for text in parallel.texts]
    assert texts[:3] == ["2e-05", "5e-05", "0.0001"]
    assert texts[3:9] == ["0.05", "0.1", "0.15", "0.2", "0.25", "0.3"]
    # The colours' legend is the axis of the values.
    assert len(parallel.images) == 1
    widths = [item.get_linewidth() for item in parallel.lines if len(item.get_xdata()) == 3]
    assert len(widths) == 20
    assert widths[-1] > widths[-2] == widths[-3] > max(widths[:-3])
    assert rows[0]["run"] in parallel.get_title("left")
    legend = [text.get_text() for text in history.get_legend().get_texts()]
    assert legend[-1] == f"best: {rows[0]['run']}, {rows[0]['value']:.4f}"


@pytest.mark.parametrize(
    ("own", "peak", "said"),
    [({0: 2_000_000_000}, 3_000_000_000, "memory 2 GB"), ({}, 3_000_000_000, "at most 3 GB")],
)
def test_the_memory_of_workers_that_are_gone_is_not_0(
    tmp_path: Path, own: dict[int, int], peak: int, said: str
) -> None:
    search, rows = made(tmp_path, 1, LR)
    rows[0] |= {"seconds": 1.0}
    assert said in _summary(search, rows, Watched(1, peak, own_bytes=own), 0.0)
    assert "GB" not in _summary(search, rows, Watched(1), 0.0)
