"""Train, val and test: split by photo, saved to disk, checked for leaks.

No photo may be in two splits: about two hypotheses share one, and a model that has seen
the photo has seen part of the answer. Ids that differ only in an image suffix
(`12`, `12.jpg`) are taken for one photo.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from featstore.config import SPLITS
from featstore.data.encoding import encoding_of, unpacked
from featstore.data.examples import Examples
from featstore.data.images import IMAGE_SUFFIXES
from featstore.data.rows import ROLES, columns_named
from featstore.errors import RowError, SplitError, counted, short
from featstore.publish import write_bytes

FORMAT = 1
Source = Literal["grouped", "file", "rows", "none"]

_SYNONYMS = {"valid": "val", "validation": "val", "dev": "val"}


@dataclass(frozen=True)
class Splits:
    """Which images are in which split.

    Attributes:
        assignment: train, val and test to their image ids, sorted; a split may be empty.
        rows_digest: `Examples.digest()` of the rows that were split.
        fractions: Shares of the photos that were asked for; empty for a split that was
            given rather than made.
        seed: The seed, or None for a split that was given.
        source: "grouped" (made here), "file" (a split file), "rows" (one row file for
            each split) or "none" (not split: rows to predict).
    """

    assignment: Mapping[str, tuple[str, ...]]
    rows_digest: str
    fractions: tuple[float, ...] = ()
    seed: int | None = None
    source: Source = "grouped"

    @classmethod
    def none(cls, examples: Examples) -> Splits:
        """Return splits of rows that are in none."""
        return cls(dict.fromkeys(SPLITS, ()), examples.digest(), source="none")

    def rows(self, examples: Examples, split: str) -> npt.NDArray[np.int64]:
        """Return the rows of a split.

        Args:
            examples: The rows that were split, in any order.
            split: "train", "val" or "test".

        Returns:
            int64 of shape (rows of the split,), ascending positions in `examples`.

        Raises:
            SplitError: There is no such split.
        """
        if split not in self.assignment:
            raise SplitError(f"no split {split!r}; expected one of {', '.join(self.assignment)}")
        members = set(self.assignment[split])
        inside = (image_id in members for image_id in examples.image_ids)
        return np.flatnonzero(np.fromiter(inside, dtype=np.bool_, count=len(examples)))

    def counts(self) -> dict[str, int]:
        """Return the number of images of each split."""
        return {split: len(ids) for split, ids in self.assignment.items()}

    def digest(self) -> str:
        """Return a hex digest of the assignment and of the rows it belongs to."""
        content = [self.rows_digest, [[split, self.assignment[split]] for split in SPLITS]]
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def photo_key(image_id: str) -> str:
    """Return an image id without its image suffix."""
    stem, dot, suffix = image_id.rpartition(".")
    return stem if dot + suffix.lower() in IMAGE_SUFFIXES and stem else image_id


def make_splits(examples: Examples, fractions: Sequence[float], seed: int) -> Splits:
    """Split rows by photo.

    Photos are ordered by a keyed hash of their id and cut at the fractions. So the split
    depends on the seed and the set of photos alone, not on the order of the rows nor on
    a random generator's version, and adding photos moves few of the others: a photo
    changes its split only where a cut passes it.

    Args:
        examples: The rows.
        fractions: Shares of train, val and test; they sum to 1. A part has
            floor(fraction * photos) photos, and the last part that is not 0 takes the
            rest.
        seed: The key of the hash.

    Raises:
        SplitError: The fractions do not sum to 1, or a part would be empty.
    """
    shares = tuple(float(fraction) for fraction in fractions)
    if len(shares) != len(SPLITS) or not all(0 <= share <= 1 for share in shares):
        raise SplitError(
            f"fractions: expected {len(SPLITS)} shares of {', '.join(SPLITS)} from 0 to 1,"
            f" found {short(shares)}"
        )
    if abs(sum(shares) - 1) > 1e-6:
        raise SplitError(f"fractions: expected a sum of 1, found {short(shares)}: {sum(shares):g}")
    photos = _photos(examples)
    key = hashlib.blake2b(str(seed).encode(), digest_size=32).digest()

    def place(photo: str) -> tuple[bytes, str]:
        return hashlib.blake2b(photo.encode(), key=key, digest_size=16).digest(), photo

    ordered = sorted(photos, key=place)
    last = max(i for i, share in enumerate(shares) if share > 0)
    # The tolerance: 0.29 * 100 is 28.999999999999996.
    sizes = [math.floor(share * len(ordered) + 1e-9) for share in shares[:last]]
    sizes.append(len(ordered) - sum(sizes))
    assignment: dict[str, tuple[str, ...]] = dict.fromkeys(SPLITS, ())
    start = 0
    for split, share, size in zip(SPLITS, shares, sizes, strict=False):
        if share > 0 and size <= 0:
            raise SplitError(
                f"split {split!r} would be empty: {share:g} of {counted(len(ordered), 'photo')};"
                " add rows on other photos or change the fractions"
            )
        chosen = (image_id for photo in ordered[start : start + size] for image_id in photos[photo])
        assignment[split] = tuple(sorted(chosen))
        start += size
    return Splits(assignment, examples.digest(), shares, seed, "grouped")


def splits_from_parts(parts: Mapping[str, Examples]) -> tuple[Examples, Splits]:
    """Take splits that come as separate row files.

    Args:
        parts: train, val and test (or some of them) to their rows.

    Returns:
        All rows, train first, then val, then test; and their splits.

    Raises:
        SplitError: Unknown split name, an empty part, or a photo in two parts.
    """
    named = by_split(parts.items(), "row files")
    for split, part in named.items():
        if len(part) == 0:
            raise SplitError(f"split {split!r} has no rows; leave it out or add rows")
    if not named:
        raise SplitError(f"row files: no split given; expected some of {', '.join(SPLITS)}")
    assignment = {
        split: tuple(sorted(set(named[split].image_ids))) if split in named else ()
        for split in SPLITS
    }
    check_no_leak(assignment, "row files")
    examples = Examples.concatenate([named[split] for split in SPLITS if split in named])
    return examples, Splits(assignment, examples.digest(), (), None, "rows")


def check_no_leak(assignment: Mapping[str, Iterable[str]], where: str) -> None:
    """Check that no photo is in two splits.

    Args:
        assignment: Split name to image ids.
        where: What to call it in the error.

    Raises:
        SplitError: A photo is in two splits; names it and how many others are.
    """
    owner: dict[str, tuple[str, str]] = {}
    leaks: list[str] = []
    for split, image_ids in assignment.items():
        for image_id in image_ids:
            other, first = owner.setdefault(photo_key(image_id), (split, image_id))
            if other != split:
                alias = "" if first == image_id else f" as {short(first)}"
                leaks.append(f"image {short(image_id)} is in {split!r} and{alias} in {other!r}")
    if leaks:
        more = f", and {len(leaks) - 1} more" if len(leaks) > 1 else ""
        raise SplitError(f"{where}: the splits leak: {leaks[0]}{more}; keep each in one split")


def save_splits(path: str | os.PathLike[str], splits: Splits) -> None:
    """Write splits as JSON, atomically; the same splits give the same bytes.

    A file that has them already is left as it is, so that its folder may be
    read-only.

    Raises:
        FeatstoreError: The file cannot be written.
    """
    content = {
        "format": FORMAT,
        "source": splits.source,
        "rows_digest": splits.rows_digest,
        "fractions": list(splits.fractions),
        "seed": splits.seed,
        "counts": splits.counts(),
        "splits": {split: list(splits.assignment[split]) for split in SPLITS},
    }
    data = (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()
    with contextlib.suppress(OSError):
        if Path(path).read_bytes() == data:
            return
    write_bytes(path, data)


def read_split_file(path: str | os.PathLike[str], examples: Examples, encoding: str = "") -> Splits:
    """Read a split that the user made.

    Either JSON, `{"train": [ids], "val": [ids], "test": [ids]}`, or CSV with a column of
    image ids, by any of its names in a row file, and a column `split`. `valid`, `validation`
    and `dev` mean val. A file saved by `save_splits` is read too. Ids may be written with or
    without the image suffix, and as the rows write them. Images that no row is about are
    ignored: such a file often covers more than the rows used.

    Args:
        path: The file, which may be packed by gzip.
        examples: The rows to split; each of their images must be in one split.
        encoding: Of the file's text; "": UTF-8, or told from the bytes.

    Raises:
        SplitError: The file cannot be read or has another shape; a photo is in two
            splits; an image of the rows is in no split; or a split of the file has no
            image of the rows.
    """
    path = Path(path)
    text = _read_text(path, encoding)
    given = _split_json(path, text) if text.lstrip()[:1] in ("{", "[") else _split_csv(path, text)
    pairs = zip(examples.written_ids, examples.image_ids, strict=True)
    meant = {photo_key(written): image_id for written, image_id in pairs if written != image_id}
    given = {s: [meant.get(photo_key(i), i) for i in ids] for s, ids in given.items()}
    check_no_leak(given, str(path))
    owner = {photo_key(image_id): split for split, ids in given.items() for image_id in ids}
    assignment: dict[str, list[str]] = {split: [] for split in SPLITS}
    missing: list[str] = []
    for image_id in sorted(set(examples.image_ids)):
        split = owner.get(photo_key(image_id))
        (missing if split is None else assignment[split]).append(image_id)
    if missing:
        raise SplitError(
            f"{path}: image {short(missing[0])} of the rows is in no split ({len(missing)} such);"
            " add it to the file, or remove its rows"
        )
    for split, ids in given.items():
        if ids and not assignment[split]:
            raise SplitError(
                f"{path}: no row is about an image of split {split!r}, such as {short(ids[0])};"
                " check the ids, or remove the split from the file"
            )
    frozen = {split: tuple(ids) for split, ids in assignment.items()}
    return Splits(frozen, examples.digest(), (), None, "file")


def _photos(examples: Examples) -> dict[str, list[str]]:
    """Return each photo's image ids."""
    photos: defaultdict[str, list[str]] = defaultdict(list)
    for image_id in dict.fromkeys(examples.image_ids):
        photos[photo_key(image_id)].append(image_id)
    return photos


