"""The quick way from a photo to pixels: bit for bit the plain way, whatever the photo."""

from __future__ import annotations

import functools
import io
import itertools
from collections.abc import Callable
from typing import Any

import keras_hub
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from featstore.data.images import decode_image
from featstore.encoders import pixels
from featstore.encoders.pixels import QuickConverter, compile_converter, converter_ops

TARGET = (24, 40)
SIZES = [
    TARGET,
    (40, 24),
    (1, 1),
    (1, 7),
    (9, 2),
    (23, 41),
    (37, 61),
    (61, 37),
    (90, 150),
    (400, 3),
]
GEOMETRIES = {"crop": (True, False), "pad": (False, True), "stretch": (False, False)}
SCALED = {"scale": [0.017, 0.0175, 1 / 127.5], "offset": [-2.1, -1.0, -1.8]}


def converter_of(geometry: str, **options: Any) -> Any:
    crop, pad = GEOMETRIES[geometry]
    return keras_hub.layers.ImageConverter(
        image_size=TARGET,
        crop_to_aspect_ratio=crop,
        pad_to_aspect_ratio=pad,
        dtype="float32",
        **options,
    )


def plain_of(converter: Any) -> Callable[[np.ndarray], bytes]:
    traced = tf.function(
        converter_ops(converter), input_signature=[tf.TensorSpec([None, None, 3], tf.uint8)]
    ).get_concrete_function()
    return lambda photo: traced(tf.constant(photo)).numpy().tobytes()


@functools.cache
def photos() -> list[np.ndarray]:
    """Return noise, and black and white alone, which overshoot both ends of the levels."""
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]
    return [*noise, *(255 * (photo > 127).astype(np.uint8) for photo in noise)]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(
    "interpolation", ["nearest", "bilinear", "bicubic", "lanczos3", "lanczos5"]
)
def test_every_converter(interpolation: str, antialias: bool, geometry: str) -> None:
    numbers = {"crop": SCALED, "pad": {"scale": 1 / 127.5, "offset": -1.0}, "stretch": {}}
    options = {"interpolation": interpolation, "antialias": antialias, **numbers[geometry]}
    converter = converter_of(geometry, **options)
    quick, plain = QuickConverter(converter), plain_of(converter)
    for photo in photos():
        found = quick(photo)
        assert (found.dtype, found.shape) == (np.float32, (*TARGET, 3))
        assert found.tobytes() == plain(photo), photo.shape


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("antialias", [True, False])
def test_every_mode_and_orientation(antialias: bool, geometry: str) -> None:
    converter = converter_of(geometry, interpolation="bicubic", antialias=antialias, **SCALED)
    quick, plain = QuickConverter(converter), plain_of(converter)
    noise = Image.fromarray(photos()[SIZES.index((37, 61))])
    modes = ["RGB", "L", "1", "P", "RGBA", "LA", "I;16"]
    files = [(mode, "PNG", 1) for mode in modes]
    files += [("RGB", "JPEG", turn) for turn in range(1, 9)]
    files += [(mode, "JPEG", 6) for mode in ("L", "CMYK")]
    seen = set()
    for mode, kind, turn in files:
        exif, buffer = Image.Exif(), io.BytesIO()
        exif[0x0112] = turn
        image = noise.convert("I").convert(mode) if mode == "I;16" else noise.convert(mode)
        if mode in ("RGBA", "LA"):
            image.putalpha(128)
        image.save(buffer, kind, exif=exif)
        photo = decode_image(buffer.getvalue(), f"{mode} {turn}")
        assert photo.shape == ((61, 37, 3) if turn > 4 else (37, 61, 3))
        found = quick(photo).tobytes()
        assert found == plain(photo), (mode, kind, turn)
        seen.add(found)
    assert len(seen) == len(files)


def test_a_photo_is_not_written_to() -> None:
    for photo, geometry in itertools.product(photos()[:3], GEOMETRIES):
        before = photo.copy()
        photo.flags.writeable = False
        QuickConverter(converter_of(geometry, **SCALED))(photo)
        photo.flags.writeable = True
        np.testing.assert_array_equal(photo, before)


def test_other_bits_than_the_plain_way_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    converter = converter_of("crop", interpolation="bilinear", **SCALED)
    assert isinstance(compile_converter(converter), QuickConverter)
    monkeypatch.setitem(pixels._OPERATIONS, "bilinear", "ResizeBicubic")
    chosen = compile_converter(converter)
    assert not isinstance(chosen, QuickConverter)
    for photo in photos()[:4]:
        assert chosen(photo).tobytes() == plain_of(converter)(photo)
