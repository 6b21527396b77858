"""The pictures of a search: history, importance, parallel coordinates."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from featstore.publish import publish
from trainer.tuning.space import Parameter, shown
from trainer.tuning.study import Search

PLOT_DPI = 120


def draw_plots(search: Search, rows: Sequence[dict[str, Any]]) -> list[Path]:
    """Draw the pictures for which there are enough trials into the search's folder.

    Args:
        search: The search.
        rows: Its trials, the best first, from `trainer.tuning.table.ranked`.

    Returns:
        The files.
    """
    complete = [row for row in rows if row["state"] == "complete"]
    varied = [
        parameter
        for parameter in search.space.parameters
        if len({str(row["params"][parameter.name]) for row in complete}) > 1
    ]
    figures = {}
    if complete:
        figures["history"] = _history(search, rows)
    # Where every value is the same, nothing has more importance than anything else.
    if varied and len(complete) >= 4 and len({row["value"] for row in complete}) > 1:
        figures["importance"] = _importance(search, [parameter.name for parameter in varied])
    if varied:
        figures["parallel_coordinates"] = _parallel_coordinates(search, rows, varied)
    paths = []
    for name, figure in figures.items():
        paths.append(search.folder / f"{name}.png")
        with publish(paths[-1]) as temporary:
            figure.savefig(temporary, dpi=PLOT_DPI, format="png", bbox_inches="tight")
    return paths


def _figure(width: float, height: float, title: str) -> tuple[Any, Any]:
    # Without pyplot, whose backend and figures are global.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _history(search: Search, rows: Sequence[dict[str, Any]]) -> Any:
    """Draw each trial's value, and the best one that was known after it."""
    from matplotlib.ticker import MaxNLocator

    metric = search.space.search.metric
    figure, axes = _figure(8, 4.5, f"{search.name}: value of each trial")
    drawn = sorted(rows, key=lambda row: int(row["trial"]))
    for state, style in (
        ("complete", {"color": "C0"}),
        ("pruned", {"facecolors": "none", "edgecolors": "C0"}),
    ):
        points = [row for row in drawn if row["state"] == state and row["value"] is not None]
        if points:
            numbers = [row["trial"] for row in points]
            axes.scatter(numbers, [row["value"] for row in points], label=state, zorder=3, **style)
    failed = [row["trial"] for row in drawn if row["state"] == "fail"]
    if failed:
        # They have no value: on the lower edge.
        place = axes.get_xaxis_transform()
        axes.scatter(
            failed, [0.02] * len(failed), transform=place, marker="x", c="C3", label="fail"
        )
    complete = [row for row in drawn if row["state"] == "complete"]
    values = np.array([row["value"] for row in complete])
    best = (np.minimum if search.space.search.minimises else np.maximum).accumulate(values)
    steps = [row["trial"] for row in complete] + [drawn[-1]["trial"]]
    axes.step(steps, [*best, best[-1]], where="post", color="C1", label="best so far")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("trial")
    axes.set_ylabel(metric)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return figure


def _importance(search: Search, varied: list[str]) -> Any:
    """Draw how much of the value's variance each setting explains."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = optuna.importance.get_param_importances(
            search.study,
            evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0),
            params=varied,
        )
    names, shares = list(found)[::-1], list(found.values())[::-1]
    title = f"{search.name}: importance for {search.space.search.metric} (fANOVA)"
    figure, axes = _figure(8, 1.2 + 0.45 * len(names), title)
    bars = axes.barh(names, shares)
    axes.bar_label(bars, [f"{share:.2f}" for share in shares], padding=4)
    axes.set_xlim(0, max(1e-9, *shares) * 1.1)
    axes.set_xlabel("share of the explained variance")
    return figure


def _parallel_coordinates(
    search: Search, rows: Sequence[dict[str, Any]], varied: Sequence[Parameter]
) -> Any:
    """Draw each trial as a line through its settings, coloured by its value."""
    from matplotlib import colormaps
    from matplotlib.patheffects import withStroke

    complete = [row for row in rows if row["state"] == "complete"]
    values = [row["value"] for row in complete]
    low, high = min(values), max(values)
    title = f"{search.name}: settings and values; the best trial is the thick line"
    figure, axes = _figure(max(7, 1.8 * (len(varied) + 1)), 4.5, title)
    columns = [_axis(p) for p in varied]
    span = high - low or 1.0
    metric = search.space.search.metric
    ticks = [(i / 4, shown(low + i / 4 * span)) for i in range(5)]
    columns.append((lambda value: (value - low) / span, ticks))
    colours = colormaps["viridis" if search.space.search.minimises else "viridis_r"]
    # `rows` has the best one first, which is drawn last.
    for rank, row in reversed(list(enumerate(complete))):
        points = [*(row["params"][p.name] for p in varied), row["value"]]
        heights = [place(value) for (place, _), value in zip(columns, points, strict=True)]
        colour = colours((row["value"] - low) / span)
        axes.plot(heights, color=colour, lw=1.2 if rank else 4, alpha=0.8 if rank else 1)
    for x, (_, ticks) in enumerate(columns):
        axes.axvline(x, color="0.5", lw=0.8, zorder=0)
        for height, text in ticks:
            axes.text(
                x + 0.02,
                height,
                text,
                va="center",
                zorder=4,
                fontsize=9,
                path_effects=[withStroke(linewidth=3, foreground="white")],
            )
    axes.set_xticks(range(len(columns)), [*(p.name for p in varied), metric])
    axes.set_yticks([])
    axes.set_xlim(-0.1, len(columns) - 0.7)
    axes.spines[:].set_visible(False)
    return figure


def _axis(parameter: Parameter) -> tuple[Callable[[Any], float], list[tuple[float, str]]]:
    """Return where a setting's values are on an axis from 0 to 1, and its ticks."""
    if parameter.kind == "choice":
        last = len(parameter.values) - 1
        places = [i / last for i in range(last + 1)]
        texts = [shown(value) for value in parameter.values]
        return lambda value: places[parameter.values.index(value)], list(
            zip(places, texts, strict=True)
        )
    scale = math.log if parameter.kind.startswith("log") else float
    low, high = (scale(bound) for bound in parameter.values)

    def place(value: float) -> float:
        return (scale(value) - low) / (high - low)

    middle = [low + i / 4 * (high - low) for i in range(5)]
    numbers = [math.exp(x) if scale is math.log else x for x in middle]
    return place, [(i / 4, shown(number)) for i, number in enumerate(numbers)]
