"""What feeds extraction, alone: photos read, decoded and made pixels; the encoder does nothing.

The plain way beside it is what a short script does: Pillow opens, converts and
resizes, NumPy takes the pixels. Both have as many threads as cores, and take
turns in one process that may use no more cores than it is said to.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.extraction import write_photos
from benchmarks.measuring import in_child, ratios, seconds_of, spread, written
from benchmarks.tables import table
from featstore.config import StoreConfig, usable_cores

IMAGE = (224, 224)
CONVERTERS: dict[str, dict[str, Any]] = {
    "bilinear": {"interpolation": "bilinear", "antialias": False},
    "bicubic, antialias": {"interpolation": "bicubic", "antialias": True},
}


class NoEncoder:
    """A vision encoder that makes pixels, and nothing of them.

    Args:
        converter: A keras-hub `ImageConverter`.
    """

    num_tokens, width = 1, 1

    def __init__(self, converter: Any) -> None:
        from featstore.encoders.pixels import compile_converter

        self.to_pixels = compile_converter(converter)

    def encode(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """Return a zero for each photo."""
        return np.zeros((len(pixels), 1, 1), np.float32)


def plain(path: Path) -> NDArray[Any]:
    """Open, convert and resize a photo with Pillow, the middle of it, as a converter crops."""
    from PIL import Image

    with Image.open(path) as image:
        side = min(image.size)
        left, top = ((length - side) / 2 for length in image.size)
        box = (left, top, left + side, top + side)
        resized = image.convert("RGB").resize(IMAGE, Image.Resampling.BILINEAR, box)
        return np.asarray(resized, np.float32) / 127.5 - 1


def rates(paths: Sequence[Path], name: str, cores: int, rounds: int) -> dict[str, Any]:
    """Measure one converter of `CONVERTERS` in this process, which may then use `cores` only."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    from featstore.encoders.framework import import_framework
    from featstore.encoders.spec import VisionSpec
    from featstore.extract.encode import PhotoEncoding

    import_framework()
    import keras_hub

    options = {"scale": [1 / 127.5] * 3, "offset": [-1.0] * 3, **CONVERTERS[name]}
    converter = keras_hub.layers.ImageConverter(image_size=IMAGE, dtype="float32", **options)
    spec = VisionSpec("", "", {}, 0, "float16", "float32", True, {}, "", "patches")
    encoding: Any = PhotoEncoding(spec, NoEncoder(converter), StoreConfig(decode_threads=cores))  # type: ignore[arg-type]
    keys = [path.name for path in paths]

    def ours() -> None:
        failed = [item.reason for item in encoding.rows(keys, paths) if item.numbers is None]
        assert not failed, failed[0]

    def theirs() -> None:
        with ThreadPoolExecutor(cores) as pool:
            for _ in pool.map(plain, paths):
                pass

    found: dict[str, list[float]] = {"ours": [], "theirs": []}
    for round_number in range(rounds + 1):
        for way, run in (("ours", ours), ("theirs", theirs)):
            seconds = seconds_of(run)
            if round_number:
                found[way].append(len(paths) / seconds)
    return {
        "photos_per_second": spread(found["ours"], 1),
        "plain_photos_per_second": spread(found["theirs"], 1),
        "ratio": ratios(found["ours"], found["theirs"]),
    }


def measure(photos: str | None = None, count: int = 256, rounds: int = 5) -> dict[str, Any]:
    """Measure on synthetic photos, and on real ones where they are given.

    Args:
        photos: Folder of photos.
        count: Photos of each kind.
        rounds: After one that is not counted.

    Returns:
        Photos a second of both ways and their ratio, by photos, converter and cores.
    """
    cores = sorted({1, usable_cores()})
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"synthetic": write_photos(Path(scratch) / "photos", count)}
        if photos:
            folders["real"] = Path(photos)
        ways = []
        for kind, folder in folders.items():
            paths = sorted(folder.iterdir())[:count]
            for name in CONVERTERS:
                for usable in cores:
                    about = {"photos": kind, "converter": name, "cores": usable}
                    ways.append({**about, **in_child(rates, paths, name, usable, rounds)})
    return {"count": count, "rounds": rounds, "ways": ways}


def report(figures: dict[str, Any]) -> str:
    """Return the figures as a Markdown table."""
    note = (
        f"{figures['count']} photos to {IMAGE[0]}×{IMAGE[1]} pixels, {figures['rounds']} rounds;"
        " synthetic ones are JPEGs of 500×375. The plain way is Pillow's open, convert, resize"
        " (bilinear, which filters) and NumPy, in as many threads."
    )
    rows = [
        [
            way["photos"],
            way["converter"],
            str(way["cores"]),
            written(way["photos_per_second"], digits=0),
            written(way["plain_photos_per_second"], digits=0),
            written(way["ratio"], "×", 2),
        ]
        for way in figures["ways"]
    ]
    header = ["photos", "converter", "cores", "photos/s", "the plain way", "ratio"]
    return f"{note}\n\n{table(header, rows)}"
