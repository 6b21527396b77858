"""Open the features of one spec, find rows by key, gather them.

    <root>/<kind>/<fingerprint>/
        spec.json         the spec, and the names it was known by
        shard-00000.h5 …  immutable (see `shard.py`)
        manifest.json     name, rows, bytes and digest of each shard; can be
                          rebuilt from the shards, and is needed: without it
                          nobody could tell that the newest shard is lost
        quarantine.json   inputs that could not be encoded, each with its reason
        plan.json .claim-* .lock   of the processes that extract (see `worklist.py`)

A key may stand in several shards (its photo changed): the last one counts.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from featstore.encoders.spec import FORMAT, FeatureSpec, canonical_json, differing_fields, read_spec
from featstore.errors import (
    CorruptShardError,
    MissingFeaturesError,
    StaleFeaturesError,
    StoreError,
)
from featstore.store.numbers import QUANTISED, SCALE_DTYPE
from featstore.store.publish import command_line, package_versions, read_json, write_json
from featstore.store.shard import (
    MAKE_READABLE,
    VERIFY,
    describe_file,
    digest_keys,
    feature_dtype,
    open_shard,
    shard_number,
)

IntArray = NDArray[np.int64]

ALIGNMENT_BYTES = 64

# In place of a photo's digest: its newest features were lost, and older ones are stale.
LOST = [0, 0]
MEND_QUARANTINE = "run `python cli.py store repair`, or delete it and extract again"
MEND_MANIFEST = "run `python cli.py store repair`"
FIRST_FIELDS = {"format", "fingerprint", "command", "versions", "quarantine", "shards"}


def aligned_empty(
    shape: tuple[int, ...], dtype: Any, alignment: int = ALIGNMENT_BYTES
) -> NDArray[Any]:
    """Return an uninitialised array that starts at a multiple of `alignment` bytes.

    NumPy's own large arrays start 16 bytes past a page. Copying to there from
    rows that start at a page takes twice the time on processors whose string
    moves are slow at such distances, AMD's Zen 3 and 4 among them.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + alignment, np.uint8)
    start = -memory.ctypes.data % alignment
    return memory[start : start + size].view(dtype).reshape(shape)


def listed(folder: Path) -> list[Path]:
    """Return what is in a folder, by name; nothing where there is no folder.

    Raises:
        StoreError: It may not be listed. `Path.glob` would find it empty, and
            what is there would count as never extracted, or as needed by nobody.
    """
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StoreError(
            f"{folder}: cannot be listed ({error.strerror}); {MAKE_READABLE}"
        ) from error


def shard_paths(folder: Path) -> list[Path]:
    """Return the published shards of a folder in their order.

    A file of any other name, such as a copy that someone made, is no shard:
    its rows would count as the newest.

    Raises:
        StoreError: The folder may not be listed.
    """
    found = [path for path in listed(folder) if shard_number(path) is not None]
    return sorted(found, key=lambda path: (len(path.name), path.name))


def _manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest; an absent or broken one is empty."""
    try:
        found = read_json(folder / "manifest.json")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """Return the XXH3-128 of a manifest's canonical JSON, its own `checksum` left out."""
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return xxhash.xxh3_128_hexdigest(canonical_json(content).encode())


def manifest_damage(folder: Path) -> str:
    """Say what is wrong with a folder's manifest; empty where nothing is.

    It is written before the first shard, so a folder with shards and without
    it has lost it. A manifest of the first version has no checksum.
    """
    path = folder / "manifest.json"
    try:
        found = read_json(path)
    except FileNotFoundError:
        # Looked for again: a new folder's first shard may have been published meanwhile.
        return "is missing" if shard_paths(folder) and not path.exists() else ""
    except (OSError, ValueError) as error:
        return f"cannot be read ({error})"
    if not isinstance(found, dict) or not isinstance(found.get("shards"), list):
        return "has no list of shards"
    lines = read_manifest(folder)
    if len(lines) != len(found["shards"]):
        return "its lines cannot be read"
    if len({line["name"] for line in lines}) != len(lines):
        return "it lists a shard twice"
    if (found.get("format", FORMAT), found.get("fingerprint", folder.name)) != (
        FORMAT,
        folder.name,
    ):
        return "its format or fingerprint is not this folder's"
    try:
        if "checksum" in found:
            changed = found["checksum"] != manifest_checksum(found)
        else:
            # The first version had no other fields: this may have been the checksum's name.
            changed = not found.keys() <= FIRST_FIELDS
    except StoreError as error:
        return f"cannot be read ({error})"
    return "its text was changed (checksum differs)" if changed else ""


