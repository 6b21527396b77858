"""The bytes of the user's tables as text: packed files, and files that are not UTF-8.

UTF-8 comes first, then what a byte-order mark says. Any other encoding is named by the user,
or told from the bytes where they leave no doubt; where they do, the file is refused with the
readings that are possible. No statistics tell single-byte encodings of Latin script apart
(`õ` of cp1252 is `ő` of cp1250), so of these cp1252 alone is taken unasked: where few lines
have such characters, as in English text, and all of them read as western text.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import gzip
import re
import unicodedata
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from featstore.errors import Advice, ConfigError, RowError, short
from featstore.settings import suggest

CANDIDATES = (
    "cp1252", "gb18030", "big5", "cp932", "euc_jp", "cp949", "cp1250", "cp1251", "koi8_r", "cp1253",
    "cp1254", "cp1255", "cp1256", "cp1257", "iso8859_2", "cp850", "cp852", "cp866", "mac_roman",
    "cp874",
)  # fmt: skip
"""Encodings that tables are met in, the more frequent first."""

_NAMES = (*CANDIDATES, "utf-8", "utf-16", "latin-1", "gbk", "shift_jis", "euc_kr", "iso8859_15")

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_GZIP = b"\x1f\x8b"
_PACKED = (
    (b"PK\x03\x04", "a ZIP archive or an Excel workbook; unpack it, or save the table as CSV"),
    (b"BZh", "packed by bzip2; unpack it, or pack it with gzip"),
    (b"\xfd7zXZ\0", "packed by xz; unpack it, or pack it with gzip"),
    (b"\x28\xb5\x2f\xfd", "packed by zstd; unpack it, or pack it with gzip"),
    (b"PAR1", "a Parquet file; save it as CSV or JSONL"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook; save the table as CSV"),
)
_BLOCK = 1 << 20
_SAMPLE_LINES, _SAMPLE_BYTES = 1000, 200_000
_MARGIN = 0.05
"""Readings of a measured disorder this close (0 to 1) are told apart by nobody."""
_SHOWN = 4

_LETTER = "A-Za-zÀ-ÖØ-öø-ÿŒœŠšŽžŸ"
# ð, þ, ý are left out: there the Turkish cp1254 has ğ, ş, ı.
_WESTERN = re.compile(
    r"[\x00-\x7f\xa0À-ÏÑ-ÖØ-Üß-ïñ-öø-üÿŒœŠšŽžŸ“”‘’„‚«»‹›–—…•€£¥§°²³½¼¾ºª¿¡®©™·×]*"
)
_NOT_WESTERN = re.compile(
    # Symbols amid a word, an opening mark at its end, a capital after small letters.
    rf"[{_LETTER}][“”„‚«»‹›–…•€£¥§°²³½¼¾ºª¿¡®©™×][{_LETTER}]"
    rf"|[{_LETTER}][“„‚«‹¿¡]|[{_LETTER}]‘(?![{_LETTER}])|[¿¡](?![{_LETTER}\s“‘\"'¿¡])"
    rf"|[a-zß-öø-ÿœšž][À-ÖØ-ÞŒŠŽŸ]|[A-Z][À-ÖØ-ÞŒŠŽŸ][a-z]"
    # A letter alone that is no word of any of these languages.
    rf"|(?<![{_LETTER}])[ÂÃÄÆÇÊËÌÎÏÑÒÕØÙÚÛÜßâãäçêëìîïñõùúûüÿŒœŠšŽžŸ](?![{_LETTER}])"
)
_IMPLAUSIBLE = re.compile("[lL]o|o[lL]|[lL]sl|lcl")
_ALPHABETS = frozenset({"CYRILLIC", "GREEK", "ARABIC", "HEBREW", "THAI"})
_SYMBOLS = "‚„ˆ˜†‡‰¨¸´¬"
_WORD = re.compile(rf"[{_LETTER}]{{4,}}")


class Encoding(NamedTuple):
    """How a file is read.

    Attributes:
        name: Python's name of the encoding.
        detected: Nobody named it, and it is not UTF-8 or told by a byte-order mark.
    """

    name: str
    detected: bool


@contextlib.contextmanager
def unpacked(path: Path, file: IO[bytes]) -> Iterator[IO[bytes]]:
    """Give a seekable file's bytes, those of a gzip file unpacked.

    Raises:
        RowError: The file is packed in another way, no table of text, or damaged.
    """
    head = file.read(8)
    file.seek(0)
    for magic, what in _PACKED:
        if head.startswith(magic):
            raise RowError(f"{path}: is {what}")
    if not head.startswith(_GZIP):
        yield file
        return
    try:
        with gzip.GzipFile(fileobj=file) as opened:
            yield opened  # type: ignore[misc]
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise RowError(f"{path}: gzip file that is damaged or cut short ({error})") from error


def encoding_of(path: Path, file: IO[bytes], given: str = "") -> Encoding:
    """Find how a file is to be read, from all of its bytes.

    Args:
        path: What to call it.
        file: The file at its start, where it is left.
        given: The encoding that the user names; "": none.

    Raises:
        ConfigError: There is no encoding `given`.
        RowError: The file is not of it, or its encoding is in doubt.

    Cost: one pass, in blocks of 1 MiB; two where it is not UTF-8.
    """
    head = file.read(4)
    file.seek(0)
    mark = next((name for mark, name in _MARKS if head.startswith(mark)), "")
    name = _known(given) if given else mark or "utf-8"
    if name == "utf-8" and mark == "utf-8-sig":
        name = mark
    if _reads(file, name):
        return Encoding(name, detected=False)
    where = f"{path}{_first_failure(file, name)} is not"
    if given or mark:
        source = f"[data] encoding says {given}" if given else "its first bytes say so"
        raise RowError(
            f"{where} {name}, and {source}",
            Advice("save the file as UTF-8, or name its encoding ([data] encoding, --encoding)"),
        )
    found = _detect(file, where)
    return Encoding(found, detected=True)


def _known(given: str) -> str:
    """Return Python's name of a text encoding."""
    try:
        info = codecs.lookup(given)
        " ".encode(given)  # refuses what turns bytes into bytes, such as hex
    except (LookupError, ValueError) as error:
        raise ConfigError(
            f"[data] encoding: no text encoding {given!r}{suggest(given.lower(), _NAMES)};"
            " expected a name such as utf-8, cp1252, gbk, shift_jis"
        ) from error
    return info.name


