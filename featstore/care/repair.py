"""Advice what `verify` finds, without losing what is intact.

A shard is immutable, so a damaged one is replaced whole: its intact rows are
kept as they are, the damaged ones are computed again from their photo or
sentence, and the result is published under the same name with the rows in the
same order. The encoder runs in batches of
`encode_batch_size`, as in extraction, but with other neighbours: a kernel may
round differently at another place in the batch or with another batch size. The
row's stored checksum tells whether the same bits came back, and they are
counted. A row whose photo has changed since is left out.

A shard that cannot be read, or is gone, is dropped, and what the
configuration's rows need of it is extracted again in the ordinary way.

Kill-safe: the manifest gives up a shard's line before the shard is replaced
and takes it back after, and a shard that it does not list is still checked by
its own checksums. A kill after a shard was dropped leaves its rows missing, which the
extraction's command brings. Where a dropped row is newer than another of the same photo,
the older one must not come back to life: it is marked as lost first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from featstore.care.info import KINDS, Source, feature_folders, matching_spec
from featstore.care.verify import FolderReport, Problem, verify_folder
from featstore.encoders.spec import TextSpec, VisionSpec, differing_fields
from featstore.encoders.tower import TextEncoder, VisionEncoder
from featstore.errors import Advice, Command, FeatstoreError, StoreError
from featstore.extract.extract import (
    Batched,
    ProgressBar,
    encode_photos,
    encode_sentences,
    extract_images,
    extract_text,
    no_progress,
    text_batches,
    writing,
)
from featstore.extract.plan import Plan, photo_digest, plan_images, plan_text
from featstore.store.folder import (
    LOST,
    read_manifest,
    read_spec,
    reconcile_manifest,
    salvage_quarantine,
    shard_paths,
    write_manifest,
    write_quarantine,
    write_spec,
)
from featstore.store.shard import Shard, open_shard
from featstore.store.write import rewrite_shard

ACTIONS = {
    "spec": "write it again from the configuration",
    "manifest": "rebuild it from the shards; photos that are newer than their rows are left out",
    "quarantine": "rebuild it; inputs that failed are tried again by the next extraction",
    "missing shard": "drop it and extract again what the configuration's rows need",
    "unreadable shard": "drop it and extract again what the configuration's rows need",
    "other shape": "drop it and extract again what the configuration's rows need",
    "unlisted shard": "take it into the manifest",
    "damaged rows": "compute the damaged rows again",
    "damaged bytes": "write the shard again from its rows",
    "repeated keys": "keep the last row of each key",
}
DROPPED = ("missing shard", "unreadable shard", "other shape")
REWRITTEN = ("damaged rows", "damaged bytes", "repeated keys")
NEEDS_ENCODER = ("spec", "quarantine", "damaged rows", *DROPPED)


@dataclass
class RepairReport:
    """What was done to one feature folder, or would be.

    Attributes:
        folder: Of the features.
        actions: One line for each problem.
        restored: Rows computed again.
        identical: How many of them have their old checksum, bit for bit.
        dropped: Keys of rows that could not be kept, as far as they can be told.
        extracted: Rows that the ordinary extraction then added.
        failed: Key to reason, of inputs that it could not encode.
        left: Why something could not be mended.
    """

    folder: Path
    actions: list[str] = field(default_factory=list)
    restored: int = 0
    identical: int = 0
    dropped: list[str] = field(default_factory=list)
    extracted: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    left: list[StoreError] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-able."""
        return {**vars(self), "folder": str(self.folder), "left": list(map(str, self.left))}


def _no_match(folder: Path, source: Source) -> StoreError:
    """Say which configuration a folder's repair needs."""
    kind = folder.parent.name
    try:
        fields = differing_fields(source.asked[kind].to_dict(), read_spec(folder))
        differs = f" ({'; '.join(fields)})"
    except StoreError:
        differs = ""
    return StoreError(
        f"{folder}: the configuration's encoder cannot make these features again{differs}",
        Advice(
            f"give the --{kind} and --config that they were extracted with, or remove them with ",
            Command("store", "gc"),
        ),
    )