def read_manifest(folder: Path) -> list[dict[str, Any]]:
    """Return the manifest's shard lines; an absent or broken manifest gives none."""
    try:
        lines = [dict(line) for line in _manifest(folder)["shards"]]
    except (ValueError, KeyError, TypeError):
        return []
    sound = all(
        isinstance(line.get("name"), str)
        # A name that leads elsewhere would be read, or deleted, there.
        and shard_number(Path(line["name"])) is not None
        and Path(line["name"]).name == line["name"]
        and type(line.get("bytes")) is int
        for line in lines
    )
    return lines if sound else []


def _manifest_lines(folder: Path) -> list[tuple[Path, dict[str, Any] | None]]:
    """Return each shard on the disk with its line of the manifest, if it has one.

    Raises:
        CorruptShardError: The manifest is damaged or lost, or a shard of it is
            gone or has another size.
    """
    if damage := manifest_damage(folder):
        raise CorruptShardError(f"{folder / 'manifest.json'}: {damage}; {MEND_MANIFEST}")
    # The manifest first: a shard that is published meanwhile has no line, and no line is lost.
    known = {line["name"]: line for line in read_manifest(folder)}
    found = []
    for path in shard_paths(folder):
        line = known.pop(path.name, None)
        try:
            size = path.stat().st_size
        except OSError as error:
            raise CorruptShardError(f"{path}: {error.strerror}; {VERIFY}") from error
        if line is not None and line["bytes"] != size:
            raise CorruptShardError(f"{path}: {size} bytes, expected {line['bytes']}; {VERIFY}")
        found.append((path, line))
    if known:
        raise CorruptShardError(f"{folder}: shard {next(iter(known))} is missing; {VERIFY}")
    return found


def reconcile_manifest(folder: Path) -> list[dict[str, Any]]:
    """Return one line for each shard on the disk.

    A shard that a kill left out of the manifest is described from its file.

    Raises:
        CorruptShardError: The manifest is damaged or lost; a shard of it is
            gone, or has another size than when it was published; or a shard
            that is not in it is damaged.
    """
    lines = []
    for path, line in _manifest_lines(folder):
        if line is None:
            spec = read_spec(folder)
            rows = len(open_shard(path, spec["kind"], folder.name, spec["dtype"]))
            line = {"name": path.name, "rows": rows, **describe_file(path)}
        lines.append(line)
    return lines


def write_manifest(folder: Path, fingerprint: str, lines: list[dict[str, Any]]) -> None:
    """Publish the manifest; the quarantine list, if there is one, is written before."""
    manifest = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "command": command_line(),
        "versions": package_versions(),
        "quarantine": (folder / "quarantine.json").exists(),
        "shards": lines,
    }
    write_json(folder / "manifest.json", {**manifest, "checksum": manifest_checksum(manifest)})


def quarantine_checksum(key: str, entry: Mapping[str, Any]) -> str:
    """Return the XXH3-64 of one entry of the quarantine list and its key."""
    text = json.dumps([key, entry["reason"], entry["source_digest"]])
    return xxhash.xxh3_64_hexdigest(text.encode())


