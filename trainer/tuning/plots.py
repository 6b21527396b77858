"""The figures of a search, for its page and as pictures: history, importance, coordinates."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.trial import TrialState

from featstore.quantities import share
from trainer.pages.drawing import COLORS, GROUND, INK, legend_below, new_figure, write_png
from trainer.tuning.space import Parameter, shown
from trainer.tuning.storage import quiet_optuna
from trainer.tuning.study import Search

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURES = ("history", "importance", "parallel_coordinates")
VALUES = ("#0072b2", "#7a6fb0", "#c26a86", "#d08a2e")
"""From the best value to the worst; each stands out from white and from a dark ground."""
DRAWS, TREES, WITHIN = 20, 6, 0.9
"""Bootstrap draws of the trials, trees of the forest that each is given, and the share of the
draws that lies between the ends of what is drawn."""
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
    figures = search_figures(search, rows)
    paths = []
    for name in FIGURES:
        path = search.folder / f"{name}.png"
        if name not in figures:
            path.unlink(missing_ok=True)
            continue
        paths.append(path)
        write_png(figures[name], path)
    return paths


def search_figures(
    search: Search,
    rows: Sequence[dict[str, Any]],
    shares: Mapping[str, NDArray[np.float64]] | None = None,
) -> dict[str, Figure]:
    """Return the figures for which there are enough trials, by their names in `FIGURES`.

    Args:
        search: The search.
        rows: Its trials, the best first.
        shares: Of `known_importances`; None: computed here.
    """
    varied = varied_parameters(search, rows)
    figures = {}
    if _complete(rows):
        figures["history"] = _history(search, rows)
    if shares := known_importances(search, rows) if shares is None else shares:
        figures["importance"] = _importance(search, shares)
    if varied:
        figures["parallel_coordinates"] = _parallel_coordinates(search, rows, varied)
    return figures


def no_importance(search: Search, rows: Sequence[dict[str, Any]]) -> str:
    """Return why the importance of the settings is not drawn, as a line; "" where it is.

    Args:
        search: The search.
        rows: Its trials, in any order.
    """
    varied, complete = varied_parameters(search, rows), _complete(rows)
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


def varied_parameters(search: Search, rows: Sequence[dict[str, Any]]) -> list[Parameter]:
    """Return the settings in which the complete trials differ."""
    return [
        parameter
        for parameter in search.space.parameters
        if len({str(row["params"][parameter.name]) for row in _complete(rows)}) > 1
    ]


def _figure(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    figure = new_figure(width, height)
    axes = figure.subplots()
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _history(search: Search, rows: Sequence[dict[str, Any]]) -> Figure:
    """Draw each trial's value, and the best one that was known after it."""
    from matplotlib.ticker import MaxNLocator

    metric = search.space.search.metric
    figure, axes = _figure(8, 4.5, f"{search.name}: value of each trial")
    drawn = sorted(rows, key=lambda row: int(row["trial"]))
    styles: tuple[tuple[str, dict[str, Any]], ...] = (
        ("complete", {"color": COLORS[0]}),
        ("pruned", {"facecolors": "none", "edgecolors": COLORS[0]}),
    )
    for state, style in styles:
        points = [row for row in drawn if row["state"] == state and row["value"] is not None]
        if points:
            numbers = [row["trial"] for row in points]
            axes.scatter(numbers, [row["value"] for row in points], label=state, zorder=3, **style)
    failed = [row["trial"] for row in drawn if row["state"] == "fail"]
    if failed:
        # They have no value: on the lower edge.
        place = axes.get_xaxis_transform()
        axes.scatter(
            failed, [0.02] * len(failed), transform=place, marker="x", c=COLORS[3], label="fail"
        )
    complete = _complete(drawn)
    values = np.array([row["value"] for row in complete])
    best = (np.minimum if search.space.search.minimises else np.maximum).accumulate(values)
    steps = [row["trial"] for row in complete] + [drawn[-1]["trial"]]
    axes.step(steps, [*best, best[-1]], where="post", color=COLORS[1], label="best so far")
    first = _complete(rows)[0]
    axes.scatter(
        [first["trial"]],
        [first["value"]],
        marker="*",
        s=260,
        c=COLORS[1],
        edgecolors=INK,
        zorder=4,
        label=f"best: {first['run']}, {first['value']:.4f}",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("trial")
    axes.set_ylabel(metric)
    legend_below(axes, columns=3)
    return figure


def known_importances(
    search: Search, rows: Sequence[dict[str, Any]]
) -> dict[str, NDArray[np.float64]]:
    """Return `importances`; empty where `no_importance` says why."""
    return (
        {} if no_importance(search, rows) else importances(search, varied_parameters(search, rows))
    )


def importances(search: Search, varied: Sequence[Parameter]) -> dict[str, NDArray[np.float64]]:
    """Return how much of the value's variance each setting explains, and how sure that is.

    fANOVA (Hutter et al. 2014, "An efficient approach for assessing hyperparameter
    importance", sec. 3), over a forest for each of `DRAWS` bootstrap draws of the trials.

    Args:
        search: The search.
        varied: The settings in which its complete trials differ.

    Returns:
        Name to the shares of the explained variance, float64 of shape (draws,); the largest
        mean first. Empty where no draw could tell the trials apart.
    """
    names = [parameter.name for parameter in varied]
    complete = search.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    rng = np.random.default_rng(0)
    found: list[dict[str, float]] = []
    for seed in range(DRAWS):
        drawn = [complete[i] for i in rng.integers(len(complete), size=len(complete))]
        evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=TREES, seed=seed)
        # A draw of trials of one value, or that lack one of a setting's, says nothing.
        with quiet_optuna(), warnings.catch_warnings(), contextlib.suppress(RuntimeError):
            warnings.simplefilter("ignore")
            study = optuna.create_study(direction=search.study.direction)
            study.add_trials(drawn)
            found.append(
                optuna.importance.get_param_importances(study, evaluator=evaluator, params=names)
            )
    shares = {name: np.array([one[name] for one in found]) for name in names} if found else {}
    return dict(sorted(shares.items(), key=lambda pair: -float(pair[1].mean())))


