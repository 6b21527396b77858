"""Makes the pictures of the README from a run of the demo: `python -m docs.pictures`.

    glance.png   what is done, and what it saves: a photo, its stored features, where a run looks
                 for two sentences, and times that benchmarks/results has
    demo.png     scenes, each with a sentence that holds and one that does not
    curves.png   the learning curves that the run left

Without `--run` it trains the run that the README describes, in a temporary folder, in two minutes.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import click
import numpy as np
from matplotlib.patches import ConnectionPatch
from PIL import Image

import featstore
import trainer
from benchmarks.results_file import RESULTS
from benchmarks.search import parts
from featstore.data.images import decode_image, read_bytes
from featstore.data.labels import LABEL_NAMES
from featstore.demo.scenes import STATEMENTS
from featstore.project import Project
from featstore.publish import write_bytes
from trainer.pages.drawing import CLASS_COLORS, COLORS, new_figure, write_png
from trainer.results.explain.explain import Explanation
from trainer.results.explain.row import Explained, ShownPhoto

DOCS = Path(__file__).parent
PICTURES = ("glance.png", "demo.png", "curves.png")
MACHINE = "amd-epyc-2-cores.json"
K_TXT = 3
LIMIT_BYTES = 150_000
# Photos of the test split among which the one with the most telling maps is chosen.
CANDIDATES = 40
SURE = 0.9
LETTERS, LONGEST = 26, 38
GREY = "#6b6b6b"
# Of the strip, in inches.
WIDTH, HEIGHT = 11.2, 2.95
AT_THE_SIZE_OF = (
    "ViT-B/16, DistilBERT base; two CPU cores.\nThe search is measured on a sample and scaled."
)


@click.command()
@click.option(
    "--run",
    "folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A demo run that is there already; default: train one.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=DOCS,
    show_default=True,
    help="Folder of the pictures.",
)
def main(folder: Path | None, out: Path) -> None:
    """Make the README's pictures."""
    with tempfile.TemporaryDirectory() as place:
        run = trainer.load_run(folder) if folder else train(Path(place))
        out.mkdir(parents=True, exist_ok=True)
        draw_glance(run, out / "glance.png")
        draw_demo(run.project, out / "demo.png")
        write_bytes(out / "curves.png", run.curves_path.read_bytes())
    for name in PICTURES:
        size = (out / name).stat().st_size
        print(f"{out / name}: {size / 1000:.0f} kB")
        if size > LIMIT_BYTES:
            raise click.ClickException(f"{name}: more than {LIMIT_BYTES / 1000:.0f} kB")


def train(place: Path) -> trainer.Run:
    """Train the README's run of the built-in demo."""
    project = featstore.Project(root=str(place / "cache"))
    project.extract("vit")
    return trainer.train(project, name="first", runs=place / "runs", k_txt=K_TXT)


def times(results: Path = RESULTS / MACHINE) -> list[tuple[str, float, float, str]]:
    """Return what was measured at the study's size: what, end to end, cached, the unit."""
    kept = json.loads(results.read_text(encoding="utf-8"))
    step = kept["steps"]["k_txt"][str(K_TXT)]
    search = {
        way: sum(seconds * count for _, seconds, count in lines) / 3600
        for way, lines in parts(kept["search"]).items()
    }
    return [
        (
            f"step of 32 rows, k_txt {K_TXT}",
            step["end_to_end"]["seconds"],
            step["cached"]["seconds"],
            "s",
        ),
        (
            "search of 6 trials, with extraction",
            min(hours for way, hours in search.items() if way != "cached"),
            search["cached"],
            "h",
        ),
    ]


