"""The figures of the page, each made from what `eda.json` has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from featstore.config import SPLITS
from featstore.data.labels import labels_of
from trainer.exploration.dots import name_dots
from trainer.exploration.kinds import BALANCE, FREQUENT
from trainer.pages.drawing import CLASS_COLORS, COLORS, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY = "#7a828c"
WIDTH = 5.0
"""Inches: a column of the page on a desk; on a phone the letters are still read."""
_WORDS_SHOWN = 12


def all_figures(found: Mapping[str, Any]) -> dict[str, Figure]:
    """Return every figure that the data have something for, by the name of its file."""
    classes = list(labels_of(found["classes"]))
    figures = {
        "labels": labels(found["labels"], classes),
        "words": histogram(found["words"]["histogram"], "words in a sentence"),
        "rows-a-photo": rows_a_photo(found["rows_a_photo"]["histogram"]),
        "spatial": spatial(found["spatial"]["kinds"], classes),
        "buckets": buckets(found["buckets"]["kinds"], len(classes)),
    }
    tokens = found["tokens"]
    if not tokens["reason"]:
        limit = tokens["sequence_length"]
        figures["tokens"] = histogram(tokens["histogram"], "tokens of a sentence", limit)
    if len(found["photos"]["sizes"]) > 1:
        figures["photo-sizes"] = photo_sizes(found["photos"]["sizes"])
    if found["duplicates"]["photos"] > 1:
        figures["duplicates"] = distances(found["duplicates"])
    if any(at["top"] for at in found["log_odds"]["classes"].values()):
        figures["log-odds"] = log_odds(found["log_odds"])
    if found["hypothesis_only"]["splits"]:
        figures["hypothesis-only"] = hypothesis_only(found["hypothesis_only"])
    return figures


def _plain(axes: Axes, *sides: str) -> None:
    axes.spines[["top", "right", *sides]].set_visible(False)


def _beside(axes: Axes, x: float, text: str, left: bool) -> None:
    """Write beside a vertical line, at its top."""
    axes.annotate(
        text,
        (x, 1),
        xycoords=("data", "axes fraction"),
        xytext=(-6 if left else 6, -4),
        textcoords="offset points",
        ha="right" if left else "left",
        va="top",
        fontsize=9,
    )


def labels(table: Mapping[str, Mapping[str, int]], classes: Sequence[str]) -> Figure:
    """Return the rows of each split, a bar each, by class."""
    splits = [split for split in SPLITS if table[split]["rows"]]
    figure = new_figure(WIDTH, 0.9 + 0.42 * len(splits))
    axes = figure.subplots()
    left = np.zeros(len(splits))
    for name in classes:
        counts = np.array([table[split][name] for split in splits])
        axes.barh(splits, counts, left=left, color=CLASS_COLORS[name], label=name, height=0.65)
        left += counts
    axes.invert_yaxis()
    axes.set_xlabel("rows")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _plain(axes, "left")
    axes.tick_params(axis="y", length=0)
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False
    )
    return figure


def histogram(
    of_class: Mapping[str, Sequence[int]], label: str, limit: int | None = None
) -> Figure:
    """Return the distribution of a length, a line for each class.

    Args:
        of_class: Of each class the rows of length 0, 1, 2 …
        label: Of the length.
        limit: Length at which sentences are cut.
    """
    figure = new_figure(WIDTH, 3.2)
    axes = figure.subplots()
    total = np.sum([np.asarray(counts) for counts in of_class.values()], axis=0)
    # A few very long sentences would squeeze all others.
    shown = int(np.searchsorted(np.cumsum(total), 0.999 * total.sum())) + 1
    shown = max(shown, (limit or 0) + 1)
    for name, counts in of_class.items():
        rows = np.asarray(counts)
        share = 100 * rows / max(rows.sum(), 1)
        inside = share[: shown + 1]
        axes.stairs(
            inside,
            np.arange(len(inside) + 1) - 0.5,
            color=CLASS_COLORS[name],
            linewidth=2,
            label=name,
        )
    if limit is not None:
        axes.axvline(limit + 0.5, color="black", linestyle=":", linewidth=1.5)
        _beside(axes, limit + 0.5, f"cut after {limit}", left=True)
    axes.set_xlim(-0.5, shown + 0.5)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(label)
    axes.set_ylabel("% of the class's rows")
    _plain(axes)
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False
    )
    return figure


def drawn_rows(counts: Sequence[int]) -> int:
    """Return the most rows of a photo that are drawn: those of 99.5 % of the photos."""
    total = np.cumsum(counts)
    return int(np.searchsorted(total, 0.995 * total[-1]))


def rows_a_photo(counts: Sequence[int]) -> Figure:
    """Return how many photos have 1, 2, 3 … rows."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(WIDTH, 2.8)
    axes = figure.subplots()
    shown = drawn_rows(counts)
    axes.bar(range(shown + 1), counts[: shown + 1], color=COLORS[0])
    axes.set_xlim(0.4, shown + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("rows of a photo")
    axes.set_ylabel("photos")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _plain(axes)
    return figure


def spatial(kinds: Mapping[str, Mapping[str, Any]], classes: Sequence[str]) -> Figure:
    """Return of each spatial keyword the share of each class's rows that have it."""
    names = list(kinds)
    figure = new_figure(WIDTH, 1 + 0.36 * len(names))
    axes = figure.subplots()
    height = 0.8 / len(classes)
    for at, name in enumerate(classes):
        shares = [100 * (kinds[kind]["share_of"][name] or 0) for kind in names]
        axes.barh(
            np.arange(len(names)) - 0.4 + height * (at + 0.5),
            shares,
            height=height,
            color=CLASS_COLORS[name],
            label=name,
        )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("% of the class's rows")
    _plain(axes, "left")
    axes.tick_params(axis="y", length=0)
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False
    )
    return figure