def by_split(items: Iterable[tuple[Any, Any]], where: str) -> dict[str, Any]:
    """Return values by split name, synonyms resolved."""
    named: dict[str, Any] = {}
    for name, value in items:
        split = str(name).strip().lower()
        split = _SYNONYMS.get(split, split)
        if split not in SPLITS:
            raise SplitError(
                f"{where}: unknown split {short(name)}; expected {', '.join(SPLITS)}"
                f" ({', '.join(_SYNONYMS)} mean val)"
            )
        if split in named:
            raise SplitError(f"{where}: split {split!r} is given twice, once as {short(name)}")
        named[split] = value
    return named


def _read_text(path: Path, encoding: str) -> str:
    try:
        with path.open("rb") as packed, unpacked(path, packed) as file:
            name = encoding_of(path, file, encoding).name
            return file.read().decode(name)
    except OSError as error:
        raise SplitError(f"{path}: cannot be read ({error.strerror})") from error
    except RowError as error:
        raise SplitError(error.message, error.mend) from error


def _split_json(path: Path, text: str) -> dict[str, list[str]]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise SplitError(f"{path}{line}: not a JSON file; correct it, or write it anew") from error
    if isinstance(content, dict) and isinstance(content.get("splits"), dict):
        content = content["splits"]
    if not isinstance(content, dict):
        raise SplitError(
            f'{path}: expected {{"train": [ids], "val": [ids], "test": [ids]}}, found a list'
        )
    given: dict[str, list[str]] = {}
    for split, ids in by_split(content.items(), str(path)).items():
        if not isinstance(ids, list):
            raise SplitError(f"{path}: split {split!r}: expected a list of ids, found {short(ids)}")
        for image_id in ids:
            if not isinstance(image_id, str | int) or isinstance(image_id, bool):
                raise SplitError(
                    f"{path}: split {split!r}: expected ids as text, found {short(image_id)}"
                )
        given[split] = [str(image_id).strip() for image_id in ids]
    return given