def choose(run: trainer.Run) -> tuple[Explanation, Explained, Explained]:
    """Return a photo's row that holds and one that does not: right, sure, and looked at elsewhere.

    The maps of attention of the two overlap least, among the first photos of the test split.
    """
    ids = run.project.keys("vit", "test")[:CANDIDATES]
    found = run.explain("test", ids=ids, sample=2)
    best: tuple[float, Explained, Explained] | None = None
    for _, rows in itertools.groupby(found.rows, key=lambda row: row.image_id):
        sure = [
            row
            for row in rows
            if row.called == row.label and row.confidence > SURE and len(row.hypothesis) <= LETTERS
        ]
        for holds, fails in itertools.product(sure, sure):
            if (LABEL_NAMES[holds.label], LABEL_NAMES[fails.label]) == (
                "entailment",
                "contradiction",
            ):
                one, other = attention(found, holds), attention(found, fails)
                overlap = float(np.minimum(one, other).sum()) - float(one.max() + other.max())
                if best is None or overlap < best[0]:
                    best = overlap, holds, fails
    if best is None:
        raise click.ClickException(
            "no photo of the test split has two rows that the run is sure of"
        )
    return found, best[1], best[2]


def attention(found: Explanation, row: Explained) -> np.ndarray:
    """Return the attention over the patches: float of shape (rows, columns)."""
    return found.patches.grid(row.maps.mean_attention[-1][found.patches.leading :])


def draw_glance(run: trainer.Run, path: Path) -> None:
    """Draw the strip at the README's top."""
    found, holds, fails = choose(run)
    photo = holds.photo
    assert isinstance(photo, ShownPhoto)
    figure = new_figure(WIDTH, HEIGHT)
    figure.set_layout_engine("none")
    for left, title in (
        (0.1, "1  Encode each photo once"),
        (4.35, "2  Train as often as you like"),
        (8.15, "3  Pay for what trains"),
    ):
        figure.text(
            left / WIDTH, 1 - 0.24 / HEIGHT, title, fontsize=11.5, fontweight="bold", va="center"
        )
    patches, stored = panel(figure, 0.1), panel(figure, 2.2)
    draw_patches(patches, photo.image, found.patches.rows, found.patches.columns)
    draw_features(stored, np.asarray(run.project.images()[holds.image_id], np.float32))
    figure.add_artist(
        ConnectionPatch(
            (1.03, 0.5),
            (-0.03, 0.5),
            "axes fraction",
            axesA=patches,
            axesB=stored,
            arrowstyle="-|>",
            mutation_scale=13,
            color=GREY,
        )
    )
    for left, row in ((4.35, holds), (6.2, fails)):
        draw_look(panel(figure, left), photo.image, attention(found, row), row)
    draw_times(
        [panel(figure, 9.0, bottom, 1.7, 0.62) for bottom in (1.66, 0.66)],
        times(),
    )
    figure.text(8.15 / WIDTH, 0.3 / HEIGHT, AT_THE_SIZE_OF, fontsize=8, color=GREY, va="center")
    write_png(figure, path)
    shrink(path)


def panel(
    figure: Any, left: float, bottom: float = 0.6, width: float = 1.7, height: float = 1.7
) -> Any:
    """Return axes at a place in inches."""
    return figure.add_axes((left / WIDTH, bottom / HEIGHT, width / WIDTH, height / HEIGHT))


def draw_patches(axes: Any, image: Image.Image, rows: int, columns: int) -> None:
    """Draw a photo under the grid of its patches."""
    axes.imshow(image, extent=(0, columns, rows, 0))
    axes.set_xticks(range(columns + 1), [])
    axes.set_yticks(range(rows + 1), [])
    axes.grid(color="#8a8a8a", linewidth=0.6)
    axes.tick_params(length=0, pad=0, labelsize=0)
    axes.set_xlabel(f"photo → frozen ViT\n{rows} × {columns} patches", fontsize=9)


def draw_features(axes: Any, features: np.ndarray) -> None:
    """Draw a photo's stored row: float of shape (tokens, width)."""
    tokens, width = features.shape
    top = float(np.quantile(np.abs(features), 0.98))
    axes.imshow(features, cmap="PuOr", vmin=-top, vmax=top, aspect="auto", interpolation="nearest")
    axes.set_box_aspect(1)
    axes.set_xticks([])
    axes.set_yticks([])
    kilobytes = tokens * width * 2 / 1000
    axes.set_xlabel(
        f"its row in the store\n{tokens} × {width} float16, {kilobytes:.0f} kB", fontsize=9
    )


