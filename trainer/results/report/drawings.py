"""The figures of a run's page, and of a comparison's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featstore.data.labels import LABEL_NAMES
from featstore.quantities import share
from trainer.pages.drawing import CLASS_COLORS, COLORS, legend_below, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 4.6, 3.5
"""Inches: of a figure whose text can be read on a phone and which stands beside another."""
STYLES = ("-", "--", "-.", ":")


def confusion(matrix: Mapping[str, Mapping[str, int]]) -> Figure:
    """Return the rows of each truth by what they are called, and their shares of the truth.

    Args:
        matrix: Truth to what it is called to rows.
    """
    names = list(matrix)
    figure = new_figure(WIDTH, 0.8 + 0.85 * len(names))
    axes = figure.subplots()
    for y, truth in enumerate(names):
        whole = sum(matrix[truth].values())
        for x, called in enumerate(names):
            rows = matrix[truth][called]
            part = rows / whole if whole else 0.0
            color = COLORS[0] if truth == called else COLORS[1]
            # Light enough for the ink of either ground.
            axes.add_patch(_cell(x, y, color, 0.06 + 0.5 * part))
            axes.text(x, y, f"{rows:,}\n{share(part)}", ha="center", va="center", color="black")
    axes.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(names) - 0.5, -0.5))
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="called", ylabel="truth")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def _cell(x: int, y: int, color: str, alpha: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, color=color, alpha=alpha, linewidth=0)


def reliability(
    curves: Mapping[str, Sequence[Mapping[str, float]]], at_half: bool, rows: bool = True
) -> Figure:
    """Return the accuracy of rows by their confidence, above how many there are.

    Args:
        curves: Name to the bins of `trainer.statistics.reliability`.
        at_half: Whether confidence starts at a half, as of two classes.
        rows: Draw how many rows each bin has.
    """
    figure = new_figure(WIDTH, HEIGHT + (0.7 if rows else 0.0))
    ratios = {"height_ratios": (3.2, 1)} if rows else None
    axes, *below = figure.subplots(
        1 + rows, 1, sharex=True, gridspec_kw=ratios, squeeze=False
    ).ravel()
    low = 0.5 if at_half else min(line["low"] for bins in curves.values() for line in bins)
    axes.plot(
        [low, 1], [low, 1], color="black", linewidth=1, linestyle=":", label="as it should be"
    )
    for i, (name, bins) in enumerate(curves.items()):
        color = COLORS[i % len(COLORS)]
        x, y, count = (
            np.array([line[key] for line in bins], float)
            for key in ("confidence", "accuracy", "rows")
        )
        size = 12 + 90 * np.sqrt(count / max(count.sum(), 1))
        axes.plot(x, y, STYLES[i % len(STYLES)], color=color, label=name)
        axes.scatter(x, y, s=size, color=color, zorder=3)
        for lower in below:
            middle = [(max(line["low"], low) + line["high"]) / 2 for line in bins]
            width = 0.8 * (bins[0]["high"] - bins[0]["low"]) / len(curves)
            shift = (i - (len(curves) - 1) / 2) * width
            lower.bar(np.array(middle) + shift, count, width, color=color)
    axes.set_ylabel("accuracy")
    axes.set_xlim(low - 0.01, 1.01)
    axes.grid(alpha=0.25)
    last = below[0] if below else axes
    last.set_xlabel(f"confidence{' at 0.5' if at_half else ''}")
    for lower in below:
        lower.set_ylabel("rows")
    for each in (axes, *below):
        each.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="best")
    return figure


def sweep(
    found: Mapping[str, Sequence[float]], tau: float, interval: Mapping[str, float] | None
) -> Figure:
    """Return macro-F1 and accuracy on val at each threshold, with the one that was chosen.

    Args:
        found: `threshold_sweep` of an evaluation.
        tau: The run's.
        interval: Between which values it falls on draws of val.
    """
    figure = new_figure(WIDTH, HEIGHT)
    axes = figure.subplots()
    at = found["threshold"]
    if interval is not None:
        axes.axvspan(
            interval["low"], interval["high"], color=COLORS[2], alpha=0.22, label="95 % of draws"
        )
    axes.plot(at, found["accuracy"], color=COLORS[0], label="accuracy")
    axes.plot(at, found["macro_f1"], color=COLORS[1], linestyle="--", label="macro-F1")
    axes.axvline(tau, color="black", linestyle=":", label=f"τ = {tau:.2f}")
    axes.set(xlabel="threshold on the probability of entailment", ylabel="on val", xlim=(0, 1))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    legend_below(axes, columns=2)
    return figure


def buckets(
    found: Mapping[str, Mapping[str, Any]], whole: float, names: Sequence[str] = ()
) -> Figure:
    """Return the accuracy of each kind of sentence with its interval, the whole's as a line.

    Args:
        found: Name to `accuracy` and `interval`; of several runs, to run to `accuracy`, `low`
            and `high`.
        whole: Accuracy of all rows, of the first run.
        names: The runs, where there are several.
    """
    figure = new_figure(WIDTH, 1.0 + (0.3 + 0.16 * max(0, len(names) - 1)) * len(found))
    axes = figure.subplots()
    axes.axvline(whole, color="black", linestyle=":", linewidth=1, label=f"all rows {share(whole)}")
    runs = names or ("",)
    for i, run in enumerate(runs):
        shift = 0.22 * (i - (len(runs) - 1) / 2)
        for y, figures in enumerate(found.values()):
            at = figures["runs"][run] if names else figures
            interval = at if names else at["interval"]
            label = run if y == 0 and names else None
            look: dict[str, Any] = {"color": COLORS[i % len(COLORS)], "label": label}
            if interval is None:
                axes.plot(at["accuracy"], y + shift, "o", markersize=5, **look)
                continue
            reach = [
                [max(0.0, at["accuracy"] - interval["low"])],
                [max(0.0, interval["high"] - at["accuracy"])],
            ]
            axes.errorbar(
                at["accuracy"], y + shift, xerr=reach, fmt="o", markersize=5, capsize=2, **look
            )
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.set_xlabel("accuracy")
    axes.grid(alpha=0.25, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        frameon=False,
        fontsize=9,
        loc="upper center",
        bbox_to_anchor=(0.5, 1.0 + 0.5 / figure.get_figheight()),
        ncols=2,
    )
    return figure


def map_of_rows(
    points: NDArray[np.float32], labels: NDArray[np.int8], right: NDArray[np.bool_]
) -> tuple[Figure, Figure]:
    """Return a map of rows by class, and by right and wrong.

    Args:
        points: float32 of shape (n, 2).
        labels: int8 of shape (n,).
        right: bool of shape (n,).
    """
    classes = [
        (LABEL_NAMES[label], CLASS_COLORS[LABEL_NAMES[label]], labels == label)
        for label in np.unique(labels).tolist()
    ]
    # Wrong ones last, on top.
    outcomes = [("right", "#8a8f98", right), ("wrong", COLORS[3], ~right)]
    size = float(np.clip(14000 / len(points), 7, 30))
    drawn = []
    for groups in (classes, outcomes):
        # Points are a picture of pixels: thousands of elements would be slow on a phone.
        figure = new_figure(WIDTH, HEIGHT, dpi=200)
        axes = figure.subplots()
        for at, (name, color, there) in enumerate(groups):
            marker = "os^"[at]
            axes.scatter(
                points[there, 0],
                points[there, 1],
                s=size,
                color=color,
                alpha=0.75,
                linewidths=0,
                marker=marker,
                rasterized=True,
                label=f"{name} ({int(there.sum()):,})",
            )
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_alpha(0.3)
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=3, frameon=False, markerscale=1.5
        )
        drawn.append(figure)
    return drawn[0], drawn[1]


def controls(rows: Sequence[tuple[str, float, Mapping[str, float] | None]]) -> Figure:
    """Return accuracies with their intervals: a run, and what it is without the right photo.

    Args:
        rows: What each is, its accuracy and its interval; the run first.
    """
    figure = new_figure(WIDTH, 0.9 + 0.5 * len(rows))
    axes = figure.subplots()
    for y, (_, accuracy, interval) in enumerate(rows):
        color = COLORS[0] if not y else COLORS[1]
        axes.barh(y, accuracy, color=color, height=0.55)
        end = accuracy
        if interval is not None:
            reach = [
                [max(0.0, accuracy - interval["low"])],
                [max(0.0, interval["high"] - accuracy)],
            ]
            axes.errorbar(accuracy, y, xerr=reach, fmt="none", color="black", capsize=3)
            end = max(end, interval["high"])
        axes.annotate(share(accuracy), (end, y), (5, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.set_xlabel("accuracy")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def overlaid(histories: Mapping[str, Sequence[Mapping[str, Any]]], key: str, label: str) -> Figure:
    """Return a figure of one column of several runs' histories by epoch.

    Args:
        histories: Run to its epochs.
        key: Column.
        label: Of the axis.
    """
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(WIDTH, HEIGHT)
    axes = figure.subplots()
    for i, (name, history) in enumerate(histories.items()):
        axes.plot(
            [row["epoch"] for row in history],
            [float(row.get(key, np.nan)) for row in history],
            STYLES[i % len(STYLES)],
            marker="os^Dv"[i % 5],
            markersize=4,
            color=COLORS[i % len(COLORS)],
            label=name,
        )
    axes.set(xlabel="epoch", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    legend_below(axes, columns=2)
    return figure


def differences(
    found: Sequence[tuple[str, float, float | None, float | None]], base: str
) -> Figure:
    """Return differences in accuracy from a base, in points, with their intervals.

    Args:
        found: Run, difference and the ends of its interval, as shares.
        base: What it is above.
    """
    figure = new_figure(WIDTH, 1.0 + 0.4 * len(found))
    axes = figure.subplots()
    axes.axvline(0, color="black", linewidth=1, linestyle=":")
    for y, (_, value, low, high) in enumerate(found):
        reach = None
        if low is not None and high is not None:
            reach = [[max(0.0, 100 * (value - low))], [max(0.0, 100 * (high - value))]]
        axes.errorbar(100 * value, y, xerr=reach, fmt="o", color=COLORS[0], capsize=3)
    axes.set_yticks(range(len(found)), [name for name, *_ in found])
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xlabel(f"accuracy above {base}, points")
    axes.grid(alpha=0.25, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