class _Repair:
    """The repair of one folder; its lock is held."""

    def __init__(self, report: FolderReport, source: Source) -> None:
        self.folder = report.folder
        self.problems = report.problems
        self.source = source
        self.result = RepairReport(report.folder)
        # Nothing is known of a file that may not be read: it must not be replaced.
        self.result.left += [
            StoreError(f"{problem.path}: {problem.detail}", problem.mend)
            for problem in self.of("no access")
        ]
        needed = self.of(*NEEDS_ENCODER)
        self.spec = None
        if needed:
            self.spec = matching_spec(source, report.folder)
        elif self.of("manifest"):
            # Not needed to rebuild it, only to tell which rows may be stale.
            with contextlib.suppress(FeatstoreError):
                self.spec = matching_spec(source, report.folder)
        if needed and self.spec is None:
            self.result.left.append(_no_match(report.folder, source))
        bad = {problem.path.name for problem in report.problems}
        self.lines = {
            line["name"]: line
            for line in read_manifest(report.folder)
            if line["name"] not in bad and (report.folder / line["name"]).exists()
        }
        # Until they are dropped, the manifest goes on to list them: the store stays refused.
        self.condemned = {
            line["name"]: line
            for line in read_manifest(report.folder)
            if line["name"] not in self.lines
        }

    def of(self, *whats: str) -> list[Problem]:
        return [problem for problem in self.problems if problem.what in whats]

    def publish_manifest(self) -> None:
        lines = {**self.condemned, **self.lines}
        write_manifest(self.folder, self.folder.name, [lines[name] for name in sorted(lines)])

    def open(self, path: Path, private: bool = False) -> Shard:
        dtype = self.spec.dtype if self.spec is not None else str(read_spec(self.folder)["dtype"])
        return open_shard(path, self.folder.parent.name, self.folder.name, dtype, private)

    def protect(
        self, keys: Set[str] | None, without: Set[Path], rows: Set[int] = frozenset()
    ) -> None:
        """Mark photos as lost whose newest row that stays is stale.

        Args:
            keys: Whose newest row may go; None where that cannot be told.
            without: Shards that go.
            rows: Where one shard goes only in part: the rows that go.
        """
        if not isinstance(self.spec, VisionSpec):
            return
        newest: dict[str, tuple[int, int]] = {}
        for path in shard_paths(self.folder):
            if path in without and not rows:
                continue
            try:
                shard = self.open(path)
            except StoreError:
                continue
            digests = shard.index["source_digests"].tolist()
            for row, (key, digest) in enumerate(zip(shard.keys(), digests, strict=True)):
                if (keys is None or key in keys) and not (path in without and row in rows):
                    newest[key] = tuple(digest)
        entries = salvage_quarantine(self.folder)
        index = self.source.dataset.images
        paths = [index.lookup(key) for key in newest]
        with ThreadPoolExecutor(max(4, self.source.store.decode_threads)) as pool:
            found = list(pool.map(lambda path: path and photo_digest(path), paths))
        for (key, digest), now in zip(newest.items(), found, strict=True):
            known = now is not None or keys is not None
            if known and now != digest and not entries.get(key, {}).get("source_digest"):
                entries[key] = {
                    "reason": "its newest features were damaged; extract it again",
                    "source_digest": LOST,
                }
        if entries or (self.folder / "quarantine.json").exists():
            write_quarantine(self.folder, entries)

    def restore(self, shard: Shard, rows: Sequence[int], bar: ProgressBar) -> set[int]:
        """Compute rows again, into the shard's private features; return those that succeeded."""
        if not rows:
            return set()
        with bar(len(rows)) as progress:
            if isinstance(self.spec, VisionSpec):
                restored = self._restore_photos(shard, rows, self.spec, progress)
            else:
                assert self.spec is not None
                restored = self._restore_sentences(shard, rows, self.spec, progress)
        self.result.restored += len(restored)
        self.result.identical += sum(shard.row_is_intact(row) for row in restored)
        return restored

    def _restore_photos(
        self, shard: Shard, rows: Sequence[int], spec: VisionSpec, progress: Callable[[int], None]
    ) -> set[int]:
        keys, index = shard.keys(), self.source.dataset.images
        paths = [(str(row), index.lookup(keys[row])) for row in rows]
        photos = [(name, path) for name, path in paths if path is not None]
        encoder = self.vision_encoder(spec)
        batched = Batched(encoder, self.source.store.encode_batch_size, lambda size: None)
        restored = set()
        for item in encode_photos(photos, encoder, batched, self.source.store, spec.dtype):
            progress(1)
            row = int(item.key)
            same = item.digest == tuple(shard.index["source_digests"][row].tolist())
            if same and item.features is not None:
                shard.features[row, 0] = item.features
                restored.add(row)
        return restored

    def _restore_sentences(
        self, shard: Shard, rows: Sequence[int], spec: TextSpec, progress: Callable[[int], None]
    ) -> set[int]:
        keys, store = shard.keys(), self.source.store
        encoder = self.text_encoder(spec)
        batched = text_batches(encoder, spec, store)
        restored = set()
        items = encode_sentences([keys[row] for row in rows], encoder, batched, store, spec.dtype)
        for row, item in zip(rows, items, strict=True):
            progress(1)
            a, b = shard.index["offsets"][row : row + 2].tolist()
            same = np.array_equal(item.token_ids, shard.index["token_ids"][a:b])
            if same and item.features is not None:
                shard.features[a:b] = item.features
                restored.add(row)
        return restored

    def vision_encoder(self, spec: VisionSpec) -> VisionEncoder:
        return self.source.vision_encoder(spec.tokens, spec.precision)

    def text_encoder(self, spec: TextSpec) -> TextEncoder:
        return self.source.text_encoder(spec.precision)

    def rewrite(self, path: Path, bar: ProgressBar) -> None:
        """Replace a shard whose index can be read."""
        shard = self.open(path, private=True)
        damaged = [
            row
            for problem in self.of("damaged rows")
            for row in problem.rows
            if problem.path == path
        ]
        repeated = {
            row
            for problem in self.of("repeated keys")
            for row in problem.rows
            if problem.path == path
        }
        restored = self.restore(shard, damaged, bar)
        gone = (set(damaged) - restored) | repeated
        keys = shard.keys()
        dropped = {keys[row] for row in set(damaged) - restored}
        if dropped:
            self.result.dropped += sorted(dropped)
            self.protect(dropped, {path}, gone)
        keep = np.array(sorted(set(range(len(shard))) - gone), np.int64)
        self.condemned.pop(path.name, None)
        self.publish_manifest()
        if len(keep):
            self.lines[path.name] = rewrite_shard(shard, keep, restored)
        else:
            path.unlink()
        self.publish_manifest()

    def drop(self) -> bool:
        """Drop the shards that cannot be read; return whether all their keys are known."""
        lost = self.of(*DROPPED)
        if not lost:
            return True
        known = all(problem.keys and problem.what == "other shape" for problem in lost)
        keys = {key for problem in lost for key in problem.keys}
        self.protect(keys if known else None, {problem.path for problem in lost})
        self.condemned.clear()
        self.publish_manifest()
        for problem in lost:
            problem.path.unlink(missing_ok=True)
        self.result.dropped += sorted(keys)
        return known

    def extract(self, keys: Sequence[str] | None, bar: ProgressBar) -> None:
        """Extract what is missing of some keys; None: of all that the rows ask for."""
        source, spec = self.source, self.spec
        plan: Plan
        if isinstance(spec, VisionSpec):
            ids = source.keys("vit")
            wanted = ids if keys is None else sorted(set(keys) & set(ids))
            plan = plan_images(spec, source.store, wanted, source.dataset.images)
        else:
            assert spec is not None
            wanted = source.keys("text") if keys is None else list(keys)
            plan = plan_text(spec, source.store, wanted)
        if not plan.keys:
            return
        plan.check_space()
        with bar(len(plan.keys)) as progress:
            if isinstance(spec, VisionSpec):
                encoder = self.vision_encoder(spec)
                summary = extract_images(plan, encoder, source.store, source.encoders.vit, progress)
            else:
                summary = extract_text(
                    plan, self.text_encoder(spec), source.store, source.encoders.text, progress
                )
        self.result.extracted += summary.extracted
        self.result.failed |= summary.failed

    def planned(self) -> RepairReport:
        """Say what `run` would do."""
        if not self.result.left:
            self.result.actions = [
                f"{problem.path}: {problem.what}: {ACTIONS[problem.what]}"
                for problem in self.problems
            ]
        return self.result

    def run(self, bar: ProgressBar) -> RepairReport:
        """Advice everything, in an order in which a kill never makes it worse.

        Raises:
            StoreError: A folder stands in a shard's place; nothing was changed.
        """
        if self.planned().left:
            return self.result
        for problem in self.of(*DROPPED):
            if problem.path.is_dir():
                raise StoreError(
                    f"{problem.path}: a folder in a shard's place; move it away, then run"
                    " the command again"
                )
        if self.of("spec") and self.spec is not None:
            encoders = self.source.encoders
            name = encoders.vit if self.spec.kind == "vit" else encoders.text
            write_spec(self.folder, self.spec, {"preset": name})
        if self.of("quarantine"):
            self.mend_quarantine()
        if self.of("manifest"):
            self.mark_stale()
        for path in sorted({problem.path for problem in self.of(*REWRITTEN)}):
            if path not in {problem.path for problem in self.of(*DROPPED)}:
                self.rewrite(path, bar)
        known = self.drop()
        if self.of("manifest"):
            self.lines.clear()
        self.condemned.clear()
        self.publish_manifest()
        write_manifest(self.folder, self.folder.name, reconcile_manifest(self.folder))
        if self.of(*DROPPED) or self.result.dropped:
            # Of an unreadable or missing shard, keys may be lost that nothing names.
            self.extract(sorted(self.result.dropped) if known else None, bar)
        return self.result

    def mark_stale(self) -> None:
        """Mark the photos whose newest row went with a shard that nothing names any more."""
        try:
            self.protect(None, frozenset())
        except FeatstoreError as error:
            self.result.actions.append(f"{self.folder}: photos could not be compared ({error})")

    def mend_quarantine(self) -> None:
        """Keep the sound entries; mark the photos whose stored features are stale."""
        self.protect(None, frozenset())
        write_quarantine(self.folder, salvage_quarantine(self.folder))


