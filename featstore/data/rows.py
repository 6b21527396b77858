"""Row files of the user, read into the table of `examples.py`.

Formats, told apart by content:

* JSONL, one object a line: `Image_ID`, `Hypothesis`, `Label` (A2), or
  `Flickr30K_ID`, `sentence2`, `gold_label` (SNLI-VE). Other keys are ignored.
* CSV with a header; comma, semicolon or tab.

Either may be packed by gzip. `encoding.py` says how their bytes become text. Parquet files and
saved data sets are read in `table_rows.py`.

Columns are found by name: case, spaces, underscores and hyphens do not count, and
`ROLES` lists the names known. What a label may be stands in `labels.py`: a file that has
other integers than 0 and 1 beside these is an error.

A row that cannot be used is dropped and reported; a file that cannot be read is a `RowError`.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple, TextIO

from featstore.data.collect import Raw, collect
from featstore.data.encoding import encoding_of, unpacked
from featstore.data.examples import ReadResult
from featstore.data.labels import named_class
from featstore.errors import RowError, short

if TYPE_CHECKING:
    import pandas as pd

ROLES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "image id": (("imageid", "flickr30kid"), ("image", "filename")),
    "hypothesis": (("hypothesis", "sentence2"), ("sentence", "caption", "text")),
    "label": (("label", "goldlabel"), ("answer",)),
}
"""Names of each column: those of the known formats, then synonyms used in their absence."""

MAX_LINE_CHARACTERS = 1 << 20
STREAM = Path("stdin")
"""What the rows of an open file are called in messages."""

_EXPECTED = (
    "Image_ID, Hypothesis, Label (A2), or Flickr30K_ID, sentence2, gold_label (SNLI-VE), or a CSV"
    " with image_id/image/filename, hypothesis/sentence/caption/text, label/gold_label/answer"
)
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


class Columns(NamedTuple):
    """The name (or, in a CSV, the position) of each column; None where it is absent."""

    image_id: Any
    text: Any
    label: Any


def read_examples(
    path: str | os.PathLike[str] | IO[bytes],
    *,
    labelled: bool = True,
    duplicates: Literal["drop", "keep"] | str = "drop",
    encoding: str = "",
    classes: int = 2,
    label_names: Sequence[str] = (),
) -> ReadResult:
    """Read a row file; see the module for formats, columns and labels.

    Image ids and hypotheses are kept as written, without surrounding white space; a
    whole number of JSON becomes its decimal text. Dropped, each with its reason: of two
    classes neutral rows, unknown labels, empty or undecodable text, missing or unsafe image
    ids, CSV records with too many or too few cells and, by choice, repeats of an earlier row
    (same image id, hypothesis and label). Rows that say several labels of one hypothesis
    about one image are kept and reported.

    Args:
        path: The file; or one that is open for reading bytes, such as `sys.stdin.buffer`.
        labelled: False reads rows to predict: no label is needed. One that is there is read
            where it says one of the classes; any other is reported and comes back
            as `UNLABELLED`, and so does every integer of a file that has class ids. Of
            several label columns none is read.
        duplicates: "drop" or "keep" exact repeats.
        encoding: Of the file's text; "": UTF-8, or told from the bytes, in which case each
            row with a character beyond ASCII is reported as "read as …".
        classes: 2 leaves neutral rows out, 3 keeps them.
        label_names: What labels that are whole numbers mean, from 0 on; none: 1 and 0 mean
            entailment and contradiction.

    Returns:
        The rows in the order of the file, and the issues in the order of their lines.

    Raises:
        RowError: The file cannot be read, is not a known format, has no usable row, a line
            of it is broken, its encoding is in doubt, or its integer labels are class ids.
            An `UnusableRowsError` names each row.
        ConfigError: There is no such encoding.
        ValueError: `duplicates` is neither "drop" nor "keep".

    Cost: about 10 µs a row; memory for the rows and for one line of text.
    """
    if duplicates not in ("drop", "keep"):
        raise ValueError(f'duplicates must be "drop" or "keep", not {duplicates!r}')
    unique = duplicates == "drop"
    if not isinstance(path, str | os.PathLike):
        with tempfile.TemporaryFile() as kept:
            # A pipe is read once, and rows are looked at twice: for their format and encoding.
            shutil.copyfileobj(path, kept)
            kept.seek(0)
            return _read(STREAM, kept, labelled, unique, encoding, classes, label_names)
    path = Path(path)
    if not path.exists():
        raise RowError(f"{path}: no such file; name a JSONL or CSV file of rows")
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "not a regular file"
        raise RowError(f"{path}: is {kind}; name a JSONL or CSV file of rows")
    try:
        with path.open("rb") as file:
            return _read(path, file, labelled, unique, encoding, classes, label_names)
    except OSError as error:
        raise RowError(f"{path}: cannot be read ({error.strerror})") from error


def _read(
    path: Path,
    packed: IO[bytes],
    labelled: bool,
    unique: bool,
    encoding: str,
    classes: int,
    label_names: Sequence[str],
) -> ReadResult:
    """Read a seekable file from its start."""
    with unpacked(path, packed) as file:
        name, detected = encoding_of(path, file, encoding)
        is_json = _is_json(path, file, name)
        file.seek(0)
        # In JSONL only \n ends a line; in CSV \r does too.
        with io.TextIOWrapper(file, encoding=name, newline="\n" if is_json else "") as text:
            records = (_jsonl if is_json else _csv)(path, text, labelled)
            if label_names:
                records = _named(records, label_names)
            return collect(path, records, labelled, unique, name if detected else "", classes)


def _named(records: Iterable[Raw], names: Sequence[str]) -> Iterator[Raw]:
    """Yield records whose class ids are the names that they mean."""
    return (record._replace(label=named_class(record.label, names)) for record in records)


def read_frame(
    frame: pd.DataFrame, classes: int = 2, label_names: Sequence[str] = ()
) -> ReadResult:
    """Read rows to predict from a table whose columns are named as those of a file.

    Args:
        frame: Columns as in the module; labels are read as `labelled=False` reads those of
            a file. A missing value (NaN, None) is an empty cell.
        classes, label_names: As of `read_examples`.

    Returns:
        As `read_examples`; a row's line is its place in the table, from 1.

    Raises:
        RowError: A column is missing, or no row can be used.
    """
    path, names = Path("table"), [str(name) for name in frame.columns]
    at, problem = resolve(names, labelled=False)
    if problem:
        raise column_error(path, 0, problem, names)

    def values(column: int | None) -> list[Any]:
        if column is None:
            return [None] * len(frame)
        cells = frame.iloc[:, column].astype(object)
        return cells.where(cells.notna(), None).tolist()

    rows = zip(*map(values, at), strict=True)
    records: Iterable[Raw] = (Raw(line, *row) for line, row in enumerate(rows, 1))
    if label_names:
        records = _named(records, label_names)
    return collect(path, records, labelled=False, unique=False, classes=classes)


def _is_json(path: Path, file: IO[bytes], encoding: str) -> bool:
    """Tell JSONL from CSV by the first character; its suffix speaks for a broken JSONL."""
    head = codecs.getincrementaldecoder(encoding)().decode(file.read(1 << 16)).lstrip()
    if head.startswith("["):
        raise RowError(
            f"{path}: starts like a JSON array; expected JSONL, one object on each line,"
            " without brackets or commas between them"
        )
    if not head:
        if file.read(1):
            raise RowError(f"{path}: starts with more than 64 KiB of white space")
        raise RowError(f"{path}: has no rows: the file is empty; expected JSONL or CSV rows")
    name = path.name.lower().removesuffix(".gz")
    return head.startswith("{") or name.endswith(_JSON_SUFFIXES)


def _too_long(path: Path, line: int) -> RowError:
    return RowError(
        f"{path}:{line}: line of more than {MAX_LINE_CHARACTERS} characters;"
        " expected one row on each line"
    )


def columns_named(names: Sequence[str], tiers: Iterable[Sequence[str]]) -> list[int]:
    """Return which names are of the first tier that has any; see `ROLES`."""
    plain = [re.sub(r"[\s_-]+", "", name).lower() for name in names]
    found = ([i for i, name in enumerate(plain) if name in tier] for tier in tiers)
    return next((at for at in found if at), [])


def resolve(names: Sequence[str], labelled: bool) -> tuple[Columns, str]:
    """Find the columns of a header; the second value says what is wrong, or is empty."""
    found: list[int | None] = []
    problems: list[str] = []
    for role, tiers in ROLES.items():
        at = columns_named(names, tiers)
        if role == "label" and not labelled and len(at) != 1:
            at = []
        elif not at:
            problems.append(f"no {role} column")
        elif len(at) > 1:
            several = " and ".join(short(names[i]) for i in at)
            problems.append(f"more than one {role} column, {several}: rename or remove one")
        found.append(at[0] if at else None)
    return Columns(*found), "; ".join(problems)


def column_error(path: Path, line: int, problem: str, names: Sequence[str]) -> RowError:
    """Return what to raise where `resolve` finds something wrong."""
    columns = short(", ".join(names), 300)
    return RowError(
        f"{path}:{line}: {problem}; columns found: {columns}; columns expected: {_EXPECTED}"
    )


def _jsonl(path: Path, file: TextIO, labelled: bool) -> Iterator[Raw]:
    """Yield the records of a JSONL file.

    The first record must have all columns; a later one that lacks some yields None for
    them, and is dropped with that reason.
    """
    columns: dict[tuple[str, ...], Columns] = {}
    for line, text in enumerate(_lines(path, file), 1):
        if not text.strip():
            continue
        record = _json_object(path, line, text)
        keys = tuple(record)
        if keys not in columns:
            at, problem = resolve(keys, labelled)
            if problem and (not columns or "more than one" in problem):
                raise column_error(path, line, problem, keys)
            columns[keys] = Columns(*(None if i is None else keys[i] for i in at))
        image_key, text_key, label_key = columns[keys]
        yield Raw(
            line,
            record[image_key] if image_key is not None else None,
            record[text_key] if text_key is not None else None,
            record[label_key] if label_key is not None else None,
        )


def _json_object(path: Path, line: int, text: str) -> dict[str, Any]:
    try:
        record = json.loads(text.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        raise RowError(
            f"{path}:{line}: not JSON: {error.msg.removesuffix(' at')} at column"
            f" {error.colno}; expected one object on each line"
        ) from error
    except (ValueError, RecursionError) as error:
        raise RowError(
            f"{path}:{line}: not a row: a number of too many digits, or nested too deep"
        ) from error
    if not isinstance(record, dict):
        raise RowError(
            f"{path}:{line}: expected an object such as"
            f' {{"Image_ID": …, "Hypothesis": …, "Label": …}}, found {short(record)}'
        )
    return record


def _lines(path: Path, file: TextIO) -> Iterator[str]:
    line = 0
    while text := file.readline(MAX_LINE_CHARACTERS + 1):
        line += 1
        if len(text) > MAX_LINE_CHARACTERS:
            raise _too_long(path, line)
        if "\0" in text:
            raise RowError(
                f"{path}:{line}: NUL byte; the file is binary, damaged, or UTF-16"
                " without a byte-order mark; save it as UTF-8"
            )
        yield text


def _csv(path: Path, file: TextIO, labelled: bool) -> Iterator[Raw]:
    """Yield the records of a CSV file, each with the line where it starts."""
    lines = _lines(path, file)
    before = 0
    header = ""
    for header in lines:
        before += 1
        if header.strip():
            break
    delimiter, names, at = _header(path, before, header, labelled)
    width = len(names)
    reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=True)
    while True:
        line = before + reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise RowError(
                f"{path}:{line}: the record that starts here is not CSV: {error};"
                ' a quote inside a quoted cell is written twice (""), and each quote is closed'
            ) from error
        # Spreadsheets pad with empty cells and leave empty records at the end.
        while len(cells) > width and not cells[-1].strip():
            cells.pop()
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != width:
            problem = f"{len(cells)} cells, the header has {width}"
            yield Raw(line, None, delimiter.join(cells), None, problem)
            continue
        label = None if at.label is None else cells[at.label]
        yield Raw(line, cells[at.image_id], cells[at.text], label)


def _header(path: Path, line: int, header: str, labelled: bool) -> tuple[str, list[str], Columns]:
    """Return the delimiter under which the header has the columns, its names, and where."""
    readings: list[tuple[int, str, list[str]]] = []
    for delimiter in ",;\t":
        try:
            row = csv.reader([header], delimiter=delimiter, strict=True, skipinitialspace=True)
            names = [name.strip() for name in next(row)]
        except csv.Error:
            continue
        at, problem = resolve(names, labelled)
        if not problem:
            return delimiter, names, at
        readings.append((len(names), problem, names))
    if not readings:
        raise RowError(f"{path}:{line}: the header is not CSV; found {short(header)}")
    _, problem, names = max(readings, key=lambda reading: reading[0])
    raise column_error(path, line, problem, names)
