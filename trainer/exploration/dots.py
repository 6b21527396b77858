"""Names beside the dots of a figure, where they cover each other least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LETTER, _LINE, _DOT = 5.2, 10.5, 5.0
"""Points: width and height of a letter of 9 points, and half of a dot."""
_SIDES = ((1, 0), (-1, 0), (1, 10), (-1, 10), (1, -10), (-1, -10), (0, 1), (0, -1))
"""Right, left, and so on: across, and points up; (0, 1) and (0, -1) beyond the interval's end."""
_OUTSIDE = 1e4

Box = tuple[float, float, float, float]


def name_dots(axes: Axes, dots: Mapping[str, tuple[float, float, float, float]]) -> None:
    """Write each dot's name beside it.

    Args:
        axes: Whose scales and limits are set.
        dots: Name to x, y, and the ends of the interval of y.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    scale = 72 / figure.dpi

    def at(x: float, y: float) -> tuple[float, float]:
        left, up = axes.transData.transform((x, y)) * scale
        return float(left), float(up)

    ends = {name: (at(x, low), at(x, high)) for name, (x, _, low, high) in dots.items()}
    taken: list[Box] = [
        (x - _DOT, low - _DOT, x + _DOT, high + _DOT) for (x, low), (_, high) in ends.values()
    ]
    frame = [float(side) * scale for side in axes.bbox.extents]
    for name, (x, y, _, _) in sorted(dots.items(), key=lambda item: -item[1][1]):
        (_, low), (_, high) = ends[name]
        tried = []
        for number, (side, up) in enumerate(_SIDES):
            box = _box(*at(x, y), low, high, _LETTER * len(name), side, up)
            cost = sum(_overlap(box, other) for other in taken)
            cost += 0 if _inside(box, frame) else _OUTSIDE
            tried.append((cost, number, box))
        *_, best = min(tried)
        taken.append(best)
        middle = ((best[0] + best[2]) / 2, (best[1] + best[3]) / 2)
        dot = at(x, y)
        axes.annotate(
            name,
            (x, y),
            xytext=(middle[0] - dot[0], middle[1] - dot[1]),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=9,
        )


def _box(x: float, y: float, low: float, high: float, width: float, side: int, up: float) -> Box:
    """Return the box of a name beside a dot, in points."""
    if side:
        left = x + 6 if side > 0 else x - 6 - width
        bottom = y + up - _LINE / 2
    else:
        left = x - width / 2
        bottom = high + 3 if up > 0 else low - 3 - _LINE
    return left, bottom, left + width, bottom + _LINE


def _overlap(one: Box, other: Box) -> float:
    """Return the area that two boxes share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0) * max(height, 0)


def _inside(box: Box, frame: Sequence[float]) -> bool:
    return frame[0] <= box[0] and box[2] <= frame[2] and frame[1] <= box[1] and box[3] <= frame[3]