def _reads(file: IO[bytes], encoding: str) -> bool:
    """Tell whether a whole file is of an encoding; leave it at its start."""
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        while block := file.read(_BLOCK):
            decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeError:
        return False
    finally:
        file.seek(0)
    return True


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """Yield the lines of a file from its start, those without end in parts; leave it there."""
    while line := file.readline(_BLOCK):
        yield line
    file.seek(0)


def _first_failure(file: IO[bytes], encoding: str) -> str:
    """Return line and byte of it, from 1, where a file is not of an encoding, for a message.

    Nothing for UTF-16 and UTF-32, whose lines do not end where their bytes have a line feed.
    """
    if encoding.replace("_", "-").startswith(("utf-16", "utf-32")):
        return ":"
    for number, raw in enumerate(_lines(file), 1):
        try:
            raw.decode(encoding)
        except UnicodeDecodeError as error:
            file.seek(0)
            return f":{number}: byte {error.start + 1} of the line"
    return ":"


def _detect(file: IO[bytes], where: str) -> str:
    """Return the encoding of a file that is not UTF-8.

    Args:
        file: The file at its start.
        where: Start of the message: which byte is not UTF-8.

    Raises:
        RowError: It is in doubt.
    """
    total = unicode_lines = other_lines = size = 0
    sample: list[tuple[int, bytes]] = []
    for number, line in enumerate(_lines(file), 1):
        total += 1
        if line.isascii():
            continue
        with contextlib.suppress(UnicodeDecodeError):
            line.decode()
            unicode_lines += 1
            continue
        other_lines += 1
        if len(sample) < _SAMPLE_LINES and size < _SAMPLE_BYTES:
            sample.append((number, line))
            size += len(line)
    if unicode_lines > other_lines:
        raise RowError(
            f"{where} UTF-8, though {unicode_lines} other lines are and have letters beyond ASCII:"
            " the line is damaged, or comes from another file; correct it"
        )
    data = b"".join(line for _, line in sample)
    readings = {
        name: text
        for name in CANDIDATES
        if (text := _decoded(data, name)) is not None and _reads(file, name)
    }
    if not readings:
        raise RowError(f"{where} UTF-8, nor is the file text of another known encoding")
    western = _is_western(readings.get("cp1252", "Ð"))
    if western and other_lines * 3 <= total:
        return "cp1252"
    likely = _likely(data, list(readings))
    if not western:
        likely.sort(key="cp1252".__eq__)
    if likely and len({readings[name] for name in likely}) == 1:
        return likely[0]
    # One name of each reading, and a line that shows how they differ.
    names = list({readings[name]: name for name in [*readings, *likely][::-1]}.values())
    order = [*likely, *readings]
    names = sorted(names, key=order.index)[:_SHOWN]
    number, line = max(
        sample[:_SAMPLE_LINES], key=lambda pair: len({_excerpt(pair[1], name) for name in names})
    )
    options = ", or ".join(f"{short(_excerpt(line, name))} as {name}" for name in names)
    raise RowError(
        f"{where} UTF-8, and its encoding is in doubt: line {number} reads {options}",
        Advice(
            "set [data] encoding (or --encoding) to the one that reads right, such as"
            f' "{names[0]}", or save the file as UTF-8'
        ),
    )


