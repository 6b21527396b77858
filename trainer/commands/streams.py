"""What is printed, on streams that cannot show every character."""

from __future__ import annotations

import codecs
import io
import sys

# What a reader would type instead; the rest is written as an escape, such as `\u4e2d`.
PLAIN = str.maketrans(
    {
        "τ": "tau",
        "×": "x",
        "–": "-",
        "—": "-",
        "−": "-",
        "…": "...",
        "→": "->",
        "·": "*",
        "±": "+/-",
        "≤": "<=",
        "≥": ">=",
        "‘": "'",
        "’": "'",
        "“": '"',
        "”": '"',
        "•": "*",
        **dict.fromkeys("─━═╌╍┄┅┈┉╴╶╸╺", "-"),
        **dict.fromkeys("│┃║╎╏┆┇", "|"),
        **dict.fromkeys("▏▎▍▌▋▊▉█", "#"),
        **{chr(code): "+" for code in range(0x250C, 0x254C)},
        **{chr(code): "+" for code in range(0x2552, 0x256D)},
    }
)
_HANDLER, _ASCII = "featstore-plain", "featstore-ascii"


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Write the characters that a stream lacks with those that every stream has."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end].translate(PLAIN)
    return lacking.encode("ascii", "backslashreplace").decode("ascii"), error.end


def _find_ascii(name: str) -> codecs.CodecInfo | None:
    if name.replace("_", "-") != _ASCII:
        return None
    ascii_codec = codecs.lookup("ascii")
    return codecs.CodecInfo(
        ascii_codec.encode,
        ascii_codec.decode,
        incrementalencoder=ascii_codec.incrementalencoder,
        incrementaldecoder=ascii_codec.incrementaldecoder,
        name=_ASCII,
    )


def show_plainly() -> None:
    """Have stdout and stderr replace what their encoding lacks: `τ` by `tau`, `×` by `x`.

    A stream of UTF-8 shows everything as before. click takes a stream of ASCII
    for one that was set up wrongly, and writes UTF-8 to it; under another name
    it stays ASCII.
    """
    codecs.register_error(_HANDLER, _plain)
    codecs.register(_find_ascii)
    for stream in (sys.stdout, sys.stderr):
        # Replaced by the caller, or closed: not ours to set.
        if not isinstance(stream, io.TextIOWrapper) or stream.closed:
            continue
        name = codecs.lookup(stream.encoding).name
        stream.reconfigure(encoding=_ASCII if name == "ascii" else name, errors=_HANDLER)
