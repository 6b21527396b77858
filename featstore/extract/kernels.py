"""Which kernels compute photos' features on a CPU: XLA's, or TensorFlow's own.

Which are faster depends on the processor and on the encoder (docs/BENCHMARKS.md). So an extraction
of many photos times both before the first shard, and keeps what it found beside the shards:

    kernels-<processor>.json      "kernels": "xla" or "tensorflow"; images a second of either

They round differently. Whoever makes rows of the folder on such a processor later, after a kill,
beside it, on a node of a cluster or for a repair, takes the same kernels. Where nothing was kept,
these are XLA's.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from featstore.encoders.compiled import KERNELS, TENSORFLOW, XLA, is_out_of_memory
from featstore.encoders.framework import import_framework, processor
from featstore.encoders.tower import TextEncoder, VisionEncoder
from featstore.extract.claims import locked
from featstore.extract.plan import Job
from featstore.progress import SILENT, Show, working
from featstore.publish import package_versions, read_checked, write_checked
from featstore.quantities import rate
from featstore.store.folder import shard_paths

LEAST_PHOTOS = 8192
"""Photos from which on it is timed: at 32 a batch, that takes five batches of 256 or more."""
ROUNDS = 2
NAMES = {XLA: "XLA", TENSORFLOW: "TensorFlow's own kernels"}
RECORDS = "kernels-*.json"


def record_of(folder: Path) -> Path:
    """Return the file that has the kernels of a features folder on this processor."""
    return folder / RECORDS.replace("*", processor())


def kernels_of(folder: Path) -> str:
    """Return the kernels that compute a features folder's rows on this processor."""
    try:
        found = read_checked(record_of(folder))["kernels"]
    except (OSError, ValueError, KeyError):
        return XLA
    return found if found in KERNELS else XLA


def choose_kernels(
    job: Job, encoder: VisionEncoder | TextEncoder, photos: int, show: Show = SILENT
) -> None:
    """Time both kinds of kernels and keep the faster, where that pays and rows have none yet.

    Args:
        job: Of the extraction, which has the features' folder to itself or a claim on it.
        encoder: The job's.
        photos: That the whole plan is to extract, whoever takes part.
        show: Is told what was found.
    """
    folder, size = job.folder, job.store.encode_batch_size
    if photos < LEAST_PHOTOS or not isinstance(encoder, VisionEncoder) or not _can_choose():
        return
    if record_of(folder).exists() or shard_paths(folder):
        return
    try:
        with working("timing XLA's kernels and TensorFlow's"):
            rates = time_kernels(encoder, size, encoder.num_layers - job.spec.boundary)
    except Exception as error:
        if is_out_of_memory(error):
            # Extraction halves its batches, and does without the choice.
            return
        raise
    found = {
        "kernels": max(rates, key=lambda name: rates[name]),
        "images_per_second": {name: round(found, 3) for name, found in rates.items()},
        "batch_size": size,
        "versions": package_versions(),
    }
    with locked(folder):
        # Another process that began at the same moment may have found otherwise.
        if not record_of(folder).exists():
            write_checked(record_of(folder), found)
            both = [f"{rate(rates[name], job.unit)} by {NAMES[name]}" for name in KERNELS]
            show.note(f"{', '.join(both)}: all are made by {NAMES[str(found['kernels'])]}")


def time_kernels(encoder: VisionEncoder, batch_size: int, k_vit: int = 0) -> dict[str, float]:
    """Return the images a second of the best forward pass by either kind, timed in turns."""
    pixels = np.random.default_rng(0).normal(size=(batch_size, *encoder.image_size, 3))
    pixels = pixels.astype(np.float32)

    def seconds(kernels: str) -> float:
        started = time.perf_counter()
        np.asarray(encoder.encode(pixels, k_vit, kernels))
        return time.perf_counter() - started

    for name in KERNELS:
        seconds(name)  # compiles
    taken = [{name: seconds(name) for name in KERNELS} for _ in range(ROUNDS)]
    return {name: batch_size / min(turn[name] for turn in taken) for name in KERNELS}


def _can_choose() -> bool:
    """Tell whether there is a choice: TensorFlow on a processor that can be told from others."""
    if import_framework() != "tensorflow" or not processor():
        return False
    import tensorflow as tf

    return not tf.config.list_physical_devices("GPU")