def _importance(search: Search, shares: Mapping[str, NDArray[np.float64]]) -> Figure:
    """Draw the mean of each setting's importance, and where `WITHIN` of the draws lie."""
    names = list(shares)[::-1]
    title = f"{search.name}: importance for {search.space.search.metric} (fANOVA)"
    figure, axes = _figure(8, 1.4 + 0.45 * len(names), title)
    means = np.array([shares[name].mean() for name in names])
    low, high = np.quantile(
        [shares[name] for name in names], [(1 - WITHIN) / 2, (1 + WITHIN) / 2], axis=1
    )
    axes.barh(names, means, color=COLORS[0], height=0.6)
    # A mean may lie outside of the draws' middle.
    reach = np.maximum([means - low, high - means], 0)
    axes.errorbar(means, range(len(names)), xerr=reach, fmt="none", color="black", capsize=3)
    for place, (mean, end) in enumerate(zip(means, np.maximum(high, means), strict=True)):
        axes.annotate(f"{mean:.2f}", (end, place), (6, 0), textcoords="offset points", va="center")
    axes.set_xlim(0, max(1e-9, *high) * 1.12)
    axes.set_xlabel(f"share of the explained variance; line: {share(WITHIN, 0)} of the draws")
    return figure


def _parallel_coordinates(
    search: Search, rows: Sequence[dict[str, Any]], varied: Sequence[Parameter]
) -> Figure:
    """Draw each trial as a line through its settings to its value, whose axis is the legend."""
    from matplotlib.colors import LinearSegmentedColormap

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
    ends = VALUES if search.space.search.minimises else VALUES[::-1]
    colours = LinearSegmentedColormap.from_list("values", ends)
    faint = 0.8 if len(complete) <= 2 * BEST_TRIALS else 0.5
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
                bbox={"facecolor": GROUND, "edgecolor": "none", "pad": 0.6, "alpha": 0.85},
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