def repair_folder(
    folder: Path, source: Source, bar: ProgressBar = no_progress, dry_run: bool = False
) -> RepairReport:
    """Advice one feature folder.

    Args:
        folder: Of the features.
        source: The configuration: what the damaged rows are computed with.
        bar: Makes a progress display for a number of rows.
        dry_run: Say what would be done; change nothing.

    Returns:
        What was done. Its `left` is not empty where another configuration is
        needed or a file may not be read; nothing was changed then.

    Raises:
        StoreError: The folder cannot be written, or the disk is full.

    Cost: one full check, and a second one under the folder's lock where
    something is damaged.
    """
    report = verify_folder(folder)
    if not report.problems:
        return RepairReport(folder)
    # The lock of a folder that may not even be listed cannot be taken.
    if dry_run or any(problem.what == "no access" for problem in report.problems):
        return _Repair(report, source).planned()
    with writing(folder):
        # Again: another process may have changed the folder before the lock was ours.
        return _Repair(verify_folder(folder), source).run(bar)


def repair_store(
    source: Source,
    kinds: Sequence[str] = KINDS,
    bar: ProgressBar = no_progress,
    dry_run: bool = False,
) -> list[RepairReport]:
    """Advice the feature folders of a store; see `repair_folder`."""
    return [
        repair_folder(folder, source, bar, dry_run)
        for folder in feature_folders(source.root, kinds)
    ]