def _decoded(data: bytes, encoding: str) -> str | None:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        return None


def _likely(sample: bytes, encodings: list[str]) -> list[str]:
    """Return the encodings that a sample may well be of, in their order."""
    from charset_normalizer import from_bytes

    disorder = {
        match.encoding: match.chaos
        for match in from_bytes(sample, cp_isolation=encodings)
        if _is_plausible(str(match)[:20_000])
    }
    least = min(disorder.values(), default=0.0)
    return [name for name in encodings if disorder.get(name, 1.0) <= least + _MARGIN]


def _is_western(text: str) -> bool:
    """Tell whether the characters beyond ASCII are such, and stand such, as in western text."""
    return (
        _WESTERN.fullmatch(text) is not None
        and _NOT_WESTERN.search(text) is None
        and all(sum(map(str.isascii, word)) * 2 >= len(word) for word in _WORD.findall(text))
    )


def _is_plausible(text: str) -> bool:
    """Tell whether no word has a symbol inside, or letters of scripts that do not meet in one."""
    return _IMPLAUSIBLE.search("".join(map(_class_of, text))) is None


@functools.lru_cache(maxsize=4096)
def _class_of(character: str) -> str:
    """Return l for a small Latin letter, L for a large one, o of another alphabet, c of a script
    without an alphabet, s for a symbol beyond ASCII, and a space for what is left.
    """
    if character.isalpha():
        script = unicodedata.name(character, "").partition(" ")[0]
        if script == "LATIN":
            return "l" if character.islower() else "L"
        return "o" if script in _ALPHABETS else "c"
    beyond = not character.isascii()
    return (
        "s"
        if beyond and (character in _SYMBOLS or unicodedata.category(character)[0] == "S")
        else " "
    )


def _excerpt(line: bytes, encoding: str) -> str:
    """Return the part of a line around its first character beyond ASCII."""
    text = line.decode(encoding, errors="replace").strip()
    at = next((i for i, character in enumerate(text) if not character.isascii()), 0)
    start = max(0, at - 20)
    return text[start : start + 45]
