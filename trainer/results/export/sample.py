"""Real rows that an export is checked on: as photos and sentences, and as both paths see them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from featstore.data.images import decode_image, read_bytes
from featstore.errors import ImageError, RunError
from featstore.progress import Show
from featstore.store.shard import digest_bytes
from trainer.results.models import Models
from trainer.results.parity import BATCH_ROWS
from trainer.results.score import Scorer, some
from trainer.run.step import flat

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Sample:
    """Rows of a split, and what both paths say of them.

    Attributes:
        photos: The bytes of each row's photo.
        sentences: The sentence of each row.
        pixel_values: float32 of shape (rows, height, width, 3).
        input_ids: int32 of shape (rows, length).
        attention_mask: int32 of the same shape.
        cached: float32 of shape (rows,), of three classes (rows, 3): logits from the stored
            features.
        end_to_end: The same from the pixels.
        names: What people know each row by.
        raw: int64: the rows whose photo TensorFlow's decoders read to the same pixels.
    """

    photos: list[bytes]
    sentences: list[str]
    pixel_values: NDArray[np.float32]
    input_ids: NDArray[np.int32]
    attention_mask: NDArray[np.int32]
    cached: Logits
    end_to_end: Logits
    names: list[str]
    raw: NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.sentences)

    @property
    def inputs(self) -> dict[str, Any]:
        """The arrays by the model's input names."""
        names = ("pixel_values", "input_ids", "attention_mask")
        return {name: getattr(self, name) for name in names}

    def save(self, path: Path) -> None:
        """Write it for `fresh.py`."""
        photos = [self.photos[row] for row in self.raw]
        sentences = [self.sentences[row] for row in self.raw]
        np.savez(
            path,
            photos=np.frombuffer(b"".join(photos), np.uint8),
            photo_ends=np.cumsum([len(data) for data in photos], dtype=np.int64),
            sentences=np.frombuffer(json.dumps(sentences).encode(), np.uint8),
            **self.inputs,
        )


def draw_sample(scorer: Scorer, models: Models, split: str, count: int, show: Show) -> Sample:
    """Draw rows of a split and compute them on both paths, in float32.

    A photo that changed since its features were extracted, or cannot be read, proves nothing of
    an export: the next row is taken.

    Args:
        scorer: The run over its project.
        models: Both models with the run's weights.
        split: "train", "val" or "test".
        count: Rows; more than the split has mean all.
        show: Shows the rows.

    Raises:
        MissingFeaturesError: A photo of the split was never extracted.
        RunError: No photo can be used.
    """
    examples = scorer.project.dataset.examples
    rows, _ = scorer.project.usable(split)
    kept: list[int] = []
    photos: list[bytes] = []
    pixels: list[NDArray[np.float32]] = []
    for pick, data, image in _readable(scorer, models, split, rows):
        kept.append(pick)
        photos.append(data)
        pixels.append(image)
        if len(kept) == count:
            break
    if not kept:
        ids = list(dict.fromkeys(examples.image_ids[rows].tolist()))
        raise RunError(
            f"{scorer.run.folder}: no photo of split {split!r} is as it was when its features were"
            f" extracted ({some(ids)}), so that an export cannot be checked; put the photos back in"
            f" {scorer.project.dataset.images.folder}, or name another --split"
        )
    sentences = examples.hypotheses[rows[kept]].tolist()
    token_ids, mask = models.text.tokenize(sentences)
    arrays = {
        "pixel_values": np.stack(pixels),
        "input_ids": token_ids,
        "attention_mask": mask.astype(np.int32),
    }
    shape = (len(kept), *scorer.logit_shape)
    cached, expected = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    stored = scorer.rows(split)
    with show.bar(len(kept), "rows") as progress:
        for start in range(0, len(kept), BATCH_ROWS):
            part = slice(start, min(start + BATCH_ROWS, len(kept)))
            size = part.stop - start
            batch = stored.batch(np.array(kept[part]), BATCH_ROWS)
            cached[part] = models.cached.predict(batch)[0][:size]
            # One shape of batch: each other one would be traced apart.
            filled = np.resize(np.arange(part.start, part.stop), BATCH_ROWS)
            found = models.end_to_end.predict_on_batch({k: v[filled] for k, v in arrays.items()})
            expected[part] = flat(np.asarray(found["logits"]))[:size]
            progress(size)
    names = [
        f"image {image_id!r}, hypothesis {text!r}"
        for image_id, text in zip(examples.image_ids[rows[kept]], sentences, strict=True)
    ]
    raw = np.flatnonzero([_is_common(data) for data in photos])
    return Sample(
        photos, sentences, **arrays, cached=cached, end_to_end=expected, names=names, raw=raw
    )


def _is_common(data: bytes) -> bool:
    """Return whether a photo is not of one bit, or of 16 bits of grey."""
    with Image.open(io.BytesIO(data)) as image:
        return image.mode != "1" and not image.mode.startswith("I")


def _readable(
    scorer: Scorer, models: Models, split: str, rows: NDArray[np.int64]
) -> Iterator[tuple[int, bytes, NDArray[np.float32]]]:
    """Yield places in a split in a drawn order, with their photo, where it is as it was."""
    dataset, images = scorer.project.dataset, scorer.project.images()
    stored = scorer.rows(split)
    for pick in np.random.default_rng(0).permutation(len(rows)).tolist():
        path = dataset.images.lookup(dataset.examples.image_ids[rows[pick]])
        if path is None:
            continue
        try:
            data = read_bytes(path)
            digest = images.source_digests(stored.image_positions[[pick]])[0]
            if digest_bytes(data) == tuple(digest.tolist()):
                yield pick, data, models.vision.to_pixels(decode_image(data, str(path)))
        except ImageError:
            continue
