"""The pictures of a search: history, importance, parallel coordinates."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from featstore.publish import write_bytes
from trainer.tuning.space import Parameter, shown
from trainer.tuning.study import Search

PLOT_DPI = 120
# With fewer, the importance of each setting is mostly that of the draw.
IMPORTANCE_TRIALS = 10
# Drawn strongly among many.
BEST_TRIALS = 3


def draw_plots(search: Search, rows: Sequence[dict[str, Any]]) -> list[Path]:
    """Draw the pictures for which there are enough trials into the search's folder.

    A picture of an earlier time for which there are not is removed.

    Args:
        search: The search.
        rows: Its trials, the best first, from `trainer.tuning.table.ranked`.

    Returns:
        The files.
    """
    varied = _varied(search, rows)
    figures = {}
    if _complete(rows):
        figures["history"] = _history(search, rows)
    if not no_importance(search, rows):
        figures["importance"] = _importance(search, [parameter.name for parameter in varied])
    if varied:
        figures["parallel_coordinates"] = _parallel_coordinates(search, rows, varied)
    paths = []
    for name in ("history", "importance", "parallel_coordinates"):
        path = search.folder / f"{name}.png"
        if name not in figures:
            path.unlink(missing_ok=True)
            continue
        paths.append(path)
        picture = io.BytesIO()
        figures[name].savefig(picture, dpi=PLOT_DPI, format="png", bbox_inches="tight")
        write_bytes(path, picture.getvalue())
    return paths


def no_importance(search: Search, rows: Sequence[dict[str, Any]]) -> str:
    """Return why the importance of the settings is not drawn, as a line; "" where it is.

    Args:
        search: The search.
        rows: Its trials, in any order.
    """
    varied, complete = _varied(search, rows), _complete(rows)
    if len(search.space.parameters) < 2:
        why = "it compares settings, and only one is searched"
    elif len(complete) < IMPORTANCE_TRIALS:
        why = f"{len(complete)} complete trials, expected at least {IMPORTANCE_TRIALS}"
    elif len(varied) < 2 or len({row["value"] for row in complete}) < 2:
        why = "the complete trials differ in fewer than two settings, or not in their value"
    else:
        return ""
    return f"no importance.png: {why}"


def _complete(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["state"] == "complete"]


def _varied(search: Search, rows: Sequence[dict[str, Any]]) -> list[Parameter]:
    """Return the settings in which the complete trials differ."""
    return [
        parameter
        for parameter in search.space.parameters
        if len({str(row["params"][parameter.name]) for row in _complete(rows)}) > 1
    ]


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
    complete = _complete(drawn)
    values = np.array([row["value"] for row in complete])
    best = (np.minimum if search.space.search.minimises else np.maximum).accumulate(values)
    steps = [row["trial"] for row in complete] + [drawn[-1]["trial"]]
    axes.step(steps, [*best, best[-1]], where="post", color="C1", label="best so far")
    first = _complete(rows)[0]
    axes.scatter(
        [first["trial"]],
        [first["value"]],
        marker="*",
        s=260,
        c="C1",
        edgecolors="black",
        zorder=4,
        label=f"best: {first['run']}, {first['value']:.4f}",
    )
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
    """Draw each trial as a line through its settings to its value, whose axis is the legend."""
    from matplotlib import colormaps
    from matplotlib.patheffects import withStroke

    complete = _complete(rows)
    values = [row["value"] for row in complete]
    low, high = min(values), max(values)
    title = (
        f"{search.name}: settings and value of each trial; thick: {complete[0]['run']}, the best"
    )
    figure, axes = _figure(max(7, 1.8 * (len(varied) + 1)), 4.5, title)
    span = high - low or 1.0
    columns = [_axis(p) for p in varied]
    columns.append((lambda value: (value - low) / span, _ticks(low, low + span, lambda x: x)))
    colours = colormaps["viridis" if search.space.search.minimises else "viridis_r"]
    faint = 0.8 if len(complete) <= 2 * BEST_TRIALS else 0.35
    # `rows` has the best one first, which is drawn last.
    for rank, row in reversed(list(enumerate(complete))):
        points = [*(row["params"][p.name] for p in varied), row["value"]]
        heights = [place(value) for (place, _), value in zip(columns, points, strict=True)]
        colour = colours((row["value"] - low) / span)
        strong = rank < BEST_TRIALS
        width = 4.0 if not rank else 2.2 if strong else 1.0
        axes.plot(heights, color=colour, lw=width, alpha=1.0 if strong else faint)
    last = len(columns) - 1
    for x, (_, ticks) in enumerate(columns):
        if x < last:
            axes.axvline(x, color="0.5", lw=0.8, zorder=0)
        for height, text in ticks:
            axes.text(
                x + (0.07 if x == last else 0.02),
                height,
                text,
                va="center",
                zorder=4,
                fontsize=9,
                path_effects=[withStroke(linewidth=3, foreground="white")],
            )
    strip = np.linspace(0, 1, 256)[:, np.newaxis]
    axes.imshow(
        strip,
        cmap=colours,
        aspect="auto",
        origin="lower",
        extent=(last, last + 0.05, 0, 1),
        zorder=3,
    )
    axes.set_xticks(range(len(columns)), [*(p.name for p in varied), search.space.search.metric])
    axes.set_yticks([])
    axes.set_xlim(-0.1, last + 0.3)
    axes.set_ylim(-0.04, 1.04)
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
    scale: Callable[[float], float] = math.log if parameter.kind.startswith("log") else float
    low, high = (scale(bound) for bound in parameter.values)

    def place(value: float) -> float:
        return (scale(value) - low) / (high - low)

    whole = parameter.kind in ("int", "log_int")
    return place, _ticks(parameter.values[0], parameter.values[1], scale, whole)


def _ticks(
    low: float, high: float, scale: Callable[[float], float], whole: bool = False
) -> list[tuple[float, str]]:
    """Return round numbers of a range, each with its place from 0 to 1 and its text."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    locator: Any = MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=whole)
    if scale is math.log:
        locator = LogLocator(subs=(1.0,) if high / low > 1e3 else (1.0, 2.0, 5.0), numticks=12)
    tolerance = 1e-9 * (high - low)
    found = [x for x in locator.tick_values(low, high) if low - tolerance <= x <= high + tolerance]
    if len(found) < 2:
        found = [low, high]
    start, end = scale(low), scale(high)
    numbers = [round(x) if whole else float(x) for x in found]
    return [((scale(x) - start) / (end - start), shown(x)) for x in numbers]
