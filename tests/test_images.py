"""Photos: every kind of file that Pillow can meet, made here and read back."""

from __future__ import annotations

import io
import os
import struct
import threading
import unicodedata
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngImageFile
from unprivileged import forbidden

from featstore.data import images
from featstore.data.images import decode_image, index_images, read_bytes
from featstore.errors import DataError, ImageError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
U8 = npt.NDArray[np.uint8]


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixel(data: bytes) -> tuple[int, ...]:
    decoded = decode_image(data, "x")
    assert decoded.dtype == np.uint8
    assert decoded.shape[2] == 3
    return tuple(decoded[0, 0].tolist())


def chunk(kind: bytes, body: bytes) -> bytes:
    crc = struct.pack(">I", zlib.crc32(kind + body))
    return struct.pack(">I", len(body)) + kind + body + crc


def png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    """Write a PNG by hand, for the kinds that Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = (
        chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.fixture(scope="module")
def photo() -> bytes:
    """A smooth 64×48 JPEG."""
    y, x = np.mgrid[0:48, 0:64]
    pixels = np.stack([x * 4, y * 5, 255 - x * 2], axis=-1).astype(np.uint8)
    return encode(Image.fromarray(pixels), "JPEG", quality=95)


# The index.


def test_lookup_with_and_without_suffix(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.JPEG", "sub/deep/c.Png", "d.e.webp", "notes.txt", "f.heic", "jpg")
    touch(tmp_path, "g.gif", "h.TIFF", "i.jfif", "j.avif", "k.bmp", "l.tif", "m.jpe")
    index = index_images(tmp_path)
    assert len(index) == 11
    assert sorted(index.names())[:2] == ["a.jpg", "b.JPEG"]
    for name in ("g.gif", "h.TIFF", "i.jfif", "j.avif", "k.bmp", "l.tif", "m.jpe"):
        assert index.lookup(name) == index.lookup(name[0]) == tmp_path / name
    assert index.lookup("a") == index.lookup("a.jpg") == index.lookup("a.JPG") == tmp_path / "a.jpg"
    assert index.lookup("b") == index.lookup("b.jpeg") == tmp_path / "b.JPEG"
    assert index.lookup("sub/deep/c") == tmp_path / "sub/deep/c.Png"
    assert index.lookup("d.e") == tmp_path / "d.e.webp"
    for absent in ("a.png", "A", "c", "notes", "notes.txt", "f", "jpg", "", ".jpg", "d"):
        assert index.lookup(absent) is None


def test_no_id_leaves_the_folder(tmp_path: Path) -> None:
    touch(tmp_path, "in/a.jpg", "secret.jpg")
    index = index_images(tmp_path / "in")
    for image_id in ("../secret", "../secret.jpg", str(tmp_path / "secret.jpg"), "./a", "x/../a"):
        assert index.lookup(image_id) is None


def test_two_files_for_one_id(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "a.png", "b.jpg", "b.jpg.png", "c.jpg", "c.JPG")
    index = index_images(tmp_path)
    assert len(index) == 6
    for image_id, first, second in (
        ("a", "a.jpg", "a.png"),
        ("b.jpg", "b.jpg", "b.jpg.png"),
        ("c.jpg", "c.jpg", "c.JPG"),
        ("c", "c.jpg", "c.JPG"),
    ):
        with pytest.raises(DataError, match="two files answer") as caught:
            index.lookup(image_id)
        assert repr(first) in str(caught.value)
        assert repr(second) in str(caught.value)
    assert index.lookup("a.png") == tmp_path / "a.png"
    assert index.lookup("b") == tmp_path / "b.jpg"


def test_the_formats_read_first_go_before_the_others(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "a.gif", "b.gif", "b.gif.png", "c.gif", "c.tif")
    index = index_images(tmp_path)
    assert index.lookup("a") == tmp_path / "a.jpg"
    assert index.lookup("a.gif") == tmp_path / "a.gif"
    assert index.lookup("b.gif") == tmp_path / "b.gif.png"
    assert index.lookup("b") == tmp_path / "b.gif"
    with pytest.raises(DataError, match="two files answer"):
        index.lookup("c")


def test_names_composed_and_decomposed(tmp_path: Path) -> None:
    name = unicodedata.normalize("NFD", "café")
    touch(tmp_path, f"{name}.jpg")
    index = index_images(tmp_path)
    assert index.lookup("café") == index.lookup(name) == tmp_path / f"{name}.jpg"


def test_links(tmp_path: Path) -> None:
    touch(tmp_path, "other/x.jpg", "in/a.jpg")
    (tmp_path / "in/link.jpg").symlink_to(tmp_path / "other/x.jpg")
    (tmp_path / "in/broken.jpg").symlink_to(tmp_path / "none")
    (tmp_path / "in/circle").symlink_to(tmp_path / "in")
    (tmp_path / "in/folder.jpg").mkdir()
    (tmp_path / "in/itself.jpg").symlink_to("itself.jpg")
    index = index_images(tmp_path / "in")
    assert len(index) == 2
    assert index.lookup("link") == tmp_path / "in/link.jpg"
    assert index.passed_over == ()


def test_linked_folders_are_listed_once(tmp_path: Path) -> None:
    touch(tmp_path, "in/real/a.jpg", "out/b.jpg", "out/deep/c.jpg")
    for link, target in (
        *(("in/1", "in/real"), ("in/2", "out"), ("in/3.jpg", "out"), ("in/4", "out/deep")),
        *(("out/back", "in"), ("in/none", "absent")),
    ):
        (tmp_path / link).symlink_to(tmp_path / target)
    names = sorted(index_images(tmp_path / "in").names())
    assert names == ["2/b.jpg", "2/deep/c.jpg", "real/a.jpg"]


def test_a_folder_below_that_cannot_be_listed_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "closed/b.jpg")
    with forbidden(tmp_path / "closed", left=0):
        index = index_images(tmp_path)
    assert list(index.names()) == ["a.jpg"]
    assert index.passed_over == (f"{tmp_path / 'closed'}: cannot be listed (Permission denied)",)


def test_folder_that_cannot_be_listed(tmp_path: Path) -> None:
    touch(tmp_path, "file.jpg")
    for path in (tmp_path / "none", tmp_path / "file.jpg"):
        with pytest.raises(DataError, match="photos cannot be listed") as caught:
            index_images(path)
        assert str(path) in str(caught.value)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert len(index_images(empty)) == 0


def test_many_files_are_indexed_in_one_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(400):
        os.close(os.open(tmp_path / f"{i}.jpg", os.O_CREAT | os.O_WRONLY))
    calls = []
    for name in ("stat", "lstat", "scandir", "listdir"):
        call = getattr(os, name)
        monkeypatch.setattr(
            os,
            name,
            lambda *given, call=call, name=name, **options: (
                calls.append(name) or call(*given, **options)
            ),
        )
    index = index_images(tmp_path)
    monkeypatch.undo()
    # The folder alone: what a file is stands in its entry.
    assert calls == ["stat", "scandir"]
    assert len(index) == 400


def test_read_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert read_bytes(tmp_path / "a") == b"abc"
    with pytest.raises(ImageError, match="cannot be read"):
        read_bytes(tmp_path / "none")
    with pytest.raises(ImageError, match="cannot be read"):
        read_bytes(tmp_path)
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 2)
    with pytest.raises(ImageError, match="3 bytes, expected at most 2"):
        read_bytes(tmp_path / "a")


# Decoding: sound files.


@pytest.mark.parametrize("size", [(1, 1), (20000, 1), (1, 20000), (7, 5)])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_sizes(size: tuple[int, int], format: str) -> None:
    if format == "WEBP":
        size = (min(size[0], 16383), min(size[1], 16383))  # the format's limit
    decoded = decode_image(encode(Image.new("RGB", size, (40, 80, 120)), format), "x")
    assert decoded.shape == (size[1], size[0], 3)
    assert np.abs(decoded.astype(int) - (40, 80, 120)).max() <= 3
    assert decoded.flags.c_contiguous
    assert decoded.flags.writeable
    assert decoded.flags.owndata


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_lossless_pixels_come_back(width: int, height: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    for data in (encode(image), encode(image, "WEBP", lossless=True)):
        np.testing.assert_array_equal(decode_image(data, "x"), pixels)


@pytest.mark.parametrize(
    ("format", "mode"),
    [
        *(("BMP", mode) for mode in ("RGB", "L", "P", "1")),
        *(("TIFF", mode) for mode in ("RGB", "L", "P", "1", "CMYK", "I;16", "RGBA")),
        *(("GIF", mode) for mode in ("L", "P", "1")),
        ("AVIF", "RGB"),
    ],
)
def test_other_formats_hold_the_same_pixels(format: str, mode: str) -> None:
    """What PNG says of a picture, the others say of it; AVIF nearly."""
    y, x = np.mgrid[0:6, 0:8]
    picture = Image.fromarray(np.stack([x * 30, y * 40, x * y * 5], axis=-1).astype(np.uint8))
    if mode == "I;16":
        picture = Image.fromarray((x * 8000 + y).astype(np.uint16))
    elif mode == "RGBA":
        picture.putalpha(Image.fromarray((x * 30).astype(np.uint8)))
    else:
        picture = picture.convert(mode)
    options = {"quality": 100, "subsampling": "4:4:4"} if format == "AVIF" else {}
    decoded = decode_image(encode(picture, format, **options), "x").astype(int)
    plain = picture.convert("RGB") if mode == "CMYK" else picture
    expected = decode_image(encode(plain), "x").astype(int)
    assert np.abs(decoded - expected).max() <= (4 if format == "AVIF" else 0)


def test_floating_point_pixels_are_refused() -> None:
    said = reason(encode(Image.new("F", (2, 2), 0.5), "TIFF"))
    assert "floating-point pixels" in said
    assert "damaged" not in said


def test_negative_pixels_are_black() -> None:
    assert pixel(encode(Image.new("I", (2, 2), -5), "TIFF")) == (0, 0, 0)


def test_grey_and_black_and_white() -> None:
    assert pixel(encode(Image.new("L", (2, 2), 77))) == (77, 77, 77)
    assert pixel(encode(Image.new("L", (2, 2), 77), "JPEG")) == (77, 77, 77)
    assert pixel(encode(Image.new("1", (2, 2), 1))) == WHITE


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, 0), (128, 0), (129, 1), (255, 1), (257, 1), (32768, 128), (65535, 255)],
)
def test_16_bit_grey_is_scaled(value: int, expected: int) -> None:
    data = encode(Image.fromarray(np.full((2, 3), value, dtype=np.uint16)))
    assert Image.open(io.BytesIO(data)).mode.startswith("I")
    assert pixel(data) == (expected,) * 3


def test_16_bit_colour() -> None:
    row = b"\0" + struct.pack(">HHH", 0xFF00, 0x80FF, 0x0001)
    assert pixel(png(1, 1, 16, 2, row)) == (255, 128, 0)
    grey_alpha = b"\0" + struct.pack(">HH", 0x4000, 0xFFFF)
    assert pixel(png(1, 1, 16, 4, grey_alpha)) == (64, 64, 64)


def test_transparency_is_laid_on_white() -> None:
    assert pixel(encode(Image.new("RGBA", (2, 2), (255, 0, 0, 0)))) == WHITE
    assert pixel(encode(Image.new("RGBA", (2, 2), (255, 0, 0, 255)))) == RED
    assert pixel(encode(Image.new("RGBA", (2, 2), (0, 0, 0, 51)))) == (204, 204, 204)
    assert pixel(encode(Image.new("LA", (2, 2), (0, 0)))) == WHITE
    assert pixel(encode(Image.new("LA", (2, 2), (9, 255)))) == (9, 9, 9)
    assert pixel(encode(Image.new("RGBA", (2, 2), (255, 0, 0, 0)), "WEBP", lossless=True)) == WHITE


def test_palettes() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    assert decode_image(encode(image), "x").tolist() == [[list(RED), list(GREEN)]]
    one = decode_image(encode(image, transparency=0), "x")
    assert one.tolist() == [[list(WHITE), list(GREEN)]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        each = decode_image(encode(image, transparency=b"\xff\x00"), "x")
    assert each.tolist() == [[list(RED), list(WHITE)]]


def test_a_transparent_colour() -> None:
    rgb = png(1, 1, 8, 2, b"\0" + bytes(RED), chunk(b"tRNS", struct.pack(">HHH", *RED)))
    assert pixel(rgb) == WHITE
    grey = png(2, 1, 8, 0, b"\0\x05\x06", chunk(b"tRNS", struct.pack(">H", 5)))
    assert decode_image(grey, "x").tolist() == [[list(WHITE), [6, 6, 6]]]


def test_cmyk_jpeg() -> None:
    red, green, blue = pixel(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert red > 250
    assert max(green, blue) < 5


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "TIFF"])
def test_first_frame_of_an_animation(format: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    assert pixel(data) == RED


def test_several_pictures_in_one_jpeg() -> None:
    data = encode(
        Image.new("RGB", (8, 8), RED), "MPO", save_all=True, append_images=[Image.new("L", (8, 8))]
    )
    assert pixel(data)[0] > 250


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(format: str, orientation: int) -> None:
    """The camera's rows and columns, stored as each orientation says, come out upright."""
    corners = np.zeros((16, 32, 3), dtype=np.uint8)
    corners[:8, :16], corners[:8, 16:], corners[8:, :16] = RED, GREEN, BLUE
    # EXIF 2.32, tag 274: where row 0 and column 0 of the stored array lie in the picture.
    stored: U8 = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: a.transpose(1, 0, 2)[::-1],
        7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    }[orientation](corners)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"exif": exif}
    if format == "WEBP":
        options["lossless"] = True
    if format == "JPEG":
        options.update(quality=95, subsampling=0)
    if format == "AVIF":
        options.update(quality=95, subsampling="4:4:4")
    data = encode(Image.fromarray(np.ascontiguousarray(stored)), format, **options)
    decoded = decode_image(data, "x").astype(int)
    assert decoded.shape == corners.shape
    assert np.abs(decoded - corners).max() <= 6


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0"]
)
def test_unreadable_exif_counts_as_none(photo: bytes, exif: bytes) -> None:
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decoded = decode_image(photo[:2] + segment + photo[2:], "x")
    np.testing.assert_array_equal(decoded, decode_image(photo, "x"))


