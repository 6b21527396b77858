"""Steps of small models by one thread and by all: where one is faster.

Each side runs in processes of its own, in turns, so that a machine that slows down meanwhile slows
both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from benchmarks.backends import SMALL, process
from benchmarks.measuring import ratios, spread, written
from benchmarks.sizes import STUDY, Size
from benchmarks.tables import table
from featstore.config import usable_cores
from featstore.encoders.framework import INTRAOP_THREADS
from trainer.model.sizes import is_small

WIDTHS = ((64, 32), (96, 32), (64, 128), (192, 32), (384, 32), (512, 32))
"""Width of a token and rows of a step."""


def sized(width: int, rows: int) -> Size:
    """Return encoders about as the demo's, of another width."""
    return dataclasses.replace(
        SMALL, name=f"{width} × {rows}", width=width, heads=width // 32, rows=rows
    )


SIZES = (*(sized(width, rows) for width, rows in WIDTHS), STUDY)


def measure(
    layers: Sequence[int] = (0, 3),
    rounds: int = 3,
    steps: int = 32,
    sizes: Sequence[Size] = SIZES,
) -> dict[str, Any]:
    """Time the same steps by one thread and by as many as TensorFlow takes.

    Args:
        layers: Values of k_txt.
        rounds: In each, either side runs once.
        steps: That are timed.
        sizes: Of the encoders.

    Returns:
        Of each size and k_txt the seconds of a step on either side, and how many times as fast
        one thread is.
    """
    found = []
    for size in sizes:
        sides: dict[str, list[dict[str, Any]]] = {"one": [], "all": []}
        for _ in range(rounds):
            for name, environment in (("one", {INTRAOP_THREADS: "1"}), ("all", {})):
                sides[name].append(process(environment, size, layers, steps, 0)["steps"])
        for k_txt in layers:
            seconds = {name: [run[str(k_txt)] for run in runs] for name, runs in sides.items()}
            found.append(
                {
                    "width": size.width,
                    "rows": size.rows,
                    "k_txt": k_txt,
                    "one_taken": is_small(size.rows, size.width),
                    **{name: spread(own, 5) for name, own in seconds.items()},
                    "ratio": ratios(seconds["all"], seconds["one"]),
                }
            )
    return {"cores": usable_cores(), "rounds": rounds, "steps": steps, "sizes": found}


def report(figures: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    rows = [
        [
            f"{one['width']} wide, {one['rows']} rows, k_txt {one['k_txt']}",
            "one" if one["one_taken"] else "all",
            written(one["all"], " ms", 2, 1e3),
            written(one["one"], " ms", 2, 1e3),
            written(one["ratio"], "×", 2),
        ]
        for one in figures["sizes"]
    ]
    head = f"A step on TensorFlow, by all {figures['cores']} cores' threads and by one.\n\n"
    return head + table(["encoders, batch", "`train` takes", "all", "one", "all / one"], rows)
