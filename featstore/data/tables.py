"""Parquet files and the Arrow streams of `datasets.save_to_disk`: their rows, and photos in them.

Both are read some rows at a time, so memory does not grow with a file: it holds `BLOCK_ROWS`
rows and, of Parquet, one page, to which pyarrow writes up to 1,024 rows of a row group. A photo
that is in one stays there: `PackedPhoto` says where.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featstore.errors import Advice, ImageError, RowError

BLOCK_ROWS = 32
BLOCKS_HELD = 4
READERS_HELD = 2
_BUFFER_BYTES = 1 << 20
_MAGIC = b"PAR1"
_ARROW = ".arrow"


@dataclass(frozen=True)
class PackedPhoto:
    """A photo in a Parquet or Arrow file.

    Attributes:
        file: The file.
        column: Of the photos' bytes, such as `image.bytes`.
        group: Row group of a Parquet file, from 0; 0 in an Arrow file.
        row: Place in the group, from 0.
        number: Row of the file, from 1.
    """

    file: str
    column: str
    group: int
    row: int
    number: int

    def __str__(self) -> str:
        return f"{self.file}:{self.number}"

    @property
    def name(self) -> str:
        """What to call the photo in an error."""
        return f"{os.path.basename(self.file)}:{self.number}"

    def is_file(self) -> bool:
        """Tell whether the file is there."""
        return os.path.isfile(self.file)

    def read(self) -> bytes:
        """Return the photo's bytes.

        Raises:
            ImageError: The file cannot be read, or has no bytes in that row.

        Cost: photos that are read in the order of the file are read once, by blocks of
        `BLOCK_ROWS`; one that stands before the last block, from the start of its group.
        """
        try:
            state = os.stat(self.file)
            # A file that was replaced has another reader.
            reader = _reader(self.file, self.column, state.st_mtime_ns, state.st_ino)
            data = reader.value(self.group, self.row)
        except RowError as error:
            raise ImageError(error.message, error.mend) from error
        except OSError as error:
            raise ImageError(f"{self}: cannot be read ({error.strerror})") from error
        if data is None:
            raise ImageError(f"{self}: no image bytes in {self.column}")
        return data


@dataclass(frozen=True)
class Block:
    """Some rows of a file, one after another.

    Attributes:
        group: Row group of the first row; a block is in one.
        row: Place of the first row in its group.
        number: Row of the file, from 1, of the first one.
        columns: Column to Arrow array.
    """

    group: int
    row: int
    number: int
    columns: dict[str, Any]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


def is_table(path: Path) -> bool:
    """Tell a Parquet or Arrow file from one of text."""
    if path.suffix.lower() in (_ARROW, ".parquet"):
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


class TableFile:
    """A Parquet or Arrow file, opened.

    Args:
        path: The file.

    Raises:
        RowError: It is damaged, or pyarrow is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._is_arrow = path.suffix.lower() == _ARROW
        with self._reading():
            self._opened: Any = self._open()
            self.schema: Any = self._opened.schema if self._is_arrow else self._opened.schema_arrow

    def _open(self) -> Any:
        pa = pyarrow(self.path)
        if self._is_arrow:
            # Mapped: the stream's columns are views of the file.
            return pa.ipc.open_stream(pa.memory_map(os.fspath(self.path)))
        import pyarrow.parquet as pq

        return pq.ParquetFile(self.path, buffer_size=_BUFFER_BYTES, pre_buffer=False)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        pa = pyarrow(self.path)
        try:
            yield
        except FileNotFoundError as error:
            raise RowError(f"{self.path}: no such file") from error
        # What Thrift and the decoders find in damaged bytes is raised as OSError too.
        except (pa.ArrowException, OSError, ValueError) as error:
            kind = "an Arrow stream" if self._is_arrow else "Parquet"
            reason = " ".join(str(error).split())[:200].rstrip(".")
            raise RowError(
                f"{self.path}: damaged or cut short, or not {kind}: {reason}; copy or write the"
                " file anew"
            ) from error

    def blocks(
        self, columns: Sequence[str], rows: int = BLOCK_ROWS, group: int | None = None
    ) -> Generator[Block, None, None]:
        """Yield the rows of some columns.

        Args:
            columns: Of the top, or of a struct (`image.bytes`).
            rows: Of a block, at most.
            group: Only this one.

        Raises:
            RowError: The file is damaged.
        """
        number = 1
        groups = range(1 if self._is_arrow else self._opened.num_row_groups)
        for at in groups if group is None else (group,):
            row = 0
            batches = iter(self._batches(columns, rows, at))
            while True:
                with self._reading():
                    batch = next(batches, None)
                    if batch is None:
                        break
                    # Else damaged offsets would be followed wherever they lead.
                    batch.validate(full=True)
                    block = Block(at, row, number, {c: _column(batch, c) for c in columns})
                row += len(block)
                number += len(block)
                yield block

    def _batches(self, columns: Sequence[str], rows: int, group: int) -> Iterator[Any]:
        if not self._is_arrow:
            yield from self._opened.iter_batches(
                batch_size=rows, row_groups=[group], columns=list(columns), use_threads=False
            )
            return
        for batch in self._open():
            yield from (batch.slice(start, rows) for start in range(0, len(batch), rows))


def pyarrow(path: Path) -> Any:
    """Return the package.

    Raises:
        RowError: It is not installed.
    """
    try:
        import pyarrow as pa
    except ImportError as error:
        raise RowError(
            f"{path}: Parquet and Arrow files need pyarrow, which is not installed",
            Advice("run `python -m pip install 'featstore[parquet]'`"),
        ) from error
    return pa


def _column(batch: Any, name: str) -> Any:
    """Return a column of a batch; `image.bytes` is a field of a struct."""
    if (at := batch.schema.get_field_index(name)) >= 0:
        return batch.column(at)
    struct, _, field = name.rpartition(".")
    import pyarrow.compute as pc

    return pc.struct_field(_column(batch, struct), field)


class _Reader:
    """One column of a file, a row at a time, for threads that go through it together."""

    def __init__(self, file: str, column: str) -> None:
        self.table, self.column = TableFile(Path(file)), column
        self._lock = threading.Lock()
        self._held: deque[Block] = deque(maxlen=BLOCKS_HELD)
        self._blocks: Generator[Block, None, None] | None = None
        self._group, self._next = -1, 0

    def value(self, group: int, row: int) -> bytes | None:
        """Return the bytes in a row; None where there are none."""
        with self._lock:
            for block in self._held:
                if block.group == group and 0 <= row - block.row < len(block):
                    return _bytes(block.columns[self.column], row - block.row)
            if self._blocks is None or group != self._group or row < self._next:
                self._blocks = self.table.blocks([self.column], group=group)
                self._group, self._next = group, 0
            try:
                for block in self._blocks:
                    self._held.append(block)
                    self._next = block.row + len(block)
                    if row < self._next:
                        return _bytes(block.columns[self.column], row - block.row)
            except RowError:
                self._blocks = None
                raise
            self._blocks = None
            return None


@functools.lru_cache(maxsize=READERS_HELD)
def _reader(file: str, column: str, modified_ns: int, inode: int) -> _Reader:
    return _Reader(file, column)


def _bytes(column: Any, row: int) -> bytes | None:
    found: bytes | None = column[row].as_py()
    return found
