"""What a store of many photos would take, from the figures that a machine's file keeps.

Arithmetic alone: each line is a measured constant times a number of photos.
`docs/SCALE.md` says where the multiplication stops being true.
"""

from __future__ import annotations

from typing import Any

from benchmarks.sizes import STUDY
from benchmarks.tables import table
from featstore.store.numbers import token_bytes

IMAGES = (1_000_000, 100_000_000, 1_000_000_000)
ROWS_AN_IMAGE = 2
SHARD_ROWS = (1024, 16384)
NEEDED = ("extraction", "growth", "loop", "roofline")
# Of a shard in `manifest.json`.
MANIFEST_LINE_BYTES = 112
# Of opening a store, for each row: its keys are read and sorted. Four million rows in 245 shards
# opened in 1.2 s where a million in 977 took 1.04 s.
ROW_OPEN_SECONDS = 0.25e-6
# The study's search: six trials of two epochs.
SEARCH_EPOCHS = 12
UNITS = ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def bytes_written(value: float) -> str:
    """Return bytes in the unit that has three digits before the point at most."""
    for size, unit in UNITS:
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def hours_written(seconds: float) -> str:
    """Return a time as seconds, minutes, hours or days."""
    for size, unit in ((86400 * 3, "days"), (5400, "h"), (90, "min")):
        if seconds >= size:
            per = {"days": 86400, "h": 3600, "min": 60}[unit]
            return f"{seconds / per:,.0f} {unit}"
    return f"{seconds:.2g} s"


def constants(figures: dict[str, Any]) -> dict[str, float]:
    """Return the measured constants.

    Args:
        figures: A results file's content.

    Raises:
        KeyError: A benchmark of `NEEDED` has not been run.
    """
    many = figures["growth"]["many"]
    return {
        "images_per_second": figures["extraction"]["extraction_images_per_second"],
        "index_bytes_a_row": many["anonymous_bytes"]["median"] / many["rows"],
        "open_seconds_a_shard": (many["open_seconds"]["median"] - many["rows"] * ROW_OPEN_SECONDS)
        / (many["rows"] / figures["growth"]["shard_rows"]),
        "step_seconds_k0": figures["loop"]["step_seconds"]["median"],
        "step_seconds_k3": figures["roofline"]["k_txt"]["3"]["seconds"]["median"],
    }


def report(figures: dict[str, Any]) -> str:
    """Return the table of a results file's content; raises as `constants`."""
    found = constants(figures)
    lines: list[list[str]] = []

    def line(title: str, values: list[str]) -> None:
        lines.append([title, *values])

    for dtype in ("float16", "int8"):
        row = STUDY.tokens * token_bytes(dtype, STUDY.width)
        line(f"features, {dtype}", [bytes_written(n * row) for n in IMAGES])
    seconds = [n / found["images_per_second"] for n in IMAGES]
    line(f"extraction at {found['images_per_second']:.1f}/s", [hours_written(s) for s in seconds])
    line("extraction at 1,000/s", [hours_written(n / 1000) for n in IMAGES])
    line("index in memory", [bytes_written(n * found["index_bytes_a_row"]) for n in IMAGES])
    for rows in SHARD_ROWS:
        shards = [-(-n // rows) for n in IMAGES]
        line(f"shards of {rows:,} rows", [f"{n:,}" for n in shards])
        opened = [
            hours_written(n * found["open_seconds_a_shard"] + images * ROW_OPEN_SECONDS)
            for n, images in zip(shards, IMAGES, strict=True)
        ]
        line("… opened in", opened)
        # Written anew for each shard: half of the last one's size on average.
        written = [bytes_written(n * n * MANIFEST_LINE_BYTES / 2) for n in shards]
        line("… manifests written in all", written)
    for k_txt in (0, 3):
        steps = [ROWS_AN_IMAGE * n / STUDY.rows for n in IMAGES]
        one = found[f"step_seconds_k{k_txt}"]
        line(f"an epoch, k_txt {k_txt}", [hours_written(step * one) for step in steps])
    line(
        f"a search of {SEARCH_EPOCHS} epochs, k_txt 3",
        [hours_written(SEARCH_EPOCHS * step * one) for step in steps],
    )
    text = [f"{name.replace('_', ' ')} {value:.3g}" for name, value in found.items()]
    head = (
        f"From {'; '.join(text)}. ViT-B/16 at 224, {ROWS_AN_IMAGE} rows an image, batches of"
        f" {STUDY.rows}, on {figures['machine']['cores']} cores."
    )
    return f"{head}\n\n{table(['photos', *(f'{n:,}' for n in IMAGES)], lines)}"
