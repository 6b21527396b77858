"""Predictions as CSV, JSONL or Parquet: to a file that appears whole or not at all, or a stream."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

from featstore.errors import Advice, FeatstoreError, UsageError
from featstore.publish import publish
from trainer.results.predict import AnyLine, Line, numbers_of

SUFFIXES = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
GROUP_ROWS = 8192

Write = Callable[[Iterable[AnyLine]], None]
Names = tuple[str, ...]


def format_of(out: Path | None, format_name: str | None) -> str:
    """Return the format to write: the one that is asked for, else that of the file's suffix.

    Raises:
        UsageError: The suffix says none.
    """
    if format_name is not None:
        return format_name
    if out is None:
        return "csv"
    if out.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"--out {out}: expected a name that ends in {', '.join(SUFFIXES)};"
            f" or say --format {'|'.join(WRITERS)}"
        )
    return SUFFIXES[out.suffix.lower()]


@contextlib.contextmanager
def opened_for(
    out: Path | IO[bytes], format_name: str, names: Names = Line._fields
) -> Iterator[Write]:
    """Yield what writes the lines; a file gets its name at the end.

    What would keep it from being written is found before the lines are made.

    Args:
        out: A file, or a stream that is open for writing bytes.
        format_name: "csv" (UTF-8, a header, an empty cell for what is missing), "jsonl" (null
            for it) or "parquet". Numbers read back exactly from each.
        names: The columns: the fields of the lines, see `line_type`.

    Raises:
        FeatstoreError: It cannot be written, or pyarrow is missing.
    """
    write = WRITERS[format_name]
    if format_name == "parquet":
        _pyarrow()
    if not isinstance(out, Path):
        yield lambda lines: write(names, lines, out)
        out.flush()
    elif out.exists() and not out.is_file() and not out.is_dir():
        # A device or a pipe: a file in its place would be another thing.
        with out.open("wb") as sink:
            yield lambda lines: write(names, lines, sink)
    else:
        with publish(out) as temporary, temporary.open("wb") as sink:
            yield lambda lines: write(names, lines, sink)


def _groups(lines: Iterable[AnyLine]) -> Iterator[list[AnyLine]]:
    rest = iter(lines)
    while group := list(islice(rest, GROUP_ROWS)):
        yield group


def _write_csv(names: Names, lines: Iterable[AnyLine], sink: IO[bytes]) -> None:
    header: list[Any] = [names]
    for group in _groups(lines):
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows([*header, *group])
        sink.write(text.getvalue().encode())
        header = []


def _write_jsonl(names: Names, lines: Iterable[AnyLine], sink: IO[bytes]) -> None:
    for group in _groups(lines):
        records = (json.dumps(line._asdict(), ensure_ascii=False) for line in group)
        sink.write("".join(f"{record}\n" for record in records).encode())


def _write_parquet(names: Names, lines: Iterable[AnyLine], sink: IO[bytes]) -> None:
    pa = _pyarrow()
    import pyarrow.parquet as pq

    numbers = numbers_of(names)
    kinds = {name: pa.float64() if name in numbers else pa.string() for name in names}
    schema = pa.schema(list(kinds.items()))
    with pq.ParquetWriter(sink, schema) as writer:
        for group in _groups(lines):
            columns = map(list, zip(*group, strict=True))
            writer.write_table(pa.Table.from_pydict(dict(zip(kinds, columns, strict=True)), schema))


WRITERS: dict[str, Callable[[Names, Iterable[AnyLine], IO[bytes]], None]] = {
    "csv": _write_csv,
    "jsonl": _write_jsonl,
    "parquet": _write_parquet,
}


def _pyarrow() -> Any:
    try:
        import pyarrow as pa
    except ImportError as error:
        raise FeatstoreError(
            "Parquet needs pyarrow, which is not installed",
            Advice("run `python -m pip install 'featstore[parquet]'`, or choose csv or jsonl"),
        ) from error
    return pa