# Decoding: files that are not sound.


def reason(data: bytes, **options: Any) -> str:
    with pytest.raises(ImageError) as caught:
        decode_image(data, "p.jpg", **options)
    message = str(caught.value)
    assert message.startswith("p.jpg: ")
    assert "\n" not in message
    return message


def test_not_a_photo() -> None:
    assert "the file is empty" in reason(b"")
    assert "not a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF image" in reason(b"just some text\n")
    assert "b'<!DOCTYP'" in reason(b"<!DOCTYPE html>")


@pytest.mark.parametrize("format", ["PPM", "ICO", "PDF", "EPS", "TGA", "JPEG2000"])
def test_other_formats_are_not_opened(format: str) -> None:
    assert "not a JPEG, PNG, WebP," in reason(encode(Image.new("RGB", (16, 16)), format))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_cut_short(format: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), format)
    message = reason(data[: int(share * len(data))])
    assert "damaged" in message


def test_cut_short_progressive() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), "JPEG", progressive=True)
    assert "damaged" in reason(data[: len(data) // 2])


def test_damaged_chunk() -> None:
    data = bytearray(encode(Image.new("RGB", (9, 9), RED)))
    data[data.index(b"IDAT") + 8] ^= 0xFF
    assert "damaged" in reason(bytes(data))


def test_no_pixels() -> None:
    assert "p.jpg" in reason(png(0, 1, 8, 2, b""))
    assert "p.jpg" in reason(png(1, 0, 8, 2, b""))


@pytest.mark.parametrize("side", [9_460, 13_400, 65_500, 2**31 - 1])
@pytest.mark.parametrize("as_error", [True, False])
def test_bomb_is_refused_by_its_header(
    side: int, as_error: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = png(side, side, 8, 2, b"")

    def load(image: Image.Image) -> None:
        raise AssertionError("pixels are decoded")

    monkeypatch.setattr(PngImageFile, "load", load)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if as_error else "ignore")
        message = reason(data)
    assert "expected at most 89478485 pixels" in message


def test_max_pixels_is_inclusive(photo: bytes) -> None:
    assert decode_image(photo, "x", max_pixels=64 * 48).shape == (48, 64, 3)
    assert "64×48 pixels; expected at most 3071" in reason(photo, max_pixels=64 * 48 - 1)


def test_text_bomb_in_a_png() -> None:
    extra = chunk(b"zTXt", b"key\0\0" + zlib.compress(b"a" * (80 << 20)))
    try:
        assert pixel(png(1, 1, 8, 2, b"\0" + bytes(RED), extra)) == RED
    except ImageError as error:
        assert "damaged" in str(error)  # noqa: PT017


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_damage_gives_a_picture_or_an_image_error(data: st.DataObject) -> None:
    format = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP"]))
    image = Image.fromarray(np.arange(12 * 12 * 3, dtype=np.uint8).reshape(12, 12, 3))
    sound = bytearray(encode(image, format))
    for _ in range(data.draw(st.integers(1, 4))):
        sound[data.draw(st.integers(0, len(sound) - 1))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert decode_image(bytes(sound), "x", max_pixels=1 << 20).shape[2] == 3
        except ImageError as error:
            assert "\n" not in str(error)  # noqa: PT017


def test_threads_and_global_settings(photo: bytes) -> None:
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, warnings.filters[:])
    cut = photo[: len(photo) // 2]
    expected = decode_image(photo, "x")
    barrier = threading.Barrier(8)

    def work(at: int) -> bool:
        barrier.wait()
        for _ in range(20):
            if at % 2:
                with pytest.raises(ImageError):
                    decode_image(cut, "x")
            elif not np.array_equal(decode_image(photo, "x"), expected):
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, warnings.filters)
