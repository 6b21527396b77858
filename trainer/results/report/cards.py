"""The rows that a run is wrong about and most sure of: each photo, and where the run looks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featstore.data.labels import LABEL_NAMES, UNLABELLED
from featstore.errors import FeatstoreError
from featstore.quantities import share
from trainer.pages.drawing import photo_uri
from trainer.results.explain.drawn import overlay_uri
from trainer.results.explain.patches import Patches
from trainer.results.explain.row import ShownPhoto, shown_photo
from trainer.results.report.measured import Measured
from trainer.results.score import Scorer

CARDS = 24

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Card:
    """One row.

    Attributes:
        image_id: Of its photo.
        hypothesis: Its sentence.
        truth: Its label.
        called: What the run calls it.
        confidence: The probability of that, 0 to 1.
        style: CSS that has the photo, as `parts.seen` takes it.
        note: Why there is no photo; "" where there is.
        overlay: Address of the attention's picture; "" without.
        box: CSS of its place on the photo.
        alt: What it shows.
    """

    image_id: str
    hypothesis: str
    truth: str
    called: str
    confidence: float
    style: str = ""
    note: str = ""
    overlay: str = ""
    box: str = ""
    alt: str = ""


def worst(found: Measured, count: int = CARDS) -> list[int]:
    """Return the places of the most confident errors among the measured rows."""
    wrong, sure = np.flatnonzero(~found.right), found.confidence
    chosen: list[int] = wrong[np.argsort(-sure[wrong], kind="stable")][:count].tolist()
    return chosen


def cards(found: Measured, split: str, scorer: Scorer | None) -> tuple[list[Card], str]:
    """Return the most confident errors.

    Args:
        found: The rows.
        split: Their split.
        scorer: The run over its rows; None where they cannot be opened, or are others by now.

    Returns:
        The cards, and why they are without attention; "" where they have it.
    """
    chosen, called = worst(found), found.called
    made = [
        Card(
            image_id=found.image_ids[row],
            hypothesis=found.hypotheses[row],
            truth=LABEL_NAMES[int(found.labels[row])],
            called=LABEL_NAMES[int(called[row])],
            confidence=float(found.confidence[row]),
            note="the run's photos cannot be reached from here",
        )
        for row in chosen
    ]
    if scorer is None or not chosen:
        return made, "the run's rows cannot be opened" if chosen else ""
    weights: list[FloatArray] = []
    without = ""
    tokens = scorer.run.manifest["features"]["vision"]["row_shape"][0]
    if scorer.train.control != "none":
        without = f"the run was trained with the control {scorer.train.control}"
    else:
        try:
            weights = _attention(scorer, split, len(found.labels), chosen)
            tokens = len(weights[0])
        except (FeatstoreError, ValueError) as error:
            without = getattr(error, "message", str(error))
    patches = Patches.of(scorer.project.vision_spec, tokens)
    images = scorer.project.dataset.images
    for i, card in enumerate(made):
        own = weights[i] if weights else None
        made[i] = _with_photo(card, shown_photo(images, card.image_id, patches), patches, own)
    return made, without


def _attention(scorer: Scorer, split: str, count: int, chosen: list[int]) -> list[FloatArray]:
    """Return the attention of some measured rows over the image's tokens, mean of the heads.

    Raises:
        FeatstoreError: The features are not there.
        ValueError: The rows are not those that were measured.
    """
    rows = scorer.rows(split)
    labelled = np.flatnonzero(rows.labels != UNLABELLED)
    if len(labelled) != count:
        raise ValueError(f"expected {count} labelled rows, found {len(labelled)}")
    found = []
    for row in labelled[chosen]:
        _, attention, _ = scorer.apart.look(scorer.apart.entering(rows.batch(np.array([row]), 1)))
        found.append(attention[-1].mean(axis=(0, 1)))
    return found


def _with_photo(
    card: Card, photo: ShownPhoto | str, patches: Patches, weights: FloatArray | None
) -> Card:
    """Return a card with its photo, or why there is none, and the attention over it."""
    if isinstance(photo, str):
        return dataclasses.replace(card, note=photo)
    width, height = photo.image.size
    style = f"--photo: url({photo_uri(photo.image)}); --shape: {width} / {height}"
    if weights is None:
        return dataclasses.replace(card, style=style, note="")
    values = patches.grid(weights[patches.leading :])
    row, column = np.unravel_index(int(values.argmax()), values.shape)
    top, left, high, wide = (round(100 * part, 3) for part in photo.box)
    return dataclasses.replace(
        card,
        style=style,
        note="",
        overlay=overlay_uri(values, signed=False),
        box=f"top: {top}%; left: {left}%; height: {high}%; width: {wide}%",
        alt=f"Attention, mean of heads: at most {share(float(values.max()))} on a patch, in row"
        f" {row + 1}, column {column + 1} of {values.shape[0]} × {values.shape[1]}",
    )
