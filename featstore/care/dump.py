"""Stored features as one file for other tools: NumPy or Parquet.

    FILE.npy          images: (rows, tokens, width)
                      text: the valid tokens of all rows one after the other,
                      (all tokens, width)
    FILE.offsets.npy  text only, int64 (rows + 1,): row i is
                      `features[offsets[i] : offsets[i + 1]]`
    FILE.keys.csv     row, key, length (tokens), in the order of FILE.npy
    FILE.json         spec, command and versions that made them

    FILE.parquet      key (string), length (int32), features: length × width
                      numbers, token after token, in a list; of fixed size for
                      images. The rest is in the file's metadata.

float16 and float32 are kept. bfloat16, which neither format has, becomes
float32, which holds each of its numbers exactly. int8 becomes float32 too, each
number times its token's scale, as the trainer reads it: other tools have no
common form for levels and scales. Text stays packed, as Arrow
and `numpy.split` have it: to pad it would double the size.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.encoders.spec import extraction_of
from featstore.errors import (
    DataError,
    FeatstoreError,
    MissingFeaturesError,
    StoreError,
    UsageError,
)
from featstore.extract.plan import free_space
from featstore.progress import SILENT, Show
from featstore.project import Project
from featstore.publish import command_line, package_versions, publish
from featstore.quantities import size
from featstore.store.folder import read_quarantine
from featstore.store.store import IntArray, TextStore, VisionStore

GROUP_BYTES = 64 << 20
STORED = "stored"
Groups = Iterator[tuple[list[str], NDArray[np.int64], NDArray[Any]]]


def _positions(
    project: Project, opened: VisionStore | TextStore, kind: str, split: str
) -> tuple[IntArray, list[str], int]:
    """Return the rows to write, their keys, and how many inputs are quarantined."""
    if split == STORED:
        return opened.live(), opened.keys(), 0
    wanted = project.keys(kind, split)
    positions = opened.lookup(wanted)
    absent = [key for key, found in zip(wanted, positions.tolist(), strict=True) if found < 0]
    quarantine = read_quarantine(opened.folder)
    missing = [key for key in absent if key not in quarantine]
    if missing:
        raise MissingFeaturesError(
            f"{opened.folder}: {len(missing)} of {len(wanted)} inputs of split {split!r} have no"
            f" features (first: {missing[0]!r})",
            extraction_of(opened.spec, split=split),
        )
    stored = [key for key, found in zip(wanted, positions.tolist(), strict=True) if found >= 0]
    return positions[positions >= 0], stored, len(absent)


def _groups(
    opened: VisionStore | TextStore,
    positions: IntArray,
    keys: list[str],
    dtype: np.dtype[Any],
    progress: Callable[[int], None],
) -> Groups:
    """Yield keys, tokens of each row, and features (tokens of all, width), checked."""
    if isinstance(opened, TextStore):
        lengths = opened.lengths(positions)
        # Rows are gathered padded: to the longest of all, whatever stands in a group.
        row_numbers = int(lengths.max()) * opened.width
    else:
        tokens, width = opened.row_shape
        lengths, row_numbers = np.full(len(positions), tokens, np.int64), tokens * width
    step = max(1, GROUP_BYTES // (row_numbers * dtype.itemsize))
    for start in range(0, len(positions), step):
        part = slice(start, start + step)
        if isinstance(opened, TextStore):
            hidden, valid = opened.gather(positions[part])
            values = hidden[valid]
        else:
            values = opened.gather(positions[part]).reshape(-1, opened.row_shape[1])
        yield keys[part], lengths[part], values.astype(dtype, copy=False)
        progress(len(keys[part]))


def _write_header(file: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_2_0(file, header)


def _write_npy(
    out: Path, groups: Groups, shape: tuple[int, ...], dtype: np.dtype[Any], about: dict[str, Any]
) -> list[Path]:
    """Write the array in one pass; its own name appears last."""
    packed = len(shape) == 2
    paths = [out, out.with_suffix(".keys.csv"), out.with_suffix(".json")]
    paths += [out.with_suffix(".offsets.npy")] if packed else []
    with ExitStack() as stack:
        temporary = [stack.enter_context(publish(path)) for path in paths]
        lengths: list[int] = []
        temporary[2].write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", "utf-8")
        with temporary[0].open("wb") as array, temporary[1].open("w", encoding="utf-8") as keys:
            _write_header(array, shape, dtype)
            lines = csv.writer(keys, lineterminator="\n")
            lines.writerow(["row", "key", "length"])
            for names, counts, values in groups:
                array.write(np.ascontiguousarray(values).view(np.uint8).data)
                for name, count in zip(names, counts.tolist(), strict=True):
                    lines.writerow([len(lengths), name, count])
                    lengths.append(count)
        if packed:
            with temporary[3].open("wb") as offsets:
                np.save(offsets, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    return paths


def _write_parquet(
    out: Path, groups: Groups, shape: tuple[int, ...], dtype: np.dtype[Any], about: dict[str, Any]
) -> list[Path]:
    """Write a row group for each group of rows."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise FeatstoreError(
            f"{out}: Parquet needs pyarrow; run `python -m pip install pyarrow`, or write .npy"
        ) from error
    numbers = pa.from_numpy_dtype(dtype)
    size = shape[1] * shape[2] if len(shape) == 3 else -1
    schema = pa.schema(
        [("key", pa.string()), ("length", pa.int32()), ("features", pa.list_(numbers, size))],
        metadata={"featstore": json.dumps(about, ensure_ascii=False)},
    )
    with (
        publish(out) as temporary,
        # Numbers of a network neither repeat nor compress.
        pq.ParquetWriter(temporary, schema, compression="none", use_dictionary=False) as writer,
    ):
        for names, counts, values in groups:
            flat = pa.array(values.reshape(-1))
            if size > 0:
                lists = pa.FixedSizeListArray.from_arrays(flat, size)
            else:
                ends = np.concatenate([[0], np.cumsum(counts)]) * shape[1]
                lists = pa.ListArray.from_arrays(pa.array(ends.astype(np.int32)), flat)
            columns = [pa.array(names), pa.array(counts.astype(np.int32)), lists]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema), len(names))
    return [out]