def draw_look(axes: Any, image: Image.Image, weights: np.ndarray, row: Explained) -> None:
    """Draw where a run looks in a photo, the sentence above and the answer below."""
    rows, columns = weights.shape
    label = LABEL_NAMES[row.called]
    sureness = f"{100 * row.confidence:.1f} %" if row.confidence < 0.9995 else "> 99.9 %"
    axes.imshow(image, extent=(0, columns, rows, 0))
    # The less a patch is looked at, the more white lies over it.
    veil = np.ones((rows, columns, 4))
    veil[..., 3] = 0.86 * (1 - np.sqrt(weights / weights.max()))
    axes.imshow(veil, extent=(0, columns, rows, 0), interpolation="bicubic")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_edgecolor("#c4c4c4")
    axes.set_title(f"“{row.hypothesis}”", fontsize=9)
    axes.set_xlabel(
        f"{label}, {sureness}", fontsize=10, color=CLASS_COLORS[label], fontweight="bold"
    )


def draw_times(panels: Sequence[Any], measured: Sequence[tuple[str, float, float, str]]) -> None:
    """Draw both ways' times as bars."""
    for axes, (what, end_to_end, cached, unit) in zip(panels, measured, strict=True):
        axes.barh([1, 0], [end_to_end, cached], color=("#9a9a9a", COLORS[0]), height=0.62)
        axes.set_yticks([1, 0], ["end to end", "featstore"], fontsize=9)
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlim(0, end_to_end * 1.28)
        axes.set_title(what, fontsize=9, loc="left")
        ratio = end_to_end / cached
        for at, value, more in ((1, end_to_end, ""), (0, cached, f"   {ratio:.0f}× less")):
            axes.text(
                value + 0.02 * end_to_end,
                at,
                f"{value:.2g} {unit}{more}",
                va="center",
                fontsize=9,
                fontweight="bold" if more else "normal",
            )


def telling(project: Project, count: int) -> Iterator[tuple[str, str, str]]:
    """Yield photos of the test split with a sentence that holds and one that does not.

    The kinds of sentences take turns, and no sentence comes twice.
    """
    kind_of = {statement.text: statement.kind for statement in STATEMENTS}
    waiting = list(dict.fromkeys(kind_of.values()))
    examples = project.dataset.examples.select(project.dataset.rows("test"))
    by_photo: dict[str, list[tuple[int, str]]] = {}
    for image_id, text, label in zip(
        examples.image_ids, examples.hypotheses, examples.labels, strict=True
    ):
        if len(text) <= LONGEST:
            by_photo.setdefault(str(image_id), []).append((int(label), str(text)))
    found = 0
    while waiting and found < count:
        kind = waiting.pop(0)
        for image_id, rows in by_photo.items():
            holds = [text for label, text in rows if label == 1 and kind_of[text] == kind]
            fails = [text for label, text in rows if label == 0 and kind_of[text] != kind]
            if holds and fails:
                yield image_id, holds[0], fails[0]
                told = {holds[0], fails[0]}
                del by_photo[image_id]
                by_photo = {
                    other: [row for row in rows if row[1] not in told]
                    for other, rows in by_photo.items()
                }
                waiting.append(kind)
                found += 1
                break


def shown(project: Project, image_id: str) -> np.ndarray:
    """Return a photo's pixels: uint8 of shape (height, width, 3)."""
    place = project.dataset.images.lookup(image_id)
    assert place is not None
    return decode_image(read_bytes(place), image_id)


def draw_demo(project: Project, path: Path, columns: int = 4, rows: int = 2) -> None:
    """Draw scenes with their sentences."""
    figure = new_figure(11.2, 5.2)
    panels = figure.subplots(rows, columns).flat
    for axes, (image_id, holds, fails) in zip(
        panels, telling(project, rows * columns), strict=True
    ):
        axes.imshow(shown(project, image_id))
        axes.set_axis_off()
        axes.set_title(f"✓ {holds}\n✗ {fails}", fontsize=8.5)
    write_png(figure, path)
    shrink(path)


def shrink(path: Path, colours: int = 256) -> None:
    """Write a picture with a palette: a third of the bytes, and nobody sees it."""
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(colours, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


if __name__ == "__main__":
    main()
