"""A decoded photo as the pixels that its preset asks for: quickly, with the bits of the plain way.

The plain way is the preset's own converter, traced by TensorFlow. It spends most
of its time on copies: the photo widened to float32 before it is cropped, and a
new tensor for each step after the resizing. Here the photo is cropped as bytes,
resized by the same kernel, called by itself, and finished in place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from featstore.encoders.framework import import_framework

Photo = NDArray[np.uint8]
Pixels = NDArray[np.float32]
# From levels of shape (height, width, 3), whole numbers from 0 to 255, to others.
Change = Callable[[Pixels], Pixels]


class ToPixels(Protocol):
    """An image converter as a function of one photo; see `compile_converter`."""

    def __call__(self, photo: Photo, change: Change | None = None) -> Pixels:
        """Convert one photo, its levels changed before they are scaled and offset."""
        ...


# The operations that `tf.image.resize` calls by these names, and the kernels of
# `ScaleAndTranslate`, which it calls for all others and to filter what gets smaller.
_OPERATIONS = {
    "bilinear": "ResizeBilinear",
    "bicubic": "ResizeBicubic",
    "nearest": "ResizeNearestNeighbor",
}
_KERNELS = {
    "bilinear": "triangle",
    "bicubic": "keyscubic",
    "lanczos3": "lanczos3",
    "lanczos5": "lanczos5",
}


def compile_converter(converter: Any) -> ToPixels:
    """Return an image converter as a function of one photo, with the bits of its eager call.

    Args:
        converter: A keras-hub `ImageConverter`.

    Returns:
        From uint8 of shape (height, width, 3), of any size, to float32 of shape
        (*converter.image_size, 3); may be called from several threads.
    """
    try:
        import tensorflow as tf
    except ImportError:
        # On JAX alone: its resize, with other last bits (see docs/FORMAT.md).
        import_framework()
        resize, normalise = _parts(converter)
        return _Plain(
            lambda photo: np.asarray(converter(photo), np.float32),
            lambda photo: np.asarray(resize(photo), np.float32),
            lambda levels: np.asarray(normalise(levels), np.float32),
        )

    def graph_of(operations: Callable[[Any], Any], dtype: Any) -> Callable[[Any], Pixels]:
        signature = [tf.TensorSpec([None, None, 3], dtype)]

        @functools.cache
        def traced() -> Any:
            function = tf.function(operations, input_signature=signature, autograph=False)
            return function.get_concrete_function()

        return lambda array: traced()(tf.constant(array)).numpy()

    plain = _Plain(
        graph_of(converter_ops(converter), tf.uint8),
        graph_of(_level_ops(converter), tf.uint8),
        graph_of(_normal_ops(converter), tf.float32),
    )
    quick = QuickConverter(converter)
    # Another Keras may crop otherwise, and another processor's TensorFlow round otherwise.
    same = all(
        quick(photo).tobytes() == plain(photo).tobytes() for photo in _samples(converter.image_size)
    )
    return quick if same else plain


@dataclass(frozen=True)
class _Plain:
    """An image converter by its own layers: all of it, and its two halves."""

    whole: Callable[[Photo], Pixels]
    levels: Callable[[Photo], Pixels]
    normalised: Callable[[Pixels], Pixels]

    def __call__(self, photo: Photo, change: Change | None = None) -> Pixels:
        """Convert one photo; see `compile_converter`."""
        return self.whole(photo) if change is None else self.normalised(change(self.levels(photo)))


def _parts(converter: Any) -> tuple[Any, Any]:
    """Return a converter that only resizes, and one that only scales and offsets."""
    kind, config = type(converter), converter.get_config()
    return (
        kind.from_config({**config, "scale": None, "offset": None}),
        kind.from_config({**config, "image_size": None}),
    )


def converter_ops(converter: Any) -> Callable[[Any], Any]:
    """Return an image converter as TensorFlow operations, to be traced in a graph.

    Args:
        converter: A keras-hub `ImageConverter`.

    Returns:
        From a uint8 tensor of shape (height, width, 3) to a float32 one of shape
        (*converter.image_size, 3), with the bits of the converter's eager call.
    """
    levels, normal = _level_ops(converter), _normal_ops(converter)
    return lambda image: normal(levels(image))


def _level_ops(converter: Any) -> Callable[[Any], Any]:
    """Return what resizes a photo, rounded to whole levels, as TensorFlow operations."""
    import tensorflow as tf

    # By TensorFlow on either backend, as in a `tf.data` pipeline: JAX resizes to other last bits,
    # and a pixel that they round to another level moves a feature a hundred times as far.
    # Called eagerly, the converter rounds the resized image back to uint8; traced, it does not,
    # and the pixels differ by up to half a level. So resize, round, and normalise apart.

    def levels(image: Any) -> Any:
        with tf.device("CPU:0"):
            resized = converter.resizing(tf.cast(image, tf.float32))
            return tf.clip_by_value(tf.round(resized), 0.0, 255.0)

    return levels


def _normal_ops(converter: Any) -> Callable[[Any], Any]:
    """Return what scales and offsets a photo's levels, as TensorFlow operations."""
    import tensorflow as tf

    _, normalise = _parts(converter)

    def normal(levels: Any) -> Any:
        with tf.device("CPU:0"):
            return tf.cast(normalise(levels), tf.float32)

    return normal