def write_quarantine(folder: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Publish the quarantine list, each entry with its checksum."""
    checked = {
        key: {**entry, "checksum": quarantine_checksum(key, entry)}
        for key, entry in entries.items()
    }
    write_json(folder / "quarantine.json", checked)


def _is_sound(key: str, entry: Any) -> bool:
    """Tell whether a quarantine entry is one, with its checksum if it has any."""
    if not isinstance(entry, dict) or not entry.keys() >= {"reason", "source_digest"}:
        return False
    digest = entry["source_digest"]
    if digest is not None and not (
        isinstance(digest, list)
        and len(digest) == 2
        and all(type(part) is int and 0 <= part < 1 << 64 for part in digest)
    ):
        return False
    if not isinstance(entry["reason"], str) or any("\ud800" <= c <= "\udfff" for c in key):
        return False
    if "checksum" not in entry:
        # The first version had no other fields: this may have been the checksum's name.
        return entry.keys() == {"reason", "source_digest"}
    return bool(entry["checksum"] == quarantine_checksum(key, entry))


def salvage_quarantine(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the sound entries of a damaged quarantine list."""
    try:
        entries = read_json(folder / "quarantine.json")
    except (OSError, ValueError):
        return {}
    if not isinstance(entries, dict):
        return {}
    return {
        key: {"reason": entry["reason"], "source_digest": entry["source_digest"]}
        for key, entry in entries.items()
        if _is_sound(key, entry)
    }


def read_quarantine(folder: Path, with_lost: bool = False) -> dict[str, dict[str, Any]]:
    """Return key to {reason, source_digest} of the inputs that could not be encoded.

    Args:
        folder: Of the features.
        with_lost: Also return the photos whose newest features a repair could
            not restore; until they are extracted again they have none.

    Raises:
        CorruptShardError: The list was changed, or is gone though the manifest
            says that there is one.
    """
    path = folder / "quarantine.json"
    try:
        entries = read_json(path)
    except FileNotFoundError:
        if _manifest(folder).get("quarantine"):
            raise CorruptShardError(
                f"{path}: is missing, the manifest says that there is one;"
                " run `python cli.py store repair`"
            ) from None
        return {}
    except (OSError, ValueError) as error:
        raise CorruptShardError(f"{path}: cannot be read ({error}); {MEND_QUARANTINE}") from error
    if not isinstance(entries, dict):
        raise CorruptShardError(
            f"{path}: expected key to reason and source_digest; {MEND_QUARANTINE}"
        )
    for key, entry in entries.items():
        if not _is_sound(key, entry):
            raise CorruptShardError(
                f"{path}: the entry of {key!r} was changed, or has no reason and source_digest;"
                f" {MEND_QUARANTINE}"
            )
    return {
        key: {"reason": entry["reason"], "source_digest": entry["source_digest"]}
        for key, entry in entries.items()
        if with_lost or entry["source_digest"] != LOST
    }


class Store:
    """The features of one spec, read-only.

    Safe to use from several threads. Nothing of HDF5 stays open, so it may
    also be used after a fork.
    """

    def __init__(self, folder: Path, spec: dict[str, Any]) -> None:
        self.folder = folder
        self.spec = spec
        try:
            self.dtype = feature_dtype(spec["dtype"])
        except TypeError as error:
            raise CorruptShardError(f"{folder}: unknown dtype {spec['dtype']!r}") from error
        self.shards = [
            open_shard(path, spec["kind"], folder.name, spec["dtype"])
            for path, _ in _manifest_lines(folder)
        ]
        for shard in self.shards:
            expected = self.shards[0].features.shape[1:]
            if shard.features.shape[1:] != expected:
                raise CorruptShardError(
                    f"{shard.path}: a row has shape {shard.features.shape[1:]}, expected"
                    f" {expected} as in {self.shards[0].path.name}; {VERIFY}"
                )
        counts = [len(shard) for shard in self.shards]
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._first_rows = self._starts[:-1].tolist()
        digests = [shard.index["key_digests"] for shard in self.shards]
        self._digests = np.concatenate(digests) if digests else np.zeros((0, 2), np.uint64)
        self._order = np.argsort(self._digests[:, 0], kind="stable")
        self._sorted = self._digests[self._order, 0]
        self._checked = bytearray(len(self))
        # A photo that changed and then failed: the features of its old bytes are stale.
        quarantine = read_quarantine(folder, with_lost=True)
        stale = [key for key, entry in quarantine.items() if entry["source_digest"]]
        self._stale = set(self._find(stale).tolist()) - {-1}

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def quantised(self) -> bool:
        """Whether `gather` gives int8 levels, which `gather_scales` has the scales of."""
        return bool(self.spec["dtype"] == QUANTISED)

    def lookup(self, keys: Sequence[str] | NDArray[Any]) -> IntArray:
        """Find rows by key.

        Args:
            keys: Image ids, or sentences; repeats allowed.

        Returns:
            int64 of shape (len(keys),): store positions, -1 where absent. A
            photo that changed and can no longer be decoded is absent too.
        """
        positions = self._find(keys)
        if self._stale:
            positions = np.where(np.isin(positions, list(self._stale)), -1, positions)
        return positions

    def _find(self, keys: Sequence[str] | NDArray[Any]) -> IntArray:
        if not len(keys) or not len(self):
            return np.full(len(keys), -1, np.int64)
        wanted = digest_keys(keys)
        # The last of equal digests is the newest row: the sort is stable.
        slots = np.searchsorted(self._sorted, wanted[:, 0], side="right") - 1
        positions = self._order[slots]
        found = (slots >= 0) & (self._digests[positions] == wanted).all(axis=1)
        return np.where(found, positions, -1)

    def locate(self, positions: IntArray) -> tuple[IntArray, IntArray]:
        """Return shard numbers and rows inside them, both int64 of shape (batch,).

        Raises:
            IndexError: A position is outside [0, len(self)).
        """
        positions = self._in_range(positions)
        shards = np.searchsorted(self._starts, positions, side="right") - 1
        return shards, positions - self._starts[shards]

    def newest(self) -> IntArray:
        """Return the position of each key's newest row, ascending; the others are superseded."""
        order = np.lexsort((self._digests[:, 1], self._digests[:, 0]))
        digests = self._digests[order]
        last = np.ones(len(order), bool)
        last[:-1] = (digests[1:] != digests[:-1]).any(axis=1)
        return np.sort(order[last])

    def live(self) -> IntArray:
        """Return the positions that `lookup` can give, ascending."""
        newest = self.newest()
        return newest[~np.isin(newest, list(self._stale))] if self._stale else newest

    def keys(self) -> list[str]:
        """Return every key in store order, superseded rows included."""
        return [key for shard in self.shards for key in shard.keys()]  # noqa: SIM118

    def _in_range(self, positions: IntArray) -> IntArray:
        """Return positions as int64; raise IndexError where one is outside [0, len(self))."""
        positions = np.asarray(positions, np.int64)
        if positions.size:
            self._check_range(int(positions.min()), int(positions.max()))
        return positions

    def _check_range(self, least: int, greatest: int) -> None:
        if least < 0 or greatest >= len(self):
            raise IndexError(f"positions must lie in [0, {len(self)})")

    def _places(self, positions: IntArray) -> list[tuple[int, int]]:
        """Return shard and row of each position, after checking rows that were never read.

        In lists: for a batch, arrays would take a tenth as long as copying it.

        Raises:
            IndexError: A position is outside [0, len(self)).
            CorruptShardError: A row no longer has its checksum.
        """
        wanted: list[int] = positions.tolist()
        if not wanted:
            return []
        self._check_range(min(wanted), max(wanted))
        first_rows = self._first_rows
        places = [
            (shard := bisect_right(first_rows, position) - 1, position - first_rows[shard])
            for position in wanted
        ]
        if not all(map(self._checked.__getitem__, wanted)):
            self._check_rows(wanted, places)
        return places

    def _check_rows(self, positions: list[int], places: list[tuple[int, int]]) -> None:
        """Check the checksum of each row that is read for the first time."""
        for position, (shard, row) in zip(positions, places, strict=True):
            if not self._checked[position]:
                self.shards[shard].check_row(row)
                self._checked[position] = True


class VisionStore(Store):
    """Image features: `(views, tokens, width)` a row."""

    def __init__(self, folder: Path, spec: dict[str, Any]) -> None:
        super().__init__(folder, spec)
        # Sliced once, to rows that `concatenate` joins: for a batch of 32, slicing each row and
        # copying it by a call of its own would cost a tenth of the copy.
        self._plain_views = [shard.features[:, :1] for shard in self.shards]
        self._plain_scales = [
            shard.scales[:, 0] for shard in self.shards if shard.scales is not None
        ]

    @functools.cached_property
    def row_shape(self) -> tuple[int, int]:
        """(tokens, width) of one view."""
        return self.shards[0].features.shape[2:]

    def source_digests(self, positions: IntArray) -> NDArray[np.uint64]:
        """Return the digests of the files that rows were made from, (batch, 2)."""
        shards, rows = self.locate(positions)
        pairs = zip(shards, rows, strict=True)
        found = [self.shards[s].index["source_digests"][r] for s, r in pairs]
        return np.array(found, np.uint64).reshape(-1, 2)

    def empty(self, rows: int) -> NDArray[Any]:
        """Return an uninitialised batch that `gather` fills at full speed.

        Returns:
            Stored dtype, shape (rows, tokens, width), aligned to 64 bytes.
        """
        return aligned_empty((rows, *self.row_shape), self.dtype)

    def will_need(self, positions: IntArray) -> None:
        """Let the system read rows from the disk, many at once, before they are gathered.

        Does not wait for the disk. `gather` does this for the rows of a batch
        that it reads for the first time; a reader that knows its next batches
        can do it some batches ahead.

        Args:
            positions: int64 of shape (batch,). Store positions; repeats allowed.

        Raises:
            IndexError: A position is outside [0, len(self)).

        Cost: some microseconds a row where it is in memory already.
        """
        shards, rows = self.locate(positions)
        if not hasattr(os, "posix_fadvise"):
            return  # macOS and Windows: the map still reads, page by page
        for number in np.unique(shards).tolist():
            shard = self.shards[number]
            parts = [(shard.features_offset, shard.features[0].nbytes)]
            if shard.scales is not None:
                parts.append((shard.scales_offset, shard.scales[0].nbytes))
            # Only a hint: a file that cannot be opened any more is still mapped.
            with contextlib.suppress(OSError), shard.path.open("rb") as file:
                for row in rows[shards == number].tolist():
                    for offset, row_bytes in parts:
                        start = offset + row * row_bytes
                        os.posix_fadvise(file.fileno(), start, row_bytes, os.POSIX_FADV_WILLNEED)

    def gather(self, positions: IntArray, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Copy feature rows in the order of `positions`.

        Args:
            positions: int64 of shape (batch,). Store positions; repeats allowed.
            out: Stored dtype, shape (batch, tokens, width), to fill, best
                made by `empty`; or None to allocate.

        Returns:
            Stored dtype, shape (batch, tokens, width): view 0. int8 are
            levels, to be multiplied by `gather_scales`.

        Raises:
            IndexError: A position is outside [0, len(self)).
            ValueError: `out` has another shape or dtype.
            CorruptShardError: A row no longer has its checksum.

        Cost: one memory copy of the rows, and one pass of the checksum the
        first time that a row is read; no HDF5 call.
        """
        positions = np.asarray(positions, np.int64)
        if out is None:
            out = self.empty(len(positions))
        elif out.shape != (len(positions), *self.row_shape) or out.dtype != self.dtype:
            raise ValueError(
                f"out is {out.dtype} {out.shape}, expected {self.dtype}"
                f" {(len(positions), *self.row_shape)}"
            )
        if rows := [self._plain_views[shard][row] for shard, row in self._places(positions)]:
            np.concatenate(rows, out=out)
        return out

    def _check_rows(self, positions: list[int], places: list[tuple[int, int]]) -> None:
        self.will_need(np.array([p for p in positions if not self._checked[p]]))
        super()._check_rows(positions, places)

    def gather_scales(self, positions: IntArray) -> NDArray[np.float32]:
        """Copy the scales of int8 rows in the order of `positions`.

        Args:
            positions: int64 of shape (batch,). Store positions; repeats allowed.

        Returns:
            float32 of shape (batch, tokens): one level of each token of view 0.

        Raises:
            IndexError: A position is outside [0, len(self)).
            CorruptShardError: A row no longer has its checksum.
        """
        positions = np.asarray(positions, np.int64)
        scales = np.empty((len(positions), self.row_shape[0]), SCALE_DTYPE)
        for i, (shard, row) in enumerate(self._places(positions)):
            scales[i] = self._plain_scales[shard][row]
        return scales


class TextStore(Store):
    """Sentence features: `(valid tokens, width)` a row, packed."""

    def __init__(self, folder: Path, spec: dict[str, Any]) -> None:
        super().__init__(folder, spec)
        lengths = [np.diff(shard.index["offsets"]) for shard in self.shards]
        self._lengths = np.concatenate(lengths) if lengths else np.zeros(0, np.int64)

    @property
    def width(self) -> int:
        """Width of a hidden state."""
        return int(self.shards[0].features.shape[1])

    def lengths(self, positions: IntArray) -> IntArray:
        """Return the number of valid tokens of rows, int64 of shape (batch,).

        Raises:
            IndexError: A position is outside [0, len(self)).
        """
        return self._lengths[self._in_range(positions)]

    def gather(self, positions: IntArray, length: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Copy sentences, padded with zeros to one length.

        Args:
            positions: int64 of shape (batch,). Store positions; repeats allowed.
            length: Tokens of the result. 1 gives the `[CLS]` states alone; a
                sentence longer than `length` is otherwise an error.

        Returns:
            Hidden states in the stored dtype, shape (batch, length, width),
            and the padding mask, bool of shape (batch, length), True at valid
            tokens. int8 are levels, to be multiplied by `gather_scales`.

        Raises:
            IndexError: A position is outside [0, len(self)).
            ValueError: A sentence is longer than `length`.
            CorruptShardError: A row no longer has its checksum.
        """
        positions = np.asarray(positions, np.int64)
        valid = self.lengths(positions)
        if length > 1 and valid.size and valid.max() > length:
            raise ValueError(f"a sentence has {valid.max()} tokens, more than {length}")
        hidden = np.zeros((len(positions), length, self.width), self.dtype)
        for i, (shard, row) in enumerate(self._places(positions)):
            part = self.shards[shard]
            start = part.index["offsets"][row]
            count = min(int(valid[i]), length)
            hidden[i, :count] = part.features[start : start + count]
        return hidden, np.arange(length) < valid[:, None]

    def gather_scales(self, positions: IntArray, length: int) -> NDArray[np.float32]:
        """Copy the scales of int8 sentences, padded with zeros to one length.

        Args:
            positions: int64 of shape (batch,). Store positions; repeats allowed.
            length: As in `gather`; of a longer sentence, the first scales.

        Returns:
            float32 of shape (batch, length): one level of each token.

        Raises:
            IndexError: A position is outside [0, len(self)).
            CorruptShardError: A row no longer has its checksum.
        """
        positions = np.asarray(positions, np.int64)
        scales = np.zeros((len(positions), length), SCALE_DTYPE)
        for i, (shard, row) in enumerate(self._places(positions)):
            part = self.shards[shard]
            assert part.scales is not None
            start, end = part.index["offsets"][row : row + 2]
            count = min(int(end - start), length)
            scales[i, :count] = part.scales[start : start + count]
        return scales


def open_store(root: Path, spec: FeatureSpec, command: str) -> Any:
    """Open the features of a spec.

    Args:
        root: The store's root.
        spec: What the configuration asks for.
        command: What the user types to extract them, for the error.

    Returns:
        A `VisionStore` or a `TextStore`.

    Raises:
        MissingFeaturesError: Nothing of this kind was ever extracted.
        StaleFeaturesError: Only features of other specs are there; the
            message lists the fields in which the nearest differs.
        CorruptShardError: The folder is damaged.
    """
    folder = spec.folder(root)
    if shard_paths(folder):
        found = read_spec(folder)
        if canonical_json(found) != canonical_json(spec.to_dict()):
            raise CorruptShardError(f"{folder}: holds another spec than its name says")
        return (VisionStore if spec.kind == "vit" else TextStore)(folder, found)
    others = []
    for path in sorted((root / spec.kind).glob("*/spec.json")):
        # Another folder's damage must not hide what is wrong with this one.
        with contextlib.suppress(StoreError):
            if shard_paths(path.parent):
                others.append(differing_fields(spec.to_dict(), read_spec(path.parent)))
    if not others:
        raise MissingFeaturesError(
            f"{root}: no {spec.kind} features have been extracted; run `{command}`"
        )
    nearest = min(others, key=len)
    raise StaleFeaturesError(
        f"{root}: the {spec.kind} features there do not match the configuration"
        f" ({'; '.join(nearest)}); run `{command}`"
    )
