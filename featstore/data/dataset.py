"""A configuration's rows, photos and splits, checked against each other."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from featstore import demo
from featstore.config import SPLITS, DataConfig
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
    make_splits,
    read_split_file,
    save_splits,
    splits_from_parts,
)
from featstore.errors import Advice, ConfigError, FeatstoreError, short

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
    images: str | os.PathLike[str],
    root: Path,
    encoding: str = "",
    classes: int = 2,
) -> Dataset:
    """Read rows that need no label, and find their photos.

    Args:
        rows: A row file, an open one, or a table with such columns; see
            `featstore.data.rows`. Labels that are there are read.
        images: Folder of the photos.
        root: The store's root.
        encoding: Of the file's text; "": UTF-8, or told from the bytes.
        classes: Of the labels that are there; with 2, neutral is none.

    Returns:
        The rows that can be predicted, in order, repeats included, in no split.
        Its issues have the others, and the rows whose label could not be read.

    Raises:
        RowError, DataError: None of the rows can be used, or they cannot be read.
    """
    if hasattr(rows, "columns"):
        result = read_frame(cast("pd.DataFrame", rows), classes)
    else:
        result = read_examples(
            rows, labelled=False, duplicates="keep", encoding=encoding, classes=classes
        )
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
    rows, folder = data.rows, data.images
    if not rows:
        demo_rows, demo_images = demo.ensure_demo_data(root)
        rows, folder = str(demo_rows), str(demo_images)
    if not folder:
        raise ConfigError("[data] images: name the folder of photos (flag --images)")
    if isinstance(rows, dict) and data.split_file:
        raise ConfigError("[data] rows per split and split_file exclude each other")
    images = index_images(folder)
    try:
        return _load(data, rows, images, root)
    except UnusableRowsError as error:
        if not report:
            raise
        path = root / "reports" / f"unusable-{Path(error.issues[0].file).name}.csv"
        try:
            write_report(path, error.issues)
        except FeatstoreError:  # the rows are what is to be said
            raise error from None
        named = f"{error.message} (each row is named in {path})"
        raise UnusableRowsError(named, error.mend, error.issues) from error


def _load(data: DataConfig, rows: str | dict[str, str], images: ImageIndex, root: Path) -> Dataset:
    """Read the rows of `load_dataset`, find their photos, make or read the split."""

    def read(path: str) -> ReadResult:
        return read_examples(
            path, duplicates=data.duplicates, encoding=data.encoding, classes=data.classes
        )

    unique = data.duplicates == "drop"
    if isinstance(rows, dict):
        results = {split: read(path) for split, path in rows.items()}
        parts, issues = _with_photos(results, images, unique)
        examples, splits = splits_from_parts(parts)
        return Dataset(examples, splits, images, issues, root)
    kept, issues = _with_photos({rows: read(rows)}, images, unique)
    examples = kept[rows]
    splits = (
        read_split_file(data.split_file, examples, data.encoding)
        if data.split_file
        else make_splits(examples, data.fractions, data.split_seed)
    )
    return Dataset(examples, splits, images, issues, root)