def buckets(kinds: Mapping[str, Mapping[str, Any]], classes: int) -> Figure:
    """Return the buckets by size and share of entailment, with intervals and what is balanced."""
    figure = new_figure(WIDTH, 4.4)
    axes = figure.subplots()
    named = {name: kind for name, kind in kinds.items() if name != "any" and kind["rows"]}
    middle = 100 / classes
    axes.axhspan(middle - 100 * BALANCE, middle + 100 * BALANCE, color=COLORS[2], alpha=0.18, lw=0)
    axes.axvline(100 * FREQUENT, color="black", linestyle=":", linewidth=1)
    for kind in named.values():
        x, y, low, high = _place(kind)
        color = COLORS[2] if kind["verdict"] == "fit" else GREY
        spread = [[max(y - low, 0)], [max(high - y, 0)]]
        axes.errorbar(x, y, spread, fmt="o", color=color, capsize=0, markersize=6)
    axes.set_xscale("log")
    least = min((100 * kind["share"] for kind in named.values()), default=1)
    ticks = [tick for tick in (0.01, 0.1, 1, 2, 5, 10, 20, 50, 100) if tick >= least / 1.5]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_formatter(lambda value, _: "")
    axes.set_xlim(least / 1.5, 110)
    ends = [middle - 100 * BALANCE, middle + 100 * BALANCE]
    ends += [end for kind in named.values() for end in _place(kind)[2:]]
    axes.set_ylim(max(min(ends) - 6, 0), min(max(ends) + 6, 100))
    axes.set_xlabel("% of train rows in the bucket (log scale)")
    axes.set_ylabel("% entailment among them")
    _plain(axes)
    name_dots(axes, {name: _place(kind) for name, kind in named.items()})
    return figure


def _place(kind: Mapping[str, Any]) -> tuple[float, float, float, float]:
    """Return a bucket's size, and its share of entailment with its interval, in per cent."""
    at = kind["entailment"]
    return 100 * kind["share"], 100 * at["share"], 100 * at["low"], 100 * at["high"]


def photo_sizes(sizes: Sequence[Mapping[str, int]]) -> Figure:
    """Return the sizes of photos: a dot each where they are few, else cells."""
    figure = new_figure(WIDTH, 4)
    axes = figure.subplots()
    width = np.array([size["width"] for size in sizes])
    height = np.array([size["height"] for size in sizes])
    photos = np.array([size["photos"] for size in sizes])
    if len(sizes) <= 200:
        areas = 12 + 400 * photos / photos.max()
        axes.scatter(width, height, areas, color=COLORS[0], alpha=0.75, linewidths=0)
    else:
        cells = axes.hexbin(
            width, height, photos, gridsize=36, reduce_C_function=np.sum, bins="log", cmap="viridis"
        )
        figure.colorbar(cells, label="photos (log scale)")
    axes.set_xlim(0, 1.08 * width.max())
    axes.set_ylim(0, 1.08 * height.max())
    axes.set_xlabel("width in pixels")
    axes.set_ylabel("height in pixels")
    _plain(axes)
    return figure


