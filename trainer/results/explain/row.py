"""One row as it is explained: what the run says of it, its maps, its words, its photo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from featstore.data.images import ImageIndex, decode_image, read_bytes
from featstore.data.labels import LABEL_NAMES, UNLABELLED
from featstore.encoders.words import Word
from featstore.errors import FeatstoreError
from trainer.results.explain.maps import Maps
from trainer.results.explain.patches import Patches

PHOTO_SIZE = 400
"""Pixels of a shown photo's longer side, at most."""


@dataclass(frozen=True, eq=False)
class ShownPhoto:
    """A photo to lay maps over.

    Attributes:
        image: RGB, made small; where the converter pads, with its black borders.
        box: Top, left, height and width of the patches, as shares of the image.
    """

    image: Image.Image
    box: tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Explained:
    """One row.

    Attributes:
        image_id: As the row writes it.
        hypothesis: The sentence.
        label: What it is: 1 entailment, 0 contradiction, 2 neutral, -1 unlabelled.
        called: What the run calls it.
        probabilities: By class, such as `probability_entailment`.
        confidence: Probability of what it is called.
        maps: What the run looks at.
        words: The tokens of `maps.text_parts` by word; one where a single state is read.
        spearman: float64 of shape (windows, maps): see `agreement.correlations`.
        photo: The photo, or why there is none.
    """

    image_id: str
    hypothesis: str
    label: int
    called: int
    probabilities: dict[str, float]
    confidence: float
    maps: Maps
    words: list[Word]
    spearman: NDArray[np.float64]
    photo: ShownPhoto | str

    @property
    def word_parts(self) -> NDArray[np.float64]:
        """Gradient × input of each word, summed over its tokens: float64 of shape (words,)."""
        parts = self.maps.text_parts.astype(np.float64)
        return np.array([parts[word.start : word.stop].sum() for word in self.words])

    @property
    def word_attention(self) -> NDArray[np.float32]:
        """The attention of each word that asks: (layers, words, tokens), over heads and pieces.

        Of a head whose first token alone asks there is one.
        """
        attention = self.maps.attention.mean(axis=1)
        if attention.shape[1] == 1:
            return attention
        parts = [attention[:, word.start : word.stop].mean(axis=1) for word in self.words]
        return np.stack(parts, axis=1)

    def summary(self, leading: int) -> dict[str, Any]:
        """Return JSON-able figures of the row.

        Args:
            leading: Tokens before the patches.
        """
        return {
            "Image_ID": self.image_id,
            "Hypothesis": self.hypothesis,
            "Label": None if self.label == UNLABELLED else LABEL_NAMES[self.label],
            "predicted": LABEL_NAMES[self.called],
            **self.probabilities,
            "confidence": self.confidence,
            "log_odds": self.maps.log_odds,
            "attention_of_leading_tokens": [
                float(own[:leading].sum()) for own in self.maps.mean_attention
            ],
            "words": [
                {"word": word.text, "gradient_input": float(part)}
                for word, part in zip(self.words, self.word_parts, strict=True)
            ],
            "spearman": {
                "attention": [
                    number(value) for value in self.spearman[0, : len(self.maps.attention)]
                ],
                "gradient_input": number(self.spearman[0, -1]),
            },
            "without_photo": self.photo if isinstance(self.photo, str) else None,
        }


def number(value: Any) -> float | None:
    """Return a number as JSON has it; None where it is not finite."""
    return float(value) if np.isfinite(value) else None


def shown_photo(images: ImageIndex, image_id: str, patches: Patches) -> ShownPhoto | str:
    """Return a photo to lay maps over, decoded as its features were; or why it cannot be read."""
    try:
        path = images.lookup(image_id)
        if path is None:
            return "the photo is not there any more"
        name = path.name if isinstance(path, Path) else image_id
        pixels = decode_image(read_bytes(path), name)
    except FeatstoreError as error:
        return error.message
    height, width = pixels.shape[:2]
    top, left, high, wide = patches.box((height, width))
    # What a converter pads is black.
    above, beside = max(0, -round(top)), max(0, -round(left))
    whole = Image.new("RGB", (width + 2 * beside, height + 2 * above))
    whole.paste(Image.fromarray(pixels), (beside, above))
    box = (
        (top + above) / whole.height,
        (left + beside) / whole.width,
        high / whole.height,
        wide / whole.width,
    )
    whole.thumbnail((PHOTO_SIZE, PHOTO_SIZE))
    return ShownPhoto(whole, box)
