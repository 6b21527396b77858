"""Photos: find them by image id, decode them to 8-bit RGB."""

from __future__ import annotations

import contextlib
import heapq
import io
import itertools
import os
import unicodedata
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, UnidentifiedImageError

from featstore.data.tables import PackedPhoto
from featstore.errors import DataError, ImageError
from featstore.pinned import Outermost, setting

_FIRST_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
IMAGE_SUFFIXES = (*_FIRST_SUFFIXES, ".jfif", ".jpe", ".gif", ".bmp", ".tif", ".tiff", ".avif")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_KINDS = "JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF"

DECODER = "pillow/rgb8/first-frame/exif-orientation/alpha-on-white/grey16-div257/v1"
"""Names the rules of `decode_image`; change it with any of them, for it is part of what a
feature is."""

MAX_PIXELS = 178_956_970 // 2
MAX_FILE_BYTES = 512 << 20

Photo = Path | PackedPhoto
"""Where a photo is."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_TAG = 0x0112


def _of_pillow() -> AbstractContextManager[Any]:
    """Hold Pillow's settings at what the rules of `decode_image` need."""
    held = (
        # A photo that was cut short is damaged, not half grey.
        (ImageFile, "LOAD_TRUNCATED_IMAGES", False),
        # `max_pixels` is asked, before any pixel is decoded.
        (Image, "MAX_IMAGE_PIXELS", None),
    )
    with ExitStack() as stack:
        for module, name, value in held:
            read, write = partial(getattr, module, name), partial(setattr, module, name)
            stack.enter_context(setting(read, write, value))
        return stack.pop_all()


_PILLOW = Outermost(_of_pillow)


@dataclass(frozen=True)
class ImageIndex:
    """The photos of a folder by image id.

    An image id is the path below the folder, with `/`, with or without the suffix. Ids are
    compared with what was found in the folder, never joined to it: no id leads out of it.
    Where several files answer one, a JPEG, PNG or WebP goes before a file of another format.

    Attributes:
        folder: The folder.
        passed_over: What below it could not be listed, with the reason.
        others: Files below it whose suffix is not in `IMAGE_SUFFIXES`.
    """

    folder: Path
    _files: dict[str, tuple[str, ...]] = field(repr=False)
    _stems: dict[str, tuple[str, ...]] = field(repr=False)
    passed_over: tuple[str, ...] = ()
    others: tuple[str, ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        """Return the number of files."""
        return sum(map(len, self._files.values()))

    def names(self) -> Iterator[str]:
        """Yield the name of each file below the folder, `/` between folders."""
        return itertools.chain.from_iterable(self._files.values())

    def lookup(self, image_id: str) -> Photo | None:
        """Return the file of an image id, or None where there is none.

        Raises:
            DataError: Two files answer the id; names both.
        """
        image_id = unicodedata.normalize("NFC", image_id)
        files = self._files.get(_plain(image_id), ()) + self._stems.get(image_id, ())
        if not files:
            return None
        if len(files) > 1:
            files = tuple(n for n in files if n.lower().endswith(_FIRST_SUFFIXES)) or files
        if len(files) > 1:
            raise DataError(
                f"{self.folder}: two files answer image id {image_id!r}: {files[0]!r} and"
                f" {files[1]!r}; remove one, or write the suffix in the rows"
            )
        return self.folder / files[0]


def index_images(folder: str | os.PathLike[str]) -> ImageIndex:
    """List the photos of a folder and of the folders in it.

    Links are followed. A folder that is reached more than once, as through a link that forms a
    circle, is listed once: where it stands itself, before where a link to it stands. A folder
    below that cannot be listed is passed over, and named in the index.

    Args:
        folder: The folder; a file counts if its suffix, in any case, is in
            `IMAGE_SUFFIXES`.

    Raises:
        DataError: The folder cannot be listed.

    Cost: one pass of `os.scandir`; 40,000 files take about 0.2 s.
    """
    folder = Path(folder)
    files: dict[str, tuple[str, ...]] = {}
    stems: dict[str, tuple[str, ...]] = {}
    passed_over: list[str] = []
    others: list[str] = []
    for name in _files_below(folder, passed_over):
        if not name.lower().endswith(IMAGE_SUFFIXES):
            others.append(name)
            continue
        # macOS archives hold decomposed names; the rows hold composed ones.
        composed = unicodedata.normalize("NFC", name)
        stem = composed[: composed.rindex(".")]
        files[_plain(composed)] = (*files.get(_plain(composed), ()), name)
        stems[stem] = (*stems.get(stem, ()), name)
    return ImageIndex(folder, files, stems, tuple(passed_over), tuple(others))


def read_bytes(path: Photo) -> bytes:
    """Return a photo's bytes.

    Raises:
        ImageError: The file cannot be read, or is larger than `MAX_FILE_BYTES`.
    """
    if isinstance(path, PackedPhoto):
        return path.read()
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_FILE_BYTES:
                raise ImageError(
                    f"{os.fspath(path)}: {size} bytes, expected at most {MAX_FILE_BYTES}"
                )
            return file.read()
    except OSError as error:
        raise ImageError(f"{os.fspath(path)}: cannot be read ({error.strerror})") from error


def decode_image(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.uint8]:
    """Decode a photo of one of `FORMATS` to 8-bit RGB.

    Rules, named by `DECODER`: the first frame of an animation, or page of a TIFF; turned as
    its EXIF orientation says (an unreadable EXIF block counts as none); transparency laid on
    white; 16-bit grey divided by 257 and rounded, 16-bit colour cut to its high byte; grey
    repeated in the three channels; CMYK by Pillow's formula; colour profiles ignored.

    Args:
        data: The file's bytes.
        name: What to call the photo in an error.
        max_pixels: Most pixels allowed, compared with the size in the file's header,
            before any pixel is decoded.

    Returns:
        uint8 of shape (height, width, 3), height and width at least 1; contiguous, owned
        by the caller.

    Raises:
        ImageError: Not one of the formats, damaged, cut short, or too large; one reason.

    Thread-safe. Pillow's own settings decide nothing: `LOAD_TRUNCATED_IMAGES` and
    `MAX_IMAGE_PIXELS` are held while photos are decoded, and put back.
    """
    with _opened(data, name, max_pixels) as image:
        image.load()
        turned = _to_rgb(image)
        turn = _TURNS.get(_orientation(image))
        if turn is not None:
            turned = turned.transpose(turn)
        return np.array(turned, dtype=np.uint8)


class Glance(NamedTuple):
    """What a photo is, and a small grey picture of it.

    Attributes:
        width, height: Pixels, once the photo is turned as `decode_image` does.
        format: One of `FORMATS`, or what Pillow calls a relative of it, such as "MPO".
        grey: uint8 of shape (side, side): the whole photo, its sides squeezed to one length.
    """

    width: int
    height: int
    format: str
    grey: npt.NDArray[np.uint8]


def glance(data: bytes, name: str, side: int = 32, max_pixels: int = MAX_PIXELS) -> Glance:
    """Decode a photo only as far as a small grey picture of it needs.

    A JPEG is decoded at a fraction of its size, so this takes a fraction of `decode_image`'s
    time; every byte is read all the same, and damage is found as there.

    Args:
        data, name, max_pixels: As of `decode_image`.
        side: Pixels of the picture's sides; each is the mean of the pixels that it stands for.

    Raises:
        ImageError: As `decode_image`.
    """
    with _opened(data, name, max_pixels) as image:
        width, height = image.size
        image.draft("L", (2 * side, 2 * side))
        image.load()
        grey = image if image.mode == "L" else _to_rgb(image).convert("L")
        orientation = _orientation(image)
        if (turn := _TURNS.get(orientation)) is not None:
            grey = grey.transpose(turn)
            if orientation >= 5:
                width, height = height, width
        small = grey.resize((side, side), Image.Resampling.BOX)
        return Glance(width, height, image.format or "", np.array(small, dtype=np.uint8))


@contextlib.contextmanager
def _opened(data: bytes, name: str, max_pixels: int) -> Iterator[Image.Image]:
    """Open a photo to decode it; whatever that raises becomes the one error."""
    if not data:
        raise ImageError(f"{name}: the file is empty; expected a {_KINDS} image")
    try:
        with _PILLOW, Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width < 1 or height < 1:
                raise ImageError(f"{name}: {width}×{height} pixels; expected at least 1×1")
            if width * height > max_pixels:
                raise _too_large(name, f"{width}×{height} pixels", max_pixels)
            if image.mode == "F":
                raise ImageError(
                    f"{name}: floating-point pixels, whose white is not known; expected whole"
                    " numbers: save the photo with 8 or 16 bits a channel"
                )
            yield image
    except (ImageError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name, "more pixels than Pillow opens", max_pixels) from error
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name}: not a {_KINDS} image, or its header is damaged (first bytes: {data[:8]!r})"
        ) from error
    # On damaged bytes Pillow's plug-ins raise whatever their parsing trips over: OSError,
    # SyntaxError, ValueError, struct.error, zlib.error, KeyError and more.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name}: damaged or cut short: {reason}; replace the file") from error


