"""The rows that a run is wrong about and most sure of, each with its photo."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from featstore.data.dataset import Dataset
from featstore.data.images import decode_image, read_bytes
from featstore.data.labels import LABEL_NAMES
from featstore.errors import FeatstoreError
from trainer.pages.drawing import photo_uri
from trainer.results.report.measured import Measured

CARDS = 24


@dataclass(frozen=True)
class Card:
    """One row.

    Attributes:
        number: From 1, the most confident first.
        image_id: Of its photo.
        hypothesis: Its sentence.
        truth: Its label.
        called: What the run calls it.
        confidence: The probability of that, 0 to 1.
        photo: Address of the photo's data; "" where it cannot be shown.
        note: Why not.
        attention: Address of the photo under the run's attention; "" without.
    """

    number: int
    image_id: str
    hypothesis: str
    truth: str
    called: str
    confidence: float
    photo: str
    note: str
    attention: str = ""


def cards(found: Measured, dataset: Dataset | None, count: int = CARDS) -> list[Card]:
    """Return the most confident errors.

    Args:
        found: The rows.
        dataset: Where their photos are; None: they cannot be reached.
        count: At most.
    """
    wrong, sure, called = np.flatnonzero(~found.right), found.confidence, found.called
    worst = wrong[np.argsort(-sure[wrong], kind="stable")][:count]
    made = []
    for number, row in enumerate(worst.tolist(), 1):
        photo, note = _photo(dataset, found.image_ids[row])
        made.append(
            Card(
                number,
                found.image_ids[row],
                found.hypotheses[row],
                LABEL_NAMES[int(found.labels[row])],
                LABEL_NAMES[int(called[row])],
                float(sure[row]),
                photo,
                note,
            )
        )
    return made


def _photo(dataset: Dataset | None, image_id: str) -> tuple[str, str]:
    """Return a photo's address, or why there is none."""
    if dataset is None:
        return "", "the run's photos cannot be reached from here"
    try:
        path = dataset.images.lookup(image_id)
        if path is None:
            return "", "the photo is not where it was"
        pixels = decode_image(read_bytes(path), image_id)
    except FeatstoreError as error:
        return "", error.message
    return photo_uri(Image.fromarray(pixels)), ""