def distances(found: Mapping[str, Any]) -> Figure:
    """Return in how many bits the hashes of two photos differ, of all pairs."""
    figure = new_figure(WIDTH, 3)
    axes = figure.subplots()
    counts = np.asarray(found["histogram"])
    bits = np.flatnonzero(counts)
    near = bits <= found["distance"]
    axes.bar(bits, counts[bits], width=1.6, color=np.where(near, COLORS[1], GREY))
    limit = found["distance"] + 0.5
    axes.axvline(limit, color="black", linestyle=":", linewidth=1.5)
    _beside(axes, limit, f"near-duplicates:\nup to {found['distance']} bits", left=False)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.5)
    axes.set_xlim(-1, 65)
    axes.set_xlabel("bits of 64 in which the hashes of two photos differ")
    axes.set_ylabel("pairs of photos (log scale)")
    _plain(axes)
    return figure


def log_odds(found: Mapping[str, Any]) -> Figure:
    """Return the words of each class with the largest z, a panel a class."""
    classes = {name: at["top"][:_WORDS_SHOWN] for name, at in found["classes"].items()}
    rows = max(len(top) for top in classes.values())
    figure = new_figure(1.2 + 2.1 * len(classes), 1 + 0.26 * rows)
    panels = figure.subplots(1, len(classes), sharex=True)
    for axes, (name, top) in zip(panels, classes.items(), strict=True):
        axes.barh(range(len(top)), [word["z"] for word in top], color=CLASS_COLORS[name])
        axes.set_yticks(range(len(top)), [word["word"] for word in top])
        axes.set_ylim(rows - 0.4, -0.6)
        axes.set_title(name)
        axes.set_xlabel("z of the log-odds")
        axes.axvline(found["limit"], color="black", linestyle=":", linewidth=1)
        _plain(axes, "left")
        axes.tick_params(axis="y", length=0)
    return figure


def hypothesis_only(found: Mapping[str, Any]) -> Figure:
    """Return the accuracy of words alone with its interval, beside always giving one answer."""
    splits = found["splits"]
    figure = new_figure(WIDTH, 1.2 + 0.5 * len(splits))
    axes = figure.subplots()
    for at, split in enumerate(splits.values()):
        accuracy, majority = 100 * split["accuracy"], 100 * split["majority"]["share"]
        interval = split["intervals"]["accuracy"]
        label = None if at else "words alone, with 95 % interval"
        if interval:
            ends = [100 * interval["low"], 100 * interval["high"]]
            axes.plot(ends, [at, at], color=COLORS[1], linewidth=3, solid_capstyle="butt")
        axes.plot([accuracy], [at], "o", color=COLORS[1], markersize=8, label=label)
        label = None if at else f"always {split['majority']['class']}"
        axes.plot([majority], [at], "D", color=GREY, markersize=7, label=label)
        axes.annotate(
            f"{accuracy:.1f} %",
            (accuracy, at),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
        )
    axes.set_yticks(range(len(splits)), list(splits))
    axes.set_ylim(len(splits) - 0.4, -0.7)
    axes.set_xlim(0, 100)
    axes.set_xlabel("accuracy in %")
    _plain(axes, "left")
    axes.tick_params(axis="y", length=0)
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False
    )
    return figure


def photo_grid(photos: Sequence[np.ndarray], titles: Sequence[str], columns: int = 4) -> Figure:
    """Return photos with a text under each.

    Args:
        photos: uint8 of shape (height, width, 3), at least one.
        titles: As many.
        columns: Photos side by side.
    """
    import textwrap

    lines = -(-len(photos) // columns)
    figure = new_figure(2.6 * columns, 2.9 * lines)
    panels = figure.subplots(lines, columns, squeeze=False).reshape(-1)
    for axes in panels:
        axes.set_axis_off()
    for axes, photo, title in zip(panels, photos, titles, strict=False):
        axes.imshow(photo)
        # Dollar signs would start a formula.
        text = textwrap.shorten(title, 110, placeholder=" …").replace("$", r"\$")
        axes.set_title(textwrap.fill(text, 34), fontsize=8, y=-0.05, va="top")
    return figure