def seen_box(
    shape: tuple[int, int], size: tuple[int, int], crop: bool = False, pad: bool = False
) -> tuple[int, int, int, int]:
    """Return the part of a photo that a converter resizes to its image size.

    Args:
        shape: Height and width of the photo.
        size: Height and width of the pixels.
        crop, pad: The converter's `crop_to_aspect_ratio` and `pad_to_aspect_ratio`.

    Returns:
        Top, left, height and width in pixels of the photo; where it is padded, top and left are
        negative or 0, and the part is larger than the photo.
    """
    # Counted in float32, as Keras counts.
    fitting = (
        int(np.float32(shape[1] * size[0]) / np.float32(size[1])),
        int(np.float32(shape[0] * size[1]) / np.float32(size[0])),
    )
    pairs = list(zip(shape, fitting, strict=True))
    if crop:
        height, width = (max(1, min(length, other)) for length, other in pairs)
        return (shape[0] - height) // 2, (shape[1] - width) // 2, height, width
    if pad:
        # As Keras: as much on both sides, so that an odd pixel is left out.
        top, left = (max(0, other - length) // 2 for length, other in pairs)
        return -top, -left, shape[0] + 2 * top, shape[1] + 2 * left
    return 0, 0, *shape


class QuickConverter:
    """An image converter with as few copies as can be: bytes cropped, one kernel, then in place.

    tests/test_pixels.py holds it to `converter_ops`, bit for bit.

    Args:
        converter: A keras-hub `ImageConverter`.
    """

    def __init__(self, converter: Any) -> None:
        self.height, self.width = converter.image_size
        self._interpolation, self._antialias = converter.interpolation, converter.antialias
        self._crop, self._pad = converter.crop_to_aspect_ratio, converter.pad_to_aspect_ratio
        self._scale, self._offset = self._line(converter.scale), self._line(converter.offset)

    def _line(self, given: Any) -> Pixels | None:
        """Return a number, or one a channel, for each number of a line of pixels."""
        # NumPy is slow where the last axis is only three long.
        if given is None:
            return None
        return np.tile(np.broadcast_to(np.asarray(given, np.float32), 3), self.width)

    def __call__(self, photo: Photo, change: Change | None = None) -> Pixels:
        """Convert one photo; see `compile_converter`."""
        if self._crop:
            photo = self._cropped(photo)
        elif self._pad:
            photo = self._padded(photo)
        pixels = np.empty((self.height, 3 * self.width), np.float32)
        # Rounded after, not before: a small negative number would be rounded to -0.0.
        np.clip(self._resized(photo), 0, 255, out=pixels)
        np.rint(pixels, out=pixels)
        if change is not None:
            levels = pixels.reshape(self.height, self.width, 3)
            pixels = change(levels).reshape(self.height, 3 * self.width)
        if self._scale is not None:
            pixels *= self._scale
        if self._offset is not None:
            pixels += self._offset
        return pixels.reshape(self.height, self.width, 3)

    def _box(self, photo: Photo) -> tuple[int, int, int, int]:
        size = self.height, self.width
        return seen_box(photo.shape[:2], size, self._crop, self._pad)

    def _cropped(self, photo: Photo) -> Photo:
        top, left, height, width = self._box(photo)
        return photo[top : top + height, left : left + width]

    def _padded(self, photo: Photo) -> Photo:
        top, left, _, _ = self._box(photo)
        return np.pad(photo, ((-top, -top), (-left, -left), (0, 0)))

    def _resized(self, photo: Photo) -> NDArray[Any]:
        """Return a photo in the converter's size: (height, 3 × width), not rounded."""
        import tensorflow as tf

        height, width = self.height, self.width
        if photo.shape[:2] == (height, width):
            return photo.reshape(height, 3 * width)
        with tf.device("CPU:0"):
            name = _OPERATIONS.get(self._interpolation)
            if name is None or (self._antialias and self._interpolation != "nearest"):
                return self._filtered(photo)
            # The bicubic kernel alone is slower on bytes.
            images = photo.astype(np.float32) if name == "ResizeBicubic" else photo
            operation = getattr(tf.raw_ops, name)
            resized = operation(images=images[None], size=(height, width), half_pixel_centers=True)
        return _array(resized).reshape(height, 3 * width)

    def _filtered(self, photo: Photo) -> NDArray[Any]:
        """Return `_resized` by `ScaleAndTranslate`: first the height, then the width, as it does.

        It takes three numbers at a time where it filters the width. What is one pixel wide,
        with a line for its channels, it filters with all the processor's vectors.
        """
        height, width, _ = photo.shape
        lines = self._shrunk(photo.reshape(height, 3 * width), self.height)
        columns = self._shrunk(lines.T.reshape(width, 3 * self.height), self.width)
        return columns.reshape(3 * self.width, self.height).T

    def _shrunk(self, lines: NDArray[Any], count: int) -> NDArray[Any]:
        """Return `count` lines made of some lines, each of the same length."""
        import tensorflow as tf

        scale = np.float32(count) / np.float32(len(lines))
        return _array(
            tf.raw_ops.ScaleAndTranslate(
                images=lines[None, :, None],
                size=(count, 1),
                scale=(scale, 1.0),
                translation=(0.0, 0.0),
                kernel_type=_KERNELS[self._interpolation],
                antialias=self._antialias,
            )
        ).reshape(count, -1)


def _array(tensor: Any) -> NDArray[Any]:
    """Return a tensor of TensorFlow, on the CPU, as an array over the same memory."""
    return np.asarray(memoryview(tensor))


def _samples(size: tuple[int, int]) -> Iterator[Photo]:
    """Yield photos of noise, wider and higher than an image size, larger and smaller."""
    generator = np.random.default_rng(0)
    for high, wide in ((1.4, 1.7), (1.6, 1.2), (0.7, 0.4), (0.5, 1.3)):
        shape = (int(high * size[0]) + 1, int(wide * size[1]) + 1, 3)
        yield generator.integers(0, 256, shape, dtype=np.uint8)
