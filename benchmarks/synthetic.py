"""Synthetic stores and rows, published by the product's own code."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.sentences import token_counts
from benchmarks.sizes import Size, word
from featstore.config import DataConfig, EncodersConfig, FeatureConfig, StoreConfig
from featstore.data.dataset import Dataset
from featstore.data.examples import Examples
from featstore.data.images import ImageIndex
from featstore.data.splits import make_splits
from featstore.encoders.spec import TextSpec, VisionSpec, text_spec
from featstore.extract.extract import extract
from featstore.extract.plan import Job
from featstore.project import Project
from featstore.publish import write_json
from featstore.store.numbers import Numbers
from featstore.store.shard import digest_bytes, shard_name
from featstore.store.write import ShardRows, write_shard

Array = NDArray[Any]

SENTENCES = 512


def image_key(number: int) -> str:
    """Return the image id of a store's row."""
    return f"{number:08d}"


def write_store(root: Path, features: Array) -> VisionSpec:
    """Publish rows as an extraction does: shards, spec, manifest.

    Args:
        root: The store's root.
        features: float16 of shape (rows, tokens, width).

    Returns:
        The spec that names the folder.
    """
    step = StoreConfig().shard_rows
    parts = (features[i : i + step] for i in range(0, len(features), step))
    return write_parts(root, parts, f"{len(features)} rows")


def write_parts(root: Path, parts: Iterable[Array], name: str) -> VisionSpec:
    """Publish rows shard by shard, as an extraction does.

    Args:
        root: The store's root.
        parts: Each shard's rows, float16 of shape (rows, tokens, width).
        name: What sets this store apart from others under the same root.

    Returns:
        The spec that names the folder; row i has the key `image_key(i)`.
    """
    spec = VisionSpec(
        encoder="random features",
        weights=name,
        architecture={},
        boundary=0,
        dtype="float16",
        precision="float32",
        final_norm=True,
        converter={},
        decoder="",
        tokens="patches",
    )
    folder = spec.folder(root)
    write_json(folder / "spec.json", {"spec": spec.to_dict()})
    lines: list[dict[str, Any]] = []
    start = 0
    for number, part in enumerate(parts):
        keys = [image_key(i) for i in range(start, start + len(part))]
        rows = ShardRows(keys, Numbers(part[:, None]), [digest_bytes(key.encode()) for key in keys])
        path = folder / shard_name(number)
        lines.append(write_shard(path, spec.kind, spec.fingerprint, spec.dtype, rows, {}))
        start += len(part)
    write_json(folder / "manifest.json", {"shards": lines})
    return spec


def random_parts(rows: int, row_shape: tuple[int, int], shard_rows: int) -> Iterator[Array]:
    """Yield the float16 rows of each shard, made faster than a disk writes them."""
    generator = np.random.default_rng(0)
    pool = generator.standard_normal((min(rows, 256), *row_shape), np.float32).astype(np.float16)
    for start in range(0, rows, shard_rows):
        numbers = np.arange(start, min(start + shard_rows, rows))
        part = pool[numbers % len(pool)]
        part[:, 0, 0] = (numbers // len(pool)).astype(np.float16)
        yield part


def random_sentences(size: Size, count: int = SENTENCES) -> list[str]:
    """Return distinct sentences, as long as the hypotheses of SNLI-VE."""
    generator = np.random.default_rng(1)
    words = size.vocabulary - 5
    lengths = token_counts(count, size.sequence_length) - 2  # without [CLS] and [SEP]
    numbers = [generator.integers(0, words, int(length)) for length in lengths]
    # The first words number the sentence, so that no two are alike.
    return [
        " ".join(word(n) for n in (i % words, i // words % words, *rest[2:]))
        for i, rest in enumerate(numbers)
    ]


def write_sentences(root: Path, size: Size, k_txt: int, sentences: Sequence[str]) -> TextSpec:
    """Encode sentences by the product's own extraction.

    Args:
        root: The store's root; the text preset is written beside it once.
        size: Of the text encoder.
        k_txt: Where it is cut.
        sentences: Distinct sentences.

    Returns:
        The spec that names the folder.
    """
    encoders, store = encoders_of(root, size), StoreConfig(root=str(root))
    spec = text_spec(encoders, store, k_txt)
    extract(Job(spec, encoders.text, store, sentences))
    return spec


def encoders_of(root: Path, size: Size) -> EncodersConfig:
    """Return the `[encoders]` settings of synthetic features; writes the text preset once."""
    preset = root / "text-preset"
    if not preset.exists():
        size.write_text_preset(preset)
    return EncodersConfig(vit="", text=str(preset), sequence_length=size.sequence_length)


def make_dataset(root: Path, rows: int, images: int, sentences: Sequence[str]) -> Dataset:
    """Return rows over the images of a synthetic store, split 80:10:10 by image.

    Args:
        root: The store's root.
        rows: How many; each image has `rows / images`.
        images: Rows of the vision store.
        sentences: Each row has one, in turn.
    """
    numbers = range(rows)
    examples = Examples(
        image_ids=np.array([image_key(i % images) for i in numbers], np.object_),
        hypotheses=np.array([sentences[i % len(sentences)] for i in numbers], np.object_),
        labels=np.random.default_rng(2).integers(0, 2, rows).astype(np.int8),
        source_lines=np.arange(1, rows + 1),
        sources=np.full(rows, "synthetic", np.object_),
    )
    splits = make_splits(examples, (0.8, 0.1, 0.1), 0)
    return Dataset(examples, splits, ImageIndex(root, {}, {}), [], root)


class SyntheticProject(Project):
    """A vision store of random rows with sentences, for real runs at any `k_txt`.

    Args:
        root: The store's root, empty.
        size: Of the features.
        rows: Rows of the data set.
        images: Rows of the vision store.
    """

    def __init__(self, root: Path, size: Size, rows: int, images: int) -> None:
        store = StoreConfig(root=str(root))
        super().__init__(FeatureConfig(DataConfig("synthetic"), encoders_of(root, size), store))
        sentences = random_sentences(size, min(rows, SENTENCES))
        parts = random_parts(images, (size.tokens, size.width), store.shard_rows)
        self._vision_spec = write_parts(root, parts, f"{images} images")
        self._dataset = make_dataset(root, rows, images, sentences)

    def view_spec(self, view: int) -> VisionSpec:
        """Return the spec of the random rows, which stand for plain photos."""
        assert view == 0
        return self._vision_spec

    @property
    def dataset(self) -> Dataset:
        """The rows on them."""
        return self._dataset
