"""The sections of `featstore.toml` that decide rows, photos and features."""

from __future__ import annotations

from dataclasses import dataclass

from featstore.settings import setting

SPLITS = ("train", "val", "test")
STUDY_VIT = "vit_base_patch16_224_imagenet21k"
STUDY_TEXT = "distil_bert_base_en_uncased"


@dataclass(frozen=True)
class DataConfig:
    """The user's rows and photos, and how the rows are split."""

    rows: str | dict[str, str] = setting(
        "",
        "row file (JSONL or CSV), or one per split: {train = ..., val = ..., test = ...};"
        " empty: the built-in demo",
        path=True,
    )
    images: str = setting("", "folder of photos, <Image_ID>.jpg/.jpeg/.png/.webp", path=True)
    fractions: tuple[float, ...] = setting(
        (0.8, 0.1, 0.1), "shares of the images in train, val, test", minimum=0, maximum=1
    )
    split_seed: int = setting(0, "seed of the split", minimum=0)
    split_file: str = setting(
        "", "your own split instead: JSON {train: [ids], ...} or CSV image_id,split", path=True
    )
    duplicates: str = setting(
        "drop", "what to do with a row that repeats another exactly", choices=("drop", "keep")
    )


@dataclass(frozen=True)
class EncodersConfig:
    """The two frozen encoders."""

    vit: str = setting(
        STUDY_VIT, "vision encoder: keras-hub preset name, hf://… or preset folder", preset=True
    )
    text: str = setting(
        STUDY_TEXT, "text encoder: keras-hub preset name, hf://… or preset folder", preset=True
    )
    sequence_length: int = setting(
        24, "tokens of a sentence, [CLS] and [SEP] included; longer ones are cut", minimum=3
    )


@dataclass(frozen=True)
class StoreConfig:
    """Where features are kept and what is kept of them."""

    root: str = setting("cache", "folder of the store, the splits and the reports", path=True)
    dtype: str = setting(
        "float16",
        "stored number format; int8 has one scale a token, and half the bytes of float16",
        choices=("float16", "float32", "bfloat16", "int8"),
    )
    shard_rows: int = setting(1024, "rows of one HDF5 shard", minimum=1)
    tokens: str = setting(
        "patches",
        'vision tokens kept: "patches", or "all" with the class token',
        choices=("patches", "all"),
    )
    precision: str = setting(
        "float32",
        "arithmetic of the frozen encoders while extracting",
        choices=("float32", "bfloat16", "float16"),
    )
    encode_batch_size: int = setting(
        32, "rows in one forward pass; halved on its own when memory runs out", minimum=1
    )
    decode_threads: int = setting(2, "threads that read and decode photos", minimum=1)
