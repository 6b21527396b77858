"""A run's learning curves, as a figure for its page and as a picture."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from featstore.errors import RunError
from trainer.config import LOWER_IS_BETTER
from trainer.pages.drawing import GROUND, legend_below, new_figure, write_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curves = Mapping[str, tuple[str, str, Mapping[str, Any]]]

LOSSES: Curves = {"loss": ("train loss", "#0072b2", {}), "val_loss": ("val loss", "#d55e00", {})}
SCORES: Curves = {
    "val_accuracy": ("accuracy", "#0072b2", {"markersize": 6.5}),
    # Of balanced classes it lies on the accuracy, which its gaps and small marks leave in sight.
    "val_macro_f1": (
        "macro-F1",
        "#d55e00",
        {"linestyle": (0, (4, 4)), "marker": "s", "markersize": 3, "markerfacecolor": "none"},
    ),
    "val_auc": ("AUC", "#009e73", {}),
}
"""History key to legend text, colour (Okabe and Ito's palette, safe for colour-blind readers)
and style."""


def plot_learning_curves(
    history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], **options: Any
) -> None:
    """Draw a run's learning curves into a PNG, atomically.

    Args:
        history: See `learning_curves`.
        path: The file to write.
        options: Of `learning_curves`.

    Raises:
        RunError: The history has no epoch.
        FeatstoreError: The file cannot be written.
    """
    if not history:
        raise RunError(f"{os.fspath(path)}: no learning curves to draw: the run has no epoch yet")
    write_png(learning_curves(history, **options), path)


def learning_curves(
    history: Sequence[Mapping[str, Any]],
    *,
    monitor: str = "val_loss",
    title: str = "",
    shares: Sequence[float] = (),
    cuts: bool = True,
    panels: Sequence[str] = ("loss", "score"),
    size: tuple[float, float] = (10, 4),
) -> Figure:
    """Return a figure of a run's losses and val scores by epoch, side by side.

    The best epoch is a dotted line; an epoch that starts with a lower learning rate than
    the one before is a grey line with the new rate, where they are to be marked; what the
    classes' shares alone reach is a dashed line. A single epoch is drawn as points with
    their values.

    Args:
        history: One mapping for each epoch, at least one, in order: `epoch` (its number), and
            any of `loss`, `val_loss` (nats a row), `val_accuracy`, `val_macro_f1`, `val_auc`
            (0 to 1) and `lr`. A value that is absent, None or not finite leaves a gap.
        monitor: The key that chooses the best epoch: the lowest of a loss or an error, the
            highest of any other; the first of equals.
        title: Text above the panels.
        shares: Of the classes in val. The largest is the accuracy of always saying that
            class; the loss of always saying the shares is their entropy.
        cuts: Mark where the learning rate was cut.
        panels: Which of both to draw.
        size: Width and height in inches.
    """
    from matplotlib.ticker import MaxNLocator

    epochs = [int(row["epoch"]) for row in history]
    figure = new_figure(*size)
    if title:
        figure.suptitle(title)
    best = _best(history, monitor)
    known: dict[str, tuple[Curves, str, float | None]] = {
        "loss": (LOSSES, "loss (nats a row)", _entropy(shares) if shares else None),
        "score": (SCORES, "val score", max(shares, default=None)),
    }
    for name, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        curves, label, chance = known[name]
        if len(history) == 1:
            _draw_values(axes, history[0], curves)
        else:
            _draw_curves(axes, history, epochs, curves)
            if cuts:
                _mark_cuts(axes, history, epochs)
        if best is not None and len(history) > 1:
            axes.axvline(
                epochs[best],
                linestyle=":",
                color="black",
                zorder=1,
                label=f"best epoch ({monitor})",
            )
        if chance is not None and axes.lines:
            _mark_chance(axes, chance)
        axes.set(xlabel="epoch", ylabel=label, xlim=(min(epochs) - 0.5, max(epochs) + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if len(history) == 1:
            axes.set_xticks(epochs)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        legend_below(axes, columns=2 if size[0] < 6 else 0)
    return figure


def _mark_chance(axes: Axes, chance: float) -> None:
    """Draw what the classes' shares alone reach."""
    axes.axhline(chance, linestyle="--", linewidth=1, color="grey", zorder=1)
    # On the line's right end, where curves have left it.
    axes.annotate(
        f"chance {chance:.2f}",
        (1, chance),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 4),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color="black",
        bbox={"facecolor": GROUND, "edgecolor": "none", "pad": 0.5},
    )


def _draw_curves(
    axes: Axes, history: Sequence[Mapping[str, Any]], epochs: Sequence[int], curves: Curves
) -> None:
    for key, (name, colour, style) in curves.items():
        values = [_number(row, key) for row in history]
        if not all(map(math.isnan, values)):
            look = {"marker": "o", "markersize": 4, "color": colour, "label": name, **style}
            axes.plot(epochs, values, **look)


def _draw_values(axes: Axes, row: Mapping[str, Any], curves: Curves) -> None:
    """Draw the values of a single epoch side by side, each with its number."""
    found = {key: _number(row, key) for key in curves}
    known = [key for key, value in found.items() if not math.isnan(value)]
    for place, key in enumerate(known):
        name, colour, style = curves[key]
        at = int(row["epoch"]) + 0.3 * (place - (len(known) - 1) / 2)
        marker = style.get("marker", "o")
        axes.plot([at], [found[key]], marker, markersize=9, color=colour, label=name)
        axes.annotate(
            f"{found[key]:.3f}",
            (at, found[key]),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    # Room for the numbers.
    axes.margins(y=0.2)


def _entropy(shares: Sequence[float]) -> float:
    """Return the loss, in nats, of always saying the shares of the classes."""
    return -sum(share * math.log(share) for share in shares if share)


def _number(row: Mapping[str, Any], key: str) -> float:
    """Return a value of the history, NaN where it cannot be drawn."""
    value = row.get(key)
    number = math.nan if value is None else float(value)
    return number if math.isfinite(number) else math.nan


def _best(history: Sequence[Mapping[str, Any]], monitor: str) -> int | None:
    """Return the position of the best epoch, or None where the monitor was never measured."""
    sign = 1 if monitor in LOWER_IS_BETTER else -1
    values = [(sign * _number(row, monitor), at) for at, row in enumerate(history)]
    measured = [pair for pair in values if not math.isnan(pair[0])]
    return min(measured)[1] if measured else None


def _mark_cuts(axes: Axes, history: Sequence[Mapping[str, Any]], epochs: Sequence[int]) -> None:
    """Mark the epochs that start with a lower learning rate."""
    rates = [_number(row, "lr") for row in history]
    for before, rate, epoch in zip(rates, rates[1:], epochs[1:], strict=False):
        if rate < before:
            # Between two epochs: the rate was cut after one and holds from the other on.
            at = epoch - 0.5
            axes.axvline(at, linewidth=0.8, color="grey", alpha=0.7)
            axes.annotate(
                f"lr {rate:.2g}",
                (at, 1.01),
                xycoords=("data", "axes fraction"),
                ha="center",
                fontsize=8,
                color="black",
            )
