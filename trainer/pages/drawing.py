"""Figures for pages and files: matplotlib without pyplot, whose figures are global."""

from __future__ import annotations

import base64
import html
import io
import itertools
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from featstore.publish import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c6d00")
"""Okabe and Ito's colours that stand out from white and from a page's dark ground alike."""
CLASS_COLORS = {"entailment": "#0072b2", "contradiction": "#d55e00", "neutral": "#009e73"}
INK = "#010203"
"""The ink of a figure; in a page it is the ink of the text around it."""
GROUND = "#fdfefd"
"""What covers lines behind a text: white in a file, in a page the ground of the page."""
DPI = 120

_numbers = itertools.count(1)


def new_figure(width: float = 6.4, height: float = 3.6, **options: Any) -> Figure:
    """Return a figure without axes, to be saved by `png_bytes` or put in a page by `svg`.

    Args:
        width: Inches.
        height: Inches.
        options: Of matplotlib's `Figure`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", **options)
    FigureCanvasAgg(figure)
    return figure


def _ink(figure: Figure) -> None:
    """Give everything that is neither data nor coloured by hand the ink."""
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_hex
    from matplotlib.lines import Line2D
    from matplotlib.text import Text

    black = to_hex("black")
    for axes in figure.axes:
        axes.set_facecolor("none")
        axes.tick_params(which="both", color=INK, labelcolor=INK)
        for spine in axes.spines.values():
            spine.set_edgecolor(INK)
        legend = axes.get_legend()
        if legend is not None:
            legend.get_frame().set(facecolor="none", edgecolor="none")
    # Also the lines of legends and of error bars.
    for line in figure.findobj(Line2D):
        assert isinstance(line, Line2D)
        if to_hex(line.get_color()) == black:
            line.set(color=INK, markeredgecolor=INK)
    for lines in figure.findobj(LineCollection):
        assert isinstance(lines, LineCollection)
        if {to_hex(cast(Any, color)) for color in lines.get_colors()} == {black}:
            lines.set_color(INK)
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        if to_hex(text.get_color()) == black:
            text.set_color(INK)


def svg(figure: Figure, alt: str) -> str:
    """Return a figure as an SVG element for a page: its text is text, its ink the page's.

    Args:
        figure: Is changed: its grounds are gone, and black is the page's ink.
        alt: What it shows, for those who do not see it.
    """
    import matplotlib

    _ink(figure)
    number = next(_numbers)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"figure-{number}"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # Names are shared by all figures of a page.
    text = re.sub(r'(\bid="|href="#|url\(#)(?=[^"\)])', rf"\g<1>f{number}-", text)
    text = text.replace(INK, "currentColor").replace(GROUND, "var(--ground)")
    width, height = (72 * inches for inches in figure.get_size_inches())
    opening = (
        f'<svg class="figure" viewBox="0 0 {width:g} {height:g}" role="img"'
        f' aria-label="{html.escape(alt)}" style="max-width:{width * 4 / 3:.0f}px"'
        ' xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return opening + text.partition(">")[2]


def png_bytes(figure: Figure) -> bytes:
    """Return a figure as a PNG on white."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return file.getvalue()


def write_png(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as a PNG on white, whole or not at all.

    Raises:
        FeatstoreError: The file cannot be written.
    """
    write_bytes(path, png_bytes(figure))


def data_uri(data: bytes, kind: str) -> str:
    """Return bytes as an address that needs no request.

    Args:
        data: Of a file.
        kind: Its media type, such as "image/png".
    """
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def photo_uri(image: Image.Image, size: int = 320, quality: int = 80) -> str:
    """Return a photo as the address of a JPEG.

    Args:
        image: RGB.
        size: Pixels of its longer side, at most.
        quality: Of the JPEG, 1 to 95.
    """
    small = image.convert("RGB")
    small.thumbnail((size, size))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=quality, optimize=True)
    return data_uri(file.getvalue(), "image/jpeg")


def legend_below(axes: Axes, columns: int = 0) -> None:
    """Put a legend of what is labelled below some axes, where it cannot hide a curve.

    Args:
        axes: The axes.
        columns: Of the legend; 0: all in one line.
    """
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, -0.14),
            ncols=columns or len(handles),
            columnspacing=1.2,
            frameon=False,
            fontsize=9,
        )


def bars(
    names: Sequence[str], values: Sequence[float], label: str, color: str = COLORS[0]
) -> Figure:
    """Return a figure of one horizontal bar a name, the first on top.

    Args:
        names: Of the bars.
        values: As long as `names`.
        label: Of the axis of values.
        color: Of the bars.
    """
    figure = new_figure(6.4, 0.6 + 0.28 * len(names))
    axes = figure.subplots()
    axes.barh(range(len(names)), values, color=color)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
