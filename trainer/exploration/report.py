"""The files that are left: one page, one PNG a figure, one JSON file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from featstore.data.examples import Examples
from featstore.data.images import decode_image, read_bytes
from featstore.data.labels import labels_of
from featstore.errors import ImageError
from featstore.project import Project
from featstore.publish import write_json
from trainer.exploration.figures import all_figures, drawn_rows, photo_grid
from trainer.exploration.kinds import VERDICTS
from trainer.pages.drawing import photo_uri, svg, write_png
from trainer.pages.page import write_page

PAGE, FIGURES = "eda.html", "figures"
PAIRS_SHOWN = 12
PHOTO_PIXELS = 256
ALTS = {
    "labels": "Bars: rows of each split by class",
    "words": "Lines: distribution of words in a sentence by class",
    "tokens": "Lines: distribution of tokens of a sentence by class, and where they are cut",
    "rows-a-photo": "Bars: photos by their number of rows",
    "spatial": "Bars: share of each class's rows that have a spatial keyword",
    "buckets": "Dots: buckets by their share of train rows and their share of entailment",
    "photo-sizes": "Widths and heights of the photos",
    "duplicates": "Bars: pairs of photos by the bits in which their hashes differ",
    "log-odds": "Bars: words with the largest z of each class",
    "hypothesis-only": "Dots: accuracy of words alone beside the most frequent class",
}


def write_report(
    folder: Path,
    project: Project,
    found: Mapping[str, Any],
    readable: Sequence[str],
    samples: int,
    seed: int,
) -> dict[str, str]:
    """Write the figures, the page and then `eda.json`.

    Args:
        folder: Is made where it is missing.
        project: Whose photos are shown.
        found: What `eda.json` is to have.
        readable: Image ids of photos that can be read.
        samples: Photos shown of each class.
        seed: Of those.

    Returns:
        Name to path within the folder.

    Raises:
        WriteError: A file cannot be written.
    """
    files = {"json": "eda.json", "page": PAGE}
    figures = all_figures(found)
    shown = _samples(project, readable, samples, seed)
    pairs = _pairs(project, found["duplicates"]["named"])
    pictures = dict(figures)
    for name, cards in shown.items():
        if cards:
            titles = [card["sentence"] for card in cards]
            pictures[f"samples-{name}"] = photo_grid([card["pixels"] for card in cards], titles)
    if pairs:
        pixels = [pixels for pair in pairs for pixels in pair["pixels"]]
        names = [name for pair in pairs for name in pair["names"]]
        pictures["duplicate-pairs"] = photo_grid(pixels, names)
    for name, figure in pictures.items():
        files[name] = f"{FIGURES}/{name}.png"
        # Before `svg`, which changes the figure.
        write_png(figure, folder / files[name])
    write_page(
        folder / PAGE,
        "eda.html",
        f"Data: {_named(found['rows'])}",
        found=found,
        figures={name: svg(figure, ALTS[name]) for name, figure in figures.items()},
        samples={
            name: [{**card, "uri": _uri(card["pixels"])} for card in cards]
            for name, cards in shown.items()
        },
        pairs=[{**pair, "uris": [_uri(pixels) for pixels in pair["pixels"]]} for pair in pairs],
        verdicts=VERDICTS,
        drawn_rows=drawn_rows(found["rows_a_photo"]["histogram"]),
        beyond=", ".join(
            f"{at['beyond']} of {name}" for name, at in found["log_odds"]["classes"].items()
        ),
        classes=list(labels_of(found["classes"])),
    )
    write_json(folder / files["json"], found)
    return files


def _named(rows: Any) -> str:
    """Return what the rows are called in the page's title."""
    if isinstance(rows, Mapping):
        return ", ".join(f"{split} {_named(files)}" for split, files in rows.items())
    if isinstance(rows, str):
        return Path(rows).name or rows
    return ", ".join(map(_named, rows))


def _uri(pixels: np.ndarray) -> str:
    return photo_uri(Image.fromarray(pixels), PHOTO_PIXELS)


def _small(project: Project, image_id: str) -> np.ndarray | None:
    """Return a photo's pixels, its longer side `PHOTO_PIXELS` at most; None if it is gone."""
    path = project.dataset.images.lookup(image_id)
    try:
        if path is None:
            return None
        image = Image.fromarray(decode_image(read_bytes(path), image_id))
    except ImageError:
        return None
    image.thumbnail((PHOTO_PIXELS, PHOTO_PIXELS))
    return np.asarray(image)


def _samples(
    project: Project, readable: Sequence[str], samples: int, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Draw rows of each class, each with another photo that can be read."""
    examples: Examples = project.dataset.examples
    there, rng = set(readable), np.random.default_rng(seed)
    found: dict[str, list[dict[str, Any]]] = {}
    for name, label in labels_of(project.config.data.classes).items():
        found[name], used = [], set[str]()
        for row in rng.permutation(np.flatnonzero(examples.labels == label)).tolist():
            image_id = examples.image_ids[row]
            if len(found[name]) >= samples:
                break
            if image_id in used or image_id not in there:
                continue
            used.add(image_id)
            pixels = _small(project, image_id)
            if pixels is not None:
                sentence = examples.hypotheses[row]
                found[name].append({"id": image_id, "sentence": sentence, "pixels": pixels})
    return found


def _pairs(project: Project, named: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the first pairs of near-duplicates that were not refuted, with their pixels.

    No photo is shown twice: of several copies one pair is enough.
    """
    found: list[dict[str, Any]] = []
    used = set[str]()
    for pair in named:
        if len(found) >= PAIRS_SHOWN:
            break
        if pair["confirmed"] is False or not used.isdisjoint(pair["photos"]):
            continue
        used.update(pair["photos"])
        pixels = [_small(project, image_id) for image_id in pair["photos"]]
        if any(one is None for one in pixels):
            continue
        ends = zip(pair["photos"], pair["splits"], strict=True)
        names = [f"{image_id} ({split})" for image_id, split in ends]
        found.append({**pair, "pixels": pixels, "names": names})
    return found