WRITERS = {".npy": _write_npy, ".parquet": _write_parquet}


def dump_features(
    project: Project, kind: str, out: Path, split: str = STORED, show: Show = SILENT
) -> dict[str, Any]:
    """Write the configuration's features of one kind to one file, checked while read.

    Args:
        project: The configuration.
        kind: "vit" or "text".
        out: `.npy` or `.parquet`; what is there is replaced, at the end.
        split: "stored" for every row in the order of the store, or a split of
            the configuration's rows ("all", "train", "val", "test"): each
            distinct photo or sentence once.
        show: How it is shown.

    Returns:
        JSON-able: files, rows, shape, dtype, bytes, quarantined (inputs of the
        split left out).

    Raises:
        UsageError: Another suffix.
        MissingFeaturesError, StaleFeaturesError: Not all was extracted.
        CorruptShardError: A row does not have its checksum; no file appears.
        DataError: There is no row to write.
        StoreError: Too little free space.

    Cost: the memory of a group of rows, about 64 MB and its copies.
    """
    write = WRITERS.get(out.suffix.lower())
    if write is None:
        raise UsageError(f"--out {out}: expected a name that ends in {' or '.join(WRITERS)}")
    opened: VisionStore | TextStore = project.images() if kind == "vit" else project.sentences()
    spec = project.spec(kind)
    positions, keys, quarantined = _positions(project, opened, kind, split)
    if not len(positions):
        raise DataError(f"{opened.folder}: no row to write")
    dtype = np.dtype(np.float32) if spec.dtype == "bfloat16" else opened.dtype
    shape: tuple[int, ...]
    if isinstance(opened, TextStore):
        shape = (int(opened.lengths(positions).sum()), opened.width)
    else:
        shape = (len(positions), *opened.row_shape)
    array_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if array_bytes > free_space(out.absolute().parent):
        raise StoreError(
            f"{out}: needs {size(array_bytes)}, more than is free there; choose another disk"
        )
    about = {
        "fingerprint": spec.fingerprint,
        "spec": spec.to_dict(),
        "split": split,
        "shape": list(shape),
        "dtype": str(dtype),
        "command": command_line(),
        "versions": package_versions(),
    }
    with show.bar(len(positions), "rows") as progress:
        files = write(out, _groups(opened, positions, keys, dtype, progress), shape, dtype, about)
    return {
        "files": [str(path) for path in files],
        "rows": len(positions),
        "shape": list(shape),
        "dtype": str(dtype),
        "bytes": sum(path.stat().st_size for path in files),
        "quarantined": quarantined,
    }