def _files_below(folder: Path, passed_over: list[str]) -> Iterator[str]:
    """Yield the names of the files below a folder, `/` between folders; see `index_images`.

    Args:
        folder: The folder.
        passed_over: Is given what could not be listed, with the reason.
    """
    seen: set[tuple[int, int]] = set()
    # The folders that are left, and last of all, by their names, the links to folders.
    left, links = [""], list[str]()
    while left or links:
        prefix = left.pop() if left else heapq.heappop(links)
        path = f"{folder}/{prefix}"
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                for entry in entries:
                    name = prefix + entry.name
                    if entry.is_dir(follow_symlinks=False):
                        left.append(name + "/")
                    elif entry.is_symlink() and _leads_to(entry) == "folder":
                        heapq.heappush(links, name + "/")
                    elif _leads_to(entry) == "file":
                        yield name
        except OSError as error:
            if not prefix:
                raise DataError(
                    f"{folder}: photos cannot be listed ({error.strerror});"
                    " expected a readable folder of photos"
                ) from error
            passed_over.append(f"{folder / prefix}: cannot be listed ({error.strerror})")


def _plain(name: str) -> str:
    """Return a name with an image suffix in lower case."""
    stem, dot, suffix = name.rpartition(".")
    lower = dot + suffix.lower()
    return stem + lower if lower in IMAGE_SUFFIXES else name


def _leads_to(entry: os.DirEntry[str]) -> str:
    """Return "file" or "folder", links followed; "" for what is neither, or cannot be reached."""
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else ""
    except OSError:
        return ""


def _too_large(name: str, found: str, max_pixels: int) -> ImageError:
    return ImageError(f"{name}: {found}; expected at most {max_pixels} pixels: shrink the photo")


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # the pixels are sound; see the rules in decode_image
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert a loaded image of any mode to RGB."""
    if image.mode.startswith("I"):
        # Pillow's own conversion clips: every value above 255 would be white.
        values = np.asarray(image).clip(0, 65535).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    # Pillow would copy what is RGB already.
    return image if image.mode == "RGB" else image.convert("RGB")
