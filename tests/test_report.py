"""A run's learning curves: a sound PNG for any history, and what is drawn in it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from featstore.errors import RunError
from trainer.run.curves import plot_learning_curves


def history(epochs: int) -> list[dict[str, Any]]:
    return [
        {
            "epoch": i + 1,
            "loss": 0.7 - 0.05 * i,
            "val_loss": 0.7 - 0.05 * i + 0.0125 * i * i,
            "val_accuracy": 0.6 + 0.02 * i,
            "val_macro_f1": 0.6 + 0.02 * i,
            "val_auc": 0.65 + 0.02 * i,
            "val_brier": 0.3 - 0.01 * i,
            "lr": 1e-4 if i < 3 else 5e-5,
        }
        for i in range(epochs)
    ]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved, to look into."""
    saved: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: Any, **options: Any) -> None:
        saved.append(self)
        save(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def legend(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def line(axes: Any, name: str) -> Any:
    return next(item for item in axes.lines if item.get_label() == name)


def test_curves(tmp_path: Path, figures: list[Figure]) -> None:
    path = tmp_path / "run" / "curves.png"
    plot_learning_curves(history(6), path, title="run 1")
    assert os.listdir(path.parent) == ["curves.png"]
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size == (1200, 480)
        assert len(np.unique(np.asarray(image.convert("L")))) > 20
    left, right = figures[0].axes
    assert legend(left) == ["train loss", "val loss", "best epoch (val_loss)"]
    assert legend(right) == ["accuracy", "macro-F1", "AUC", "best epoch (val_loss)"]
    assert list(line(left, "train loss").get_xdata()) == [1, 2, 3, 4, 5, 6]
    assert list(line(left, "train loss").get_ydata()) == [row["loss"] for row in history(6)]
    assert list(line(right, "AUC").get_ydata()) == [row["val_auc"] for row in history(6)]
    for axes in (left, right):
        assert set(line(axes, "best epoch (val_loss)").get_xdata()) == {3}
        assert [text.get_text() for text in axes.texts] == ["lr 5e-05"]
        assert axes.texts[0].xy[0] == 3.5
        assert axes.get_xlabel() == "epoch"


@pytest.mark.parametrize(
    ("monitor", "best"), [("val_loss", 3), ("val_macro_f1", 6), ("val_brier", 6)]
)
def test_best_epoch_follows_the_monitor(
    tmp_path: Path, figures: list[Figure], monitor: str, best: int
) -> None:
    plot_learning_curves(history(6), tmp_path / "c.png", monitor=monitor)
    marked = line(figures[0].axes[0], f"best epoch ({monitor})")
    assert set(marked.get_xdata()) == {best}


def test_first_of_equal_epochs_is_best(tmp_path: Path, figures: list[Figure]) -> None:
    rows = [{"epoch": epoch, "val_auc": 0.5} for epoch in (1, 2)]
    plot_learning_curves(rows, tmp_path / "c.png", monitor="val_auc")
    assert set(line(figures[0].axes[1], "best epoch (val_auc)").get_xdata()) == {1}


@pytest.mark.parametrize("epochs", [2, 120])
def test_any_number_of_epochs(tmp_path: Path, figures: list[Figure], epochs: int) -> None:
    plot_learning_curves(history(epochs), tmp_path / "c.png")
    with Image.open(tmp_path / "c.png") as image:
        image.load()
        assert image.size == (1200, 480)
    for axes, name in zip(figures[0].axes, ("train loss", "AUC"), strict=True):
        assert list(line(axes, name).get_xdata()) == list(range(1, epochs + 1))
        # Every epoch is in sight, and stands on a whole number.
        assert axes.get_xlim() == (0.5, epochs + 0.5)
        ticks = [tick for tick in axes.get_xticks() if 0.5 <= tick <= epochs + 0.5]
        assert ticks
        assert all(tick == int(tick) for tick in ticks)


def test_one_epoch_is_points_side_by_side_with_their_values(
    tmp_path: Path, figures: list[Figure]
) -> None:
    plot_learning_curves(history(1), tmp_path / "c.png")
    left, right = figures[0].axes
    assert [text.get_text() for text in left.texts] == ["0.700", "0.700"]
    assert [text.get_text() for text in right.texts] == ["0.600", "0.600", "0.650"]
    assert legend(right) == ["accuracy", "macro-F1", "AUC"]
    places = [float(line(right, name).get_xdata()[0]) for name in legend(right)]
    assert places == sorted(set(places))
    assert list(right.get_xticks()) == [1]


def test_accuracy_is_seen_where_macro_f1_lies_on_it(tmp_path: Path, figures: list[Figure]) -> None:
    plot_learning_curves(history(6), tmp_path / "c.png")
    accuracy, macro_f1 = (line(figures[0].axes[1], name) for name in ("accuracy", "macro-F1"))
    assert accuracy.get_linestyle() == "-"
    assert macro_f1.get_linestyle() == "--"
    assert macro_f1.get_markersize() < accuracy.get_markersize()


def test_the_chance_line(tmp_path: Path, figures: list[Figure]) -> None:
    plot_learning_curves(history(6), tmp_path / "c.png", shares=(0.75, 0.25))
    for axes, chance in zip(figures[0].axes, (0.5623351446188083, 0.75), strict=True):
        assert any(set(item.get_ydata()) == {chance} for item in axes.lines)
        assert f"chance {chance:.2f}" in [text.get_text() for text in axes.texts]


def test_gaps(tmp_path: Path, figures: list[Figure]) -> None:
    rows: list[dict[str, Any]] = [
        {"epoch": 1, "loss": math.inf, "val_loss": math.nan, "val_auc": None},
        {"epoch": 2, "loss": 0.5, "val_auc": None},
    ]
    plot_learning_curves(rows, tmp_path / "c.png")
    left, right = figures[0].axes
    assert legend(left) == ["train loss"]
    assert np.isnan(line(left, "train loss").get_ydata()).tolist() == [True, False]
    assert right.get_legend() is None


def test_only_cuts_of_the_rate_are_marked(tmp_path: Path, figures: list[Figure]) -> None:
    rates = [1e-5, 1e-4, 1e-4, None, 1e-4, 5e-5]
    rows = [{"epoch": epoch, "loss": 1.0, "lr": rate} for epoch, rate in enumerate(rates)]
    plot_learning_curves(rows, tmp_path / "c.png")
    assert [text.xy[0] for text in figures[0].axes[0].texts] == [4.5]


def test_no_epoch(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no epoch yet"):
        plot_learning_curves([], tmp_path / "c.png")
    assert os.listdir(tmp_path) == []


def test_pyplot_is_left_alone(tmp_path: Path) -> None:
    code = (
        "import sys; from trainer.run.curves import plot_learning_curves as plot;"
        "assert 'matplotlib' not in sys.modules;"
        f"plot([{{'epoch': 1, 'loss': 1.0}}], {str(tmp_path / 'c.png')!r});"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "c.png").stat().st_size > 1000
