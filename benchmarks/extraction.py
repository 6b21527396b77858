"""Extraction against the bare compiled forward pass, on the same batch shape.

The bare pass runs before and after the extraction in the same process, so that
a machine that slows down meanwhile slows both sides.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from featstore.config import EncodersConfig, StoreConfig
from featstore.encoders import VisionEncoder
from featstore.extract import extract_images, writing
from featstore.images import index_images
from featstore.plan import plan_images, vision_spec


def write_study_vit(folder: Path) -> Path:
    """Write the study's vision encoder, ViT-B/16 at 224, with random weights."""
    import keras_hub

    keras_hub.models.ViTBackbone(
        image_shape=(224, 224, 3),
        patch_size=16,
        num_layers=12,
        num_heads=12,
        hidden_dim=768,
        mlp_dim=3072,
    ).save_to_preset(str(folder))
    keras_hub.layers.ViTImageConverter(
        image_size=(224, 224), scale=1 / 127.5, offset=-1.0
    ).save_to_preset(str(folder))
    return folder


def write_photos(folder: Path, count: int, seed: int = 0) -> Path:
    """Write JPEGs of a photo's usual size, 500×375, so that decoding costs what it does."""
    from PIL import Image

    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for i in range(count):
        coarse = generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(
            folder / f"{i:06d}.jpg", quality=90
        )
    return folder


def measure(
    vit: str | None, photos: str | None, count: int, batch_size: int, passes: int = 4
) -> dict[str, Any]:
    """Extract `count` photos and compare with the bare forward pass.

    Args:
        vit: Preset; None writes the study's with random weights.
        photos: Folder of photos; None writes synthetic ones.
        count: Photos to extract; at least four batches.
        batch_size: Images of one forward pass.
        passes: Bare passes timed on each side.

    Returns:
        Images a second of both, their ratio, and the spread of the bare passes.
    """
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        preset = vit or str(write_study_vit(root / "vit"))
        folder = Path(photos) if photos else write_photos(root / "photos", count)
        encoders = EncodersConfig(vit=preset)
        store = StoreConfig(root=str(root / "cache"), encode_batch_size=batch_size)
        index = index_images(folder)
        ids = sorted(path.stem for path in folder.iterdir())[:count]
        encoder = VisionEncoder(preset)
        pixels = np.random.default_rng(0).normal(size=(batch_size, *encoder.image_size, 3))
        pixels = pixels.astype(np.float32)
        np.asarray(encoder.encode(pixels))

        def bare() -> list[float]:
            rates = []
            for _ in range(passes):
                started = time.perf_counter()
                np.asarray(encoder.encode(pixels))
                rates.append(batch_size / (time.perf_counter() - started))
            return rates

        before = bare()
        spec = vision_spec(encoders, store)
        plan = plan_images(spec, store, ids, index)
        with writing(plan.folder):
            summary = extract_images(plan, encoder, store, preset)
        after = bare()
    rate = statistics.median(before + after)
    return {
        "preset": Path(preset).name if vit else "ViT-B/16 at 224, random weights",
        "photos": len(ids),
        "batch_size": batch_size,
        "extraction_images_per_second": round(summary.rows_per_second, 2),
        "bare_forward_images_per_second": round(rate, 2),
        "bare_forward_spread": [round(min(before + after), 2), round(max(before + after), 2)],
        "ratio": round(summary.rows_per_second / rate, 3),
    }
