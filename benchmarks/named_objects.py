"""Where a run on the demo's scenes looks: at the shapes that its sentence names, or elsewhere.

The scenes are drawn from a seed, so it is known where each shape is. Patches of the demo's
encoder are small enough (12 of 96 pixels) to tell the shapes apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.tables import table
from featstore import demo
from featstore.demo import scenes
from featstore.demo.scenes import Scene, Shape, Statement
from featstore.errors import DataError

PLACES = ("named shapes", "other shapes", "background")


def measure(run: Path, rows: int = 300, seed: int = 0) -> dict[str, Any]:
    """Compare what a patch gets from each map on the named shapes with what it gets elsewhere.

    Args:
        run: Folder of a run on the demo, of any control but hypothesis-only.
        rows: Rows of the test split; only those are used whose scene has a named shape and
            another one. Half of them are errors, where there are enough.
        seed: Of the sample.

    Returns:
        `rows`, `images`, `area` (share of the patches that lie on named shapes), and by map and
        place the mean over rows of a patch's value there over the mean of all patches, with its
        interval over scenes; `strongest`: share of rows whose strongest patch is on a named shape.

    Raises:
        DataError: No row can be used.
    """
    from trainer import load_run
    from trainer.results.explain.agreement import mean_of
    from trainer.statistics import Clustered

    drawn, _ = scenes.draw_questions(demo.IMAGES, demo.SEED)
    statements = {each.text: each for each in scenes.STATEMENTS}
    explanation = load_run(run).explain(rows=rows, sample=1, seed=seed)
    grid = (explanation.patches.rows, explanation.patches.columns)
    leading = explanation.patches.leading
    found: dict[str, list[list[float]]] = {}
    ids, areas = [], []
    for row in explanation.rows:
        scene = drawn[int(row.image_id.rpartition("-")[2])]
        places = places_of(scene, statements[row.hypothesis], grid)
        if places is None:
            continue
        ids.append(row.image_id)
        areas.append(float(places[0].mean()))
        maps = row.maps
        for name, values in (
            ("attention", maps.mean_attention[-1, leading:]),
            ("gradient × input", np.abs(maps.token_parts[leading:])),
            ("occlusion", np.abs(maps.occlusion[0])),
            ("occlusion of 3 × 3", np.abs(maps.occlusion[1])),
        ):
            values = values.astype(np.float64)
            parts = [float(values[place].mean() / values.mean()) for place in places]
            found.setdefault(name, []).append([*parts, float(places[0][values.argmax()])])
    if not ids:
        raise DataError(
            f"{run}: no row of the sample names one of several shapes; give more --rows"
        )
    clustered = Clustered(ids, seed=seed)
    return {
        "rows": len(ids),
        "images": clustered.images,
        "area": float(np.mean(areas)),
        "maps": {
            name: {
                what: mean_of(np.array(values)[:, i], clustered)
                for i, what in enumerate((*PLACES, "strongest"))
            }
            for name, values in found.items()
        },
    }


def places_of(
    scene: Scene, statement: Statement, grid: tuple[int, int]
) -> list[NDArray[np.bool_]] | None:
    """Return the patches of `PLACES`, bool of shape (rows * columns,) each.

    None where the scene lacks a named shape, or has no other, or no patch is background.
    """
    names = [statement.subject]
    if statement.kind in ("more", "relation"):
        names.append(statement.object)
    named: list[Shape] = []
    others: list[Shape] = []
    for shape in scene.shapes:
        known = (shape.name, shape.colour, f"{shape.colour} {shape.name}")
        (named if any(name in known for name in names) else others).append(shape)
    on_named, on_others = (_covered(shapes, grid) for shapes in (named, others))
    on_others &= ~on_named
    places = [on_named, on_others, ~(on_named | on_others)]
    return places if all(place.any() for place in places) else None


def _covered(shapes: list[Shape], grid: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the patches of which some of the shapes cover more than a corner."""
    rows, columns = grid
    high, wide = scenes.IMAGE_SIZE / rows, scenes.IMAGE_SIZE / columns
    y, x = (np.arange(rows) + 0.5) * high, (np.arange(columns) + 0.5) * wide
    found = np.zeros(grid, bool)
    for shape in shapes:
        reach = shape.radius + 0.35 * min(high, wide)
        found |= np.hypot(x[None, :] - shape.x, y[:, None] - shape.y) <= reach
    return found.reshape(-1)


def report(figures: dict[str, Any]) -> str:
    """Return the table of what `measure` found."""

    def cell(found: dict[str, Any], scale: float = 1, unit: str = "×", digits: int = 2) -> str:
        interval = found["interval"]
        between = (
            ""
            if interval is None
            else f" ({scale * interval['low']:.{digits}f}–{scale * interval['high']:.{digits}f})"
        )
        return f"{scale * found['mean']:.{digits}f}{unit}{between}"

    lines = [
        [
            name,
            *(cell(maps[place]) for place in PLACES),
            cell(maps["strongest"], 100, " %", 0),
        ]
        for name, maps in figures["maps"].items()
    ]
    head = ["map", *PLACES, "strongest patch on a named shape"]
    title = (
        f"{figures['rows']} rows of {figures['images']} scenes; named shapes cover"
        f" {figures['area']:.0%} of the patches; a patch's value over the mean of all\n\n"
    )
    return title + table(head, lines)
