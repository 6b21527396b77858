"""A configuration's rows, photos and splits, checked against each other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from featstore import demo
from featstore.config import SPLITS, DataConfig
from featstore.data.examples import Examples, RowIssue, drop_missing, summarise, write_report
from featstore.data.images import ImageIndex, index_images
from featstore.data.rows import read_examples, read_frame
from featstore.data.splits import (
    Splits,
    make_splits,
    read_split_file,
    save_splits,
    splits_from_parts,
)
from featstore.errors import ConfigError, DataError, counted

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


def _read(path: str, data: DataConfig, images: ImageIndex) -> tuple[Examples, list[RowIssue]]:
    result = read_examples(path, duplicates=data.duplicates)
    examples, missing = drop_missing(result.examples, images.lookup)
    if not len(examples):
        raise DataError(
            f"{path}: none of its {counted(len(result.examples), 'row')} has a photo in"
            f" {images.folder};"
            " check [data] images"
        )
    return examples, [*result.issues, *missing]


def rows_to_predict(rows: RowSource, images: str | os.PathLike[str], root: Path) -> Dataset:
    """Read rows that need no label, and find their photos.

    Args:
        rows: A row file, an open one, or a table with such columns; see
            `featstore.data.rows`. Labels that are there are read.
        images: Folder of the photos.
        root: The store's root.

    Returns:
        The rows that can be predicted, in order, repeats included, in no split.
        Its issues have the others, and the rows whose label could not be read.

    Raises:
        RowError, DataError: None of the rows can be used, or they cannot be read.
    """
    if hasattr(rows, "columns"):
        result = read_frame(cast("pd.DataFrame", rows))
    else:
        result = read_examples(rows, labelled=False, duplicates="keep")
    index = index_images(images)
    examples, missing = drop_missing(result.examples, index.lookup)
    if not len(examples):
        raise DataError(
            f"none of {counted(len(result.examples), 'row')} to predict has a photo in"
            f" {index.folder}"
        )
    issues = [*result.issues, *missing]
    return Dataset(examples, Splits.none(examples), index, issues, root)


def load_dataset(data: DataConfig, root: Path) -> Dataset:
    """Read the rows, find the photos, make or read the split.

    Args:
        data: The `[data]` settings; without rows, the built-in demo is used
            (and made on first use).
        root: The store's root: splits and reports are kept below it.

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
    images = index_images(folder)
    issues: list[RowIssue] = []
    if isinstance(rows, dict):
        if data.split_file:
            raise ConfigError("[data] rows per split and split_file exclude each other")
        parts = {}
        for split, path in rows.items():
            parts[split], found = _read(path, data, images)
            issues += found
        examples, splits = splits_from_parts(parts)
    else:
        examples, issues = _read(rows, data, images)
        splits = (
            read_split_file(data.split_file, examples)
            if data.split_file
            else make_splits(examples, data.fractions, data.split_seed)
        )
    return Dataset(examples, splits, images, issues, root)
