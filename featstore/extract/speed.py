"""How fast an extraction will be, said in a moment: as it was last time here, else from its size.

The last extraction on this machine is kept in `<root>/speeds.json`. Without one, the arithmetic
of an encoder's blocks is divided by the speed of a matrix product in NumPy, measured for a
fraction of a second: the right order of magnitude for a CPU, where nearly all the time of a
transformer goes into such products. A few of the photos are decoded, since of a small encoder
that is most of it. Nothing is said so of a GPU; there the encoder itself is timed.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from featstore.data.images import Photo, decode_image, read_bytes
from featstore.encoders.families import FAMILIES, num_patches
from featstore.encoders.spec import FeatureSpec, TextSpec
from featstore.errors import FeatstoreError, ImageError
from featstore.publish import read_checked, write_checked

SPEEDS_FILE = "speeds.json"
LEAST_ROWS = 256
"""Rows of an extraction that says something of the speed: the first batch is compiled."""
MEASURED_SECONDS = 0.2
DECODED_PHOTOS = 8
GPU_DEVICES = ("/dev/nvidia0", "/dev/kfd", "/dev/dxg")


def has_gpu() -> bool:
    """Tell whether there may be a GPU, without asking a framework."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and any(Path(device).exists() for device in GPU_DEVICES)


def _machine() -> str:
    return f"{platform.node()}, {os.cpu_count()} CPUs"


def _read(root: Path) -> list[dict[str, Any]]:
    try:
        found = read_checked(root / SPEEDS_FILE)["speeds"]
        return [line for line in found if float(line["rows_per_second"]) > 0]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def record_speed(root: Path, spec: FeatureSpec, rows: int, rows_per_second: float) -> None:
    """Keep how fast an extraction was; a root that may not be written goes without."""
    if rows < LEAST_ROWS:
        return
    line = {"fingerprint": spec.fingerprint, "machine": _machine()}
    others = [old for old in _read(root) if not line.items() <= old.items()]
    speed = {**line, "rows_per_second": round(rows_per_second, 3)}
    with contextlib.suppress(FeatstoreError):
        write_checked(root / SPEEDS_FILE, {"speeds": [*others, speed]})


def recorded_speed(root: Path, spec: FeatureSpec) -> float | None:
    """Return inputs a second of the last extraction on this machine; None without one.

    A photometric view of which none is known takes as long as the plain photos did.
    """
    speeds = {
        line["fingerprint"]: float(line["rows_per_second"])
        for line in _read(root)
        if line.get("machine") == _machine()
    }
    return speeds.get(spec.fingerprint, speeds.get(spec.plain.fingerprint))


def operations(spec: FeatureSpec) -> float:
    """Return the additions and multiplications of one input in the blocks that are run.

    Of a block of width d and inner width m over n tokens: 2n(4d² + 2dm) in its matrices and
    4n²d between its tokens.
    """
    made, blocks = spec.architecture, spec.boundary
    width = made["hidden_dim"]
    inner = made.get("mlp_dim") or made.get("intermediate_dim") or 4 * width
    if isinstance(spec, TextSpec):
        tokens = spec.sequence_length
    else:
        tokens = num_patches(made) + FAMILIES[spec.encoder].leading_tokens(made)
    block = 2 * tokens * (4 * width**2 + 2 * width * inner) + 4 * tokens**2 * width
    return float(max(1, blocks) * block)


def _decode_seconds(photos: Sequence[Photo]) -> float:
    """Return the seconds in which a thread reads and decodes a photo; 0 without any."""
    started, decoded = time.perf_counter(), 0
    for path in photos[:: max(1, len(photos) // DECODED_PHOTOS)]:
        with contextlib.suppress(ImageError):
            decode_image(read_bytes(path), path.name)
            decoded += 1
    return (time.perf_counter() - started) / max(1, decoded)


def estimated_speed(spec: FeatureSpec, photos: Sequence[Photo] = (), threads: int = 1) -> float:
    """Return inputs a second from `operations` and this machine's matrix product.

    Args:
        spec: Of the features.
        photos: The inputs' photos, a few of which are decoded; none of sentences.
        threads: That decode them.
    """
    left = np.ones((4096, 512), np.float32)
    right = np.ones((512, 1024), np.float32)
    left @ right
    count, started = 0, time.perf_counter()
    while (seconds := time.perf_counter() - started) < MEASURED_SECONDS:
        left @ right
        count += 1
    arithmetic = operations(spec) * seconds / (count * 2 * left.size * right.shape[1])
    return 1 / (arithmetic + _decode_seconds(photos) / min(threads, os.cpu_count() or 1))
