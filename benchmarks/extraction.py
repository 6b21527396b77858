"""Extraction against the fastest bare forward pass, on the same batch shape.

Bare passes run before and after the extraction in the same process, so that a machine that slows
down meanwhile slows both sides: the encoder's own, and on TensorFlow the same function as XLA
compiles it and as TensorFlow's own kernels run it, in turns. Extraction chooses between the two
first, as it does for many photos.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.measuring import seconds_of, spread, written
from benchmarks.sizes import STUDY, Size
from benchmarks.tables import table
from featstore.config import EncodersConfig, StoreConfig, usable_cores
from featstore.data.images import index_images
from featstore.encoders.compiled import XLA
from featstore.encoders.spec import vision_spec
from featstore.encoders.tower import VisionEncoder
from featstore.extract.claims import writing
from featstore.extract.extract import extract_alone
from featstore.extract.kernels import LEAST_PHOTOS, NAMES, choose_kernels, kernels_of
from featstore.extract.plan import Job, make_plan

OWN = "own"
"""The pass that extraction itself runs."""


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
        Images a second of extraction and of the encoder's own bare pass, their ratio, the spread
        of the bare passes; of the other ways of a bare pass, and the ratio to the fastest.
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
        job = Job(vision_spec(encoders, store), preset, store, ids, index, lambda: encoder)
        choose_kernels(job, encoder, LEAST_PHOTOS)
        kernels = kernels_of(job.folder)
        ways = bare_passes(encoder, kernels)
        for run in ways.values():
            run(pixels)
        rates: dict[str, list[float]] = {name: [] for name in ways}

        def bare() -> None:
            for _ in range(passes):
                for name, run in ways.items():
                    seconds = seconds_of(lambda run=run: run(pixels))  # type: ignore[misc]
                    rates[name].append(batch_size / seconds)

        bare()
        plan = make_plan(job)
        with writing(plan.folder):
            summary = extract_alone(plan)
        bare()
    rate = statistics.median(rates[OWN])
    fastest = max(statistics.median(found) for found in rates.values())
    return {
        "preset": Path(preset).name if vit else f"ViT of the {size.name}'s size, random weights",
        "precision": precision,
        "photos": len(ids),
        "batch_size": batch_size,
        "kernels": kernels,
        "extraction_images_per_second": round(summary.rows_per_second, 2),
        "bare_forward_images_per_second": round(rate, 2),
        "bare_forward_spread": [round(min(rates[OWN]), 2), round(max(rates[OWN]), 2)],
        "ratio": round(summary.rows_per_second / rate, 3),
        "others": {name: spread(found, 2) for name, found in rates.items() if name != OWN},
        "ratio_to_fastest": round(summary.rows_per_second / fastest, 3),
    }


def bare_passes(
    encoder: VisionEncoder, kernels: str = XLA
) -> dict[str, Callable[[NDArray[Any]], Any]]:
    """Return the ways to run an encoder on a batch of pixels, the product's own first."""
    import keras

    ways: dict[str, Callable[[NDArray[Any]], Any]] = {
        OWN: lambda pixels: np.asarray(encoder.encode(pixels, kernels=kernels))
    }
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        lower = encoder.tower.lower(0)
        for name, compiled in (("XLA", True), ("TensorFlow's kernels", False)):
            forward = tf.function(
                lambda inputs: lower(inputs)[:, encoder.first_token :], jit_compile=compiled
            )

            def run(pixels: NDArray[Any], forward: Any = forward) -> Any:
                inputs = encoder.tower.inputs(pixels)
                return forward(keras.tree.map_structure(tf.convert_to_tensor, inputs)).numpy()

            ways[name] = run
    return ways


def report(figures: dict[str, Any]) -> str:
    """Return the figures as a Markdown table."""
    low, high = figures["bare_forward_spread"]
    others = figures.get("others", {})
    row = [
        figures["preset"],
        figures.get("precision", "float32"),
        str(figures["photos"]),
        f"{figures['extraction_images_per_second']:.2f}",
        f"{figures['bare_forward_images_per_second']:.2f} ({low:.2f}–{high:.2f})",
        f"{figures['ratio']:.3f}",
        *(written(found, digits=2) for found in others.values()),
        *(
            [NAMES[figures.get("kernels", XLA)], f"{figures['ratio_to_fastest']:.3f}"]
            if others
            else []
        ),
    ]
    header = [
        "encoder",
        "precision",
        "photos",
        "extraction, images/s",
        "bare forward pass, images/s",
        "ratio",
        *(f"bare, {name}" for name in others),
        *(["extraction takes", "ratio to the fastest"] if others else []),
    ]
    return table(header, [row])
