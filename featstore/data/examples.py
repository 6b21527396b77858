"""The rows of a data set as one table: image id, hypothesis, label, and where each row stood."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from featstore.data.labels import labels_of
from featstore.errors import Advice, Command, DataError, RowError
from featstore.publish import write_bytes

NO_PHOTO = "no photo"
DUPLICATE = "duplicate"
READ_AS, NOT_UTF_8 = "read as", "the file is not UTF-8"

Indices = npt.NDArray[np.int64] | npt.NDArray[np.bool_] | Sequence[int] | slice
ObjectArray = npt.NDArray[np.object_]


@dataclass(frozen=True, eq=False)
class Examples:
    """A table of rows, all columns of one length, in the order of the file.

    Attributes:
        image_ids: object of shape (rows,), str.
        hypotheses: object of shape (rows,), str.
        labels: int8 of shape (rows,): 1 entailment, 0 contradiction, of three classes 2
            neutral; -1 unlabelled.
        source_lines: int64 of shape (rows,): 1-based line where the row starts.
        sources: object of shape (rows,), str: the file of each row.
        written_ids: object of shape (rows,), str: the image ids as the files spell them.
        weights: float32 of shape (rows,): of each row in the training loss.
    """

    image_ids: ObjectArray
    hypotheses: ObjectArray
    labels: npt.NDArray[np.int8]
    source_lines: npt.NDArray[np.int64]
    sources: ObjectArray
    written_ids: ObjectArray = None  # type: ignore[assignment]  # those of image_ids
    weights: npt.NDArray[np.float32] = None  # type: ignore[assignment]  # 1

    def __post_init__(self) -> None:
        if self.written_ids is None:
            object.__setattr__(self, "written_ids", self.image_ids)
        if self.weights is None:
            object.__setattr__(self, "weights", np.ones(len(self.labels), np.float32))
        lengths = {len(getattr(self, field.name)) for field in dataclasses.fields(self)}
        if len(lengths) != 1:
            raise ValueError(f"columns of different lengths: {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: Indices) -> Examples:
        """Return the rows at `indices` (int64, or bool of shape (rows,)), in that order."""
        at = indices if isinstance(indices, slice) else np.asarray(indices)
        if isinstance(at, np.ndarray) and at.size == 0:
            at = at.astype(np.int64)
        columns = (getattr(self, field.name)[at] for field in dataclasses.fields(self))
        return Examples(*columns)

    def renamed(self, ids: Mapping[str, str]) -> Examples:
        """Return the rows with other image ids; as they were written they stay known."""
        image_ids = np.array([ids[image_id] for image_id in self.image_ids], dtype=object)
        return dataclasses.replace(self, image_ids=image_ids)

    def digest(self) -> str:
        """Return a hex digest of each row's image id, hypothesis and label, in order.

        Weights count where one is not 1. Where the rows were read from does not count.
        """
        state = hashlib.blake2b(digest_size=16)
        for image_id, text, label in zip(
            self.image_ids, self.hypotheses, self.labels.tolist(), strict=True
        ):
            # Lengths first, so that no two tables can run together into the same bytes.
            state.update(f"{len(image_id)} {len(text)} {label} {image_id}{text}".encode())
        if (self.weights != 1).any():
            state.update(b"weights" + self.weights.astype("<f4").tobytes())
        return state.hexdigest()

    @staticmethod
    def concatenate(parts: Sequence[Examples]) -> Examples:
        """Return the rows of all parts, one part after another."""
        names = [field.name for field in dataclasses.fields(Examples)]
        return Examples(*(np.concatenate([getattr(part, n) for part in parts]) for n in names))


@dataclass(frozen=True)
class RowIssue:
    """One row that was dropped, or kept although something is odd about it.

    Attributes:
        kind: "dropped" or "kept".
        file: The row file.
        line: 1-based line where the row starts.
        image_id: The row's image id, as far as it could be read.
        reason: One of a few fixed phrases, so that reasons can be counted.
        text: The row's hypothesis, as far as it could be read.
        detail: What was found.
    """

    kind: Literal["dropped", "kept"]
    file: str
    line: int
    image_id: str
    reason: str
    text: str
    detail: str = ""


@dataclass(frozen=True)
class ReadResult:
    """The usable rows of a file, and every row about which there is something to say."""

    examples: Examples
    issues: list[RowIssue]


class UnusableRowsError(RowError):
    """No row of a file can be used.

    Args:
        message, mend: As of any error.
        issues: Each row, with its reason.
    """

    def __init__(
        self, message: str, mend: Command | Advice | None = None, issues: Sequence[RowIssue] = ()
    ) -> None:
        super().__init__(message, mend)
        self.issues = list(issues)


def summarise(issues: Iterable[RowIssue]) -> dict[str, int]:
    """Return how many issues have each reason, the most frequent first."""
    return dict(Counter(issue.reason for issue in issues).most_common())


def class_counts(labels: npt.ArrayLike, classes: int) -> dict[str, int]:
    """Return the rows of each class by its name.

    Args:
        labels: int8 of shape (rows,).
        classes: 2 or 3.
    """
    truth = np.asarray(labels)
    return {name: int((truth == label).sum()) for name, label in labels_of(classes).items()}


def require_every_class(examples: Examples, where: str, classes: int = 2) -> None:
    """Check that there is something to tell apart.

    Args:
        examples: Labelled rows.
        where: What to call them in the error, such as "train split of rows.jsonl".
        classes: 2 or 3.

    Raises:
        DataError: A class has no row.
    """
    counts = class_counts(examples.labels, classes)
    if min(counts.values()) == 0:
        found = ", ".join(f"{count} {name}" for name, count in counts.items())
        each = "both classes" if classes == 2 else "all three classes"
        mend = "" if classes == 2 else ", or set [data] classes = 2 (--classes 2)"
        raise DataError(
            f"{where}: expected rows of {each}, found {found};"
            f" add rows of the missing class, or check the file's labels{mend}"
        )


def drop_missing(
    examples: Examples,
    available: Callable[[str], object],
    instead: Callable[[str], str] = lambda image_id: "",
) -> tuple[Examples, list[RowIssue]]:
    """Drop the rows whose photo is not there.

    Args:
        examples: The rows.
        available: Called once for each distinct image id; what it returns is taken as
            true or false. `ImageIndex.lookup` fits.
        instead: Says of an id without a photo what is there instead.

    Returns:
        The rows that stay, in order, and one issue for each row that does not.
    """
    found = {image_id: bool(available(image_id)) for image_id in dict.fromkeys(examples.image_ids)}
    here = np.fromiter((found[i] for i in examples.image_ids), dtype=np.bool_, count=len(examples))
    issues = [
        RowIssue(
            "dropped",
            examples.sources[row],
            int(examples.source_lines[row]),
            examples.image_ids[row],
            NO_PHOTO,
            examples.hypotheses[row],
            instead(examples.image_ids[row]),
        )
        for row in np.flatnonzero(~here)
    ]
    return examples.select(here), issues


def drop_repeats(examples: Examples) -> tuple[Examples, list[RowIssue]]:
    """Drop the rows that have image id, hypothesis and label of an earlier row."""
    first: dict[tuple[str, str, int], int] = {}
    keys = zip(examples.image_ids, examples.hypotheses, examples.labels.tolist(), strict=True)
    earlier = [first.setdefault(key, row) for row, key in enumerate(keys)]
    lines = examples.source_lines
    issues = [
        RowIssue(
            "dropped",
            examples.sources[row],
            int(lines[row]),
            examples.written_ids[row],
            DUPLICATE,
            examples.hypotheses[row],
            f"same as line {lines[same]} of {examples.sources[same]}",
        )
        for row, same in enumerate(earlier)
        if same != row
    ]
    return examples.select(sorted(first.values())), issues


def write_report(path: str | os.PathLike[str], issues: Iterable[RowIssue]) -> None:
    """Write issues as CSV (UTF-8), atomically.

    Raises:
        FeatstoreError: The file cannot be written.
    """
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)
    fields = ("kind", "file", "line", "image_id", "reason", "detail", "text")
    writer.writerow(fields)
    writer.writerows([getattr(issue, field) for field in fields] for issue in issues)
    # A lone surrogate may be the very reason for the issue.
    write_bytes(path, buffer.getvalue().encode("utf-8", errors="backslashreplace"))
