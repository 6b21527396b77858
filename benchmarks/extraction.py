"""Extraction against the bare compiled forward pass, on the same batch shape.

The bare pass runs before and after the extraction in the same process, so that
a machine that slows down meanwhile slows both sides.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.sizes import STUDY, Size
from benchmarks.tables import table
from featstore.config import EncodersConfig, StoreConfig, usable_cores
from featstore.data.images import index_images
from featstore.encoders.spec import vision_spec
from featstore.encoders.tower import VisionEncoder
from featstore.extract.claims import writing
from featstore.extract.extract import extract_alone
from featstore.extract.plan import Job, make_plan


def write_photos(folder: Path, count: int, seed: int = 0) -> Path:
    """Write JPEGs of a photo's usual size, 500×375, so that decoding costs what it does."""
    from PIL import Image

    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)

    def write(i: int, coarse: np.ndarray) -> None:
        Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(
            folder / f"{i:06d}.jpg", quality=90
        )

    with ThreadPoolExecutor(usable_cores()) as pool:
        for i in range(count):
            pool.submit(write, i, generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    return folder


def measure(
    vit: str | None,
    photos: str | None,
    count: int,
    batch_size: int,
    passes: int = 4,
    size: Size = STUDY,
    precision: str = "float32",
) -> dict[str, Any]:
    """Extract `count` photos and compare with the bare forward pass.

    Args:
        vit: Preset; None writes one of `size` with random weights.
        photos: Folder of photos; None writes synthetic ones.
        count: Photos to extract; at least four batches.
        batch_size: Images of one forward pass.
        passes: Bare passes timed on each side.
        size: Of the encoder that is written.
        precision: Arithmetic of the forward pass.

    Returns:
        Images a second of both, their ratio, and the spread of the bare passes.
    """
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        preset = vit or str(size.write_vision_preset(root / "vit"))
        folder = Path(photos) if photos else write_photos(root / "photos", count)
        encoders = EncodersConfig(vit=preset)
        store = StoreConfig(
            root=str(root / "cache"), encode_batch_size=batch_size, precision=precision
        )
        index = index_images(folder)
        ids = sorted(path.stem for path in folder.iterdir())[:count]
        encoder = VisionEncoder(preset, precision=precision)
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
        job = Job(vision_spec(encoders, store), preset, store, ids, index, lambda: encoder)
        plan = make_plan(job)
        with writing(plan.folder):
            summary = extract_alone(plan)
        after = bare()
    rate = statistics.median(before + after)
    return {
        "preset": Path(preset).name if vit else f"ViT of the {size.name}'s size, random weights",
        "precision": precision,
        "photos": len(ids),
        "batch_size": batch_size,
        "extraction_images_per_second": round(summary.rows_per_second, 2),
        "bare_forward_images_per_second": round(rate, 2),
        "bare_forward_spread": [round(min(before + after), 2), round(max(before + after), 2)],
        "ratio": round(summary.rows_per_second / rate, 3),
    }


def report(figures: dict[str, Any]) -> str:
    """Return the figures as a Markdown table."""
    low, high = figures["bare_forward_spread"]
    row = [
        figures["preset"],
        figures.get("precision", "float32"),
        str(figures["photos"]),
        f"{figures['extraction_images_per_second']:.2f}",
        f"{figures['bare_forward_images_per_second']:.2f} ({low:.2f}–{high:.2f})",
        f"{figures['ratio']:.3f}",
    ]
    header = [
        "encoder",
        "precision",
        "photos",
        "extraction, images/s",
        "bare forward pass, images/s",
        "ratio",
    ]
    return table(header, [row])
