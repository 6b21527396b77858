"""A configuration's rows, photos and splits, checked against each other."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from featstore import demo
from featstore.config import SPLITS, DataConfig
from featstore.data.collect import joined
from featstore.data.examples import (
    NO_PHOTO,
    READ_AS,
    Examples,
    ReadResult,
    RowIssue,
    UnusableRowsError,
    drop_missing,
    drop_repeats,
    summarise,
    write_report,
)
from featstore.data.images import ImageIndex, index_images
from featstore.data.photo_ids import Nearest, one_spelling, tried
from featstore.data.rows import read_examples, read_frame
from featstore.data.splits import (
    Splits,
    by_split,
    make_splits,
    read_split_file,
    save_splits,
    splits_from_parts,
)
from featstore.data.table_rows import (
    TableRows,
    files_of,
    packed_images,
    saved_splits,
)
from featstore.data.tables import is_table
from featstore.errors import Advice, ConfigError, FeatstoreError, RowError, counted, short
from featstore.progress import working

Rows = str | Sequence[str] | Mapping[str, str | Sequence[str]]

if TYPE_CHECKING:
    import pandas as pd

    # A row file, one that is open for reading bytes, or a table.
    RowSource = str | os.PathLike[str] | IO[bytes] | pd.DataFrame


@dataclass(frozen=True)
class Dataset:
    """Rows that have a photo and a split.

    Attributes:
        examples: The usable rows.
        splits: Their split by image.
        images: Where the photos are.
        issues: Rows dropped, and rows kept with a warning.
        root: The store's root: splits and reports are kept below it.
    """

    examples: Examples
    splits: Splits
    images: ImageIndex
    issues: list[RowIssue]
    root: Path

    @property
    def splits_path(self) -> Path:
        """The split on disk, once it is saved."""
        return self.root / "splits" / f"{self.splits.digest()}.json"

    @property
    def report(self) -> Path | None:
        """The CSV that names the issues, once it is saved; None where there are none."""
        if not self.issues:
            return None
        return self.root / "reports" / f"rows-{self.examples.digest()[:16]}.csv"

    def notes(self) -> list[str]:
        """Return lines that people should see.

        They say in what encoding a file was read, what is there in place of a photo, and
        which folders were passed over.
        """
        lines = []
        seen: set[str] = set()
        for issue in self.issues:
            if issue.reason.startswith(READ_AS) and issue.file not in seen:
                seen.add(issue.file)
                lines.append(
                    f"{issue.file} is not UTF-8: {issue.reason}, so line {issue.line} says"
                    f" {short(issue.text, 100)}; if that is wrong, set [data] encoding (--encoding)"
                )
        near = [issue for issue in self.issues if issue.reason == NO_PHOTO and issue.detail]
        if near:
            lines.append(
                f"no photo for {short(near[0].image_id)} of line {near[0].line}: {near[0].detail}"
            )
        return [*lines, *(f"{line}; passed over" for line in self.images.passed_over)]

    def save(self) -> None:
        """Write the split and the report; nothing of rows that are not split.

        Raises:
            FeatstoreError: They cannot be written.
        """
        if self.splits.source == "none":
            return
        save_splits(self.splits_path, self.splits)
        if self.report is not None:
            write_report(self.report, self.issues)

    def rows(self, split: str | Sequence[str]) -> NDArray[np.int64]:
        """Return the rows of a split, of several one after the other, or of all for "all"."""
        if not isinstance(split, str):
            return np.concatenate([self.rows(name) for name in split])
        if split == "all":
            return np.arange(len(self.examples))
        return self.splits.rows(self.examples, split)

    def counts(self) -> dict[str, Any]:
        """Return rows and images of each split, and rows dropped or kept by reason."""
        images = self.splits.counts()
        return {
            "rows": {split: len(self.rows(split)) for split in SPLITS},
            "images": {split: images[split] for split in SPLITS},
            "dropped": summarise(issue for issue in self.issues if issue.kind == "dropped"),
            "kept_with_warning": summarise(i for i in self.issues if i.kind == "kept"),
        }


def _with_photos(
    read: Mapping[str, ReadResult], images: ImageIndex, unique: bool
) -> tuple[dict[str, Examples], list[RowIssue]]:
    """Keep the rows that have a photo, each photo under one id in all files.

    Args:
        read: The rows of each file, by a name of it.
        images: Where the photos are.
        unique: Rows that repeat another once their ids are one are dropped.

    Raises:
        DataError: Two photos answer an id; or no row of a file has one.
    """
    kept: dict[str, Examples] = {}
    issues: list[RowIssue] = []
    spellings = one_spelling([result.examples.image_ids for result in read.values()], images)
    nearest = functools.cache(lambda: Nearest(images))
    for (name, result), ids in zip(read.items(), spellings, strict=True):
        examples, missing = drop_missing(
            result.examples, ids.get, lambda image_id: nearest().instead(image_id)
        )
        issues += [*result.issues, *missing]
        if not len(examples):
            raise _no_photo([*result.issues, *missing], images, nearest())
        if any(given != image_id for given, image_id in ids.items()):
            examples = examples.renamed(ids)
            if unique:
                examples, repeats = drop_repeats(examples)
                issues += repeats
        kept[name] = examples
    return kept, issues


def _no_photo(issues: list[RowIssue], images: ImageIndex, nearest: Nearest) -> UnusableRowsError:
    """Say that no row has a photo, by the example that explains it best."""
    missing = [issue for issue in issues if issue.reason == NO_PHOTO]
    example = next((issue for issue in missing if issue.detail), missing[0])
    rows = f"none of its {len(missing)} rows has a" if len(missing) > 1 else "its row has no"
    return UnusableRowsError(
        f"{example.file}: {rows} photo in {images.folder}: the image id"
        f" {short(example.image_id)} of line {example.line} was looked for as"
        f" {tried(example.image_id)}; {example.detail or nearest.folder()}",
        Advice("write the ids as the files are named, or check [data] images"),
        issues,
    )


def rows_to_predict(
    rows: RowSource,
    images: str | os.PathLike[str] | ImageIndex | None,
    root: Path,
    encoding: str = "",
    classes: int = 2,
    label_names: Sequence[str] = (),
) -> Dataset:
    """Read rows that need no label, and find their photos.

    Args:
        rows: A row file, an open one, or a table with such columns; see
            `featstore.data.rows`. Labels that are there are read.
        images: Folder of the photos, or what was found in it; None: they are in `rows`.
        root: The store's root.
        encoding: Of the file's text; "": UTF-8, or told from the bytes.
        classes: Of the labels that are there; with 2, neutral is none.
        label_names: See `read_examples`.

    Returns:
        The rows that can be predicted, in order, repeats included, in no split.
        Its issues have the others, and the rows whose label could not be read.

    Raises:
        RowError, DataError: None of the rows can be used, or they cannot be read.
    """
    index = images if isinstance(images, ImageIndex) else None
    if hasattr(rows, "columns"):
        result = read_frame(cast("pd.DataFrame", rows), classes, label_names)
    elif isinstance(rows, str | os.PathLike) and is_table(file := _only_file(rows)):
        table = TableRows(
            file, labelled=False, label_names=label_names, packed=images is None, root=root
        )
        index = packed_images([table]) if images is None else index
        result = table.result(labelled=False, unique=False, classes=classes)
    else:
        result = read_examples(
            rows,
            labelled=False,
            duplicates="keep",
            encoding=encoding,
            classes=classes,
            label_names=label_names,
        )
    if index is None:
        if images is None or isinstance(images, ImageIndex):
            raise ConfigError("images: name the folder of photos (flag --images)")
        index = index_images(images)
    name = result.examples.sources[0]
    kept, issues = _with_photos({name: result}, index, unique=False)
    return Dataset(kept[name], Splits.none(kept[name]), index, issues, root)


def load_dataset(data: DataConfig, root: Path, report: bool = True) -> Dataset:
    """Read the rows, find the photos, make or read the split.

    Args:
        data: The `[data]` settings; without rows, the built-in demo is used
            (and made on first use).
        root: The store's root: splits and reports are kept below it.
        report: Where no row can be used, write a report that names each.

    Raises:
        ConfigError: No folder of photos is named.
        RowError, DataError: Rows or photos cannot be used.
        SplitError: A split leaks, or belongs to other rows.
    """
    with working("reading the rows" if data.rows else "drawing the demo's scenes"):
        return _read_dataset(data, root, report)


def _read_dataset(data: DataConfig, root: Path, report: bool) -> Dataset:
    rows, folder = data.rows, data.images
    if not rows:
        demo_rows, demo_images = demo.ensure_demo_data(root)
        rows, folder = str(demo_rows), str(demo_images)
    if isinstance(rows, str) and not data.split_file:
        rows = dict(saved_splits(rows)) or rows
    elif isinstance(rows, dict) and data.split_file:
        raise ConfigError("[data] rows per split and split_file exclude each other")
    files = _files(rows, data.row_weights)
    if not folder:
        _require_photos(files)
    try:
        return _load(data, files, folder, root, report)
    except UnusableRowsError as error:
        if not report or not error.issues:
            raise
        path = root / "reports" / f"unusable-{Path(error.issues[0].file).name}.csv"
        try:
            write_report(path, error.issues)
        except FeatstoreError:  # the rows are what is to be said
            raise error from None
        named = f"{error.message} (each row is named in {path})"
        raise UnusableRowsError(named, error.mend, error.issues) from error


class _File(NamedTuple):
    """A row file, the split that its rows are of ("" where they are to be split), their weight."""

    split: str
    path: Path
    weight: float


def _files(rows: Rows, weights: Sequence[float]) -> list[_File]:
    """Return the files of `[data] rows`, those of a pattern or a folder one by one."""
    parts = by_split(rows.items(), "row files") if isinstance(rows, dict) else {"": rows}
    weighed = "train" if isinstance(rows, dict) else ""
    files: list[_File] = []
    for split, given in {weighed: (), **parts}.items():
        paths = (given,) if isinstance(given, str) else tuple(given)
        own = tuple(weights) if weights and split == weighed else (1.0,) * len(paths)
        if len(own) != len(paths):
            of = "train's" if split else "the rows'"
            raise ConfigError(
                f"[data] row_weights: expected {counted(len(paths), 'number')}, one for each of"
                f" {of} files in [data] rows, found {len(own)}"
            )
        for path, weight in zip(paths, own, strict=True):
            files += [_File(split, file, weight) for file in files_of(path)]
    return files


def _require_photos(files: Sequence[_File]) -> None:
    """Check that photos are in the rows' files, no folder being named.

    Raises:
        ConfigError: They are in none, or not in all.
    """
    without = [file.path for file in files if not is_table(file.path)]
    if len(without) == len(files):
        raise ConfigError("[data] images: name the folder of photos (flag --images)")
    if without:
        packed = next(file.path for file in files if is_table(file.path))
        raise ConfigError(
            f"[data] rows: {packed} may have its photos in it, {without[0]} cannot; name the folder"
            " of all their photos ([data] images, --images), or use files of one kind"
        )


def _load(
    data: DataConfig, files: Sequence[_File], folder: str, root: Path, report: bool
) -> Dataset:
    """Read the rows of `load_dataset`, find their photos, make or read the split."""
    unique = data.duplicates == "drop"
    images: ImageIndex | None = index_images(folder) if folder else None
    tables = {
        number: TableRows(
            file.path,
            label_names=data.label_names,
            packed=images is None,
            root=root if report else None,
        )
        for number, file in enumerate(files)
        if is_table(file.path)
    }
    if images is None:
        images = packed_images(list(tables.values()))

    def read(number: int, file: _File) -> ReadResult:
        if number in tables:
            # Popped: its columns are not held beside what is made of them.
            found = tables.pop(number).result(True, unique, data.classes)
        else:
            found = read_examples(
                file.path,
                duplicates=data.duplicates,
                encoding=data.encoding,
                classes=data.classes,
                label_names=data.label_names,
            )
        if file.weight == 1:
            return found
        weights = np.full(len(found.examples), file.weight, np.float32)
        return ReadResult(dataclasses.replace(found.examples, weights=weights), found.issues)

    results = {str(number): read(number, file) for number, file in enumerate(files)}
    kept, issues = _with_photos(results, images, unique)
    of_split: dict[str, list[Examples]] = {}
    for file, examples in zip(files, kept.values(), strict=True):
        of_split.setdefault(file.split, []).append(examples)
    parts: dict[str, Examples] = {}
    for split, several in of_split.items():
        parts[split] = several[0]
        if len(several) > 1:
            parts[split], more = joined(several, unique)
            issues += more
    if "" not in parts:
        examples, splits = splits_from_parts(parts)
        return Dataset(examples, splits, images, issues, root)
    examples = parts[""]
    splits = (
        read_split_file(data.split_file, examples, data.encoding)
        if data.split_file
        else make_splits(examples, data.fractions, data.split_seed)
    )
    return Dataset(examples, splits, images, issues, root)


def _only_file(rows: str | os.PathLike[str]) -> Path:
    """Return the file of rows that are predicted, whose lines are numbered in one file."""
    files = files_of(rows)
    if len(files) > 1:
        raise RowError(f"{os.fspath(rows)}: is {len(files)} files; name one, such as {files[0]}")
    return files[0]