def _split_csv(path: Path, text: str) -> dict[str, list[str]]:
    given: dict[str, list[str]] = {split: [] for split in SPLITS}
    for line, image_id, name in _split_records(path, text):
        split = next(iter(by_split([(name, None)], f"{path}:{line}")))
        given[split].append(image_id)
    return given


def _split_records(path: Path, text: str) -> Iterator[tuple[int, str, str]]:
    """Yield line, image id and split name of each record."""
    header = text.lstrip().split("\n", 1)[0]
    delimiter = max(",;\t", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    at: tuple[int, int] | None = None
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if at is None:
                names = columns_named(cells, ROLES["image id"])
                splits = columns_named(cells, [["split"]])
                if len(names) != 1 or len(splits) != 1:
                    raise SplitError(
                        f"{path}:{reader.line_num}: expected the columns image_id and split, found"
                        f" {short(', '.join(cells), 200)}; ids may be called as in a row file"
                    )
                at = names[0], splits[0]
            elif len(cells) <= max(at) or not cells[at[0]].strip():
                raise SplitError(
                    f"{path}:{reader.line_num}: expected an image id and a split,"
                    f" found {short(delimiter.join(cells))}"
                )
            else:
                yield reader.line_num, cells[at[0]].strip(), cells[at[1]]
    except csv.Error as error:
        raise SplitError(f"{path}:{reader.line_num}: not CSV: {error}") from error
    if at is None:
        raise SplitError(f"{path}: is empty; expected the columns image_id and split")
