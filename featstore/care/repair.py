"""Mend what `verify` finds, without losing what is intact.

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
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from featstore.care.info import feature_folders, matching_spec
from featstore.care.report import FolderReport, Problem
from featstore.care.verify import verify_folder
from featstore.encoders.spec import VisionSpec, differing_fields
from featstore.errors import Advice, Command, FeatstoreError, StoreError
from featstore.extract.claims import writing
from featstore.extract.encode import encoding_of
from featstore.extract.extract import extract_alone
from featstore.extract.photos import photo_digests
from featstore.extract.plan import KINDS, Job, make_plan
from featstore.progress import SILENT, Progress, Show
from featstore.project import Project
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


def _no_match(folder: Path, project: Project) -> StoreError:
    """Say which configuration a folder's repair needs."""
    kind = folder.parent.name
    try:
        fields = differing_fields(project.spec(kind).to_dict(), read_spec(folder))
        differs = f" ({'; '.join(fields)})"
    except StoreError:
        differs = ""
    return StoreError(
        f"{folder}: the configuration's encoder cannot make these features again{differs}",
        Advice(
            f"give the --{kind} and --config that they were extracted with, or remove them with ",
            Command("store", "gc", without=(f"--{kind}",)),
        ),
    )


class _Repair:
    """The repair of one folder; its lock is held."""

    def __init__(self, report: FolderReport, project: Project, show: Show = SILENT) -> None:
        self.folder = report.folder
        self.problems = report.problems
        self.project, self.show = project, show
        self.result = RepairReport(report.folder)
        # Nothing is known of a file that may not be read: it must not be replaced.
        self.result.left += [
            StoreError(f"{problem.path}: {problem.detail}", problem.mend)
            for problem in self.of("no access")
        ]
        needed = self.of(*NEEDS_ENCODER)
        self.spec = None
        if needed:
            self.spec = matching_spec(project, report.folder)
        elif self.of("manifest"):
            # Not needed to rebuild it, only to tell which rows may be stale.
            with contextlib.suppress(FeatstoreError):
                self.spec = matching_spec(project, report.folder)
        if needed and self.spec is None:
            self.result.left.append(_no_match(report.folder, project))
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
        paths = [self.project.dataset.images.lookup(key) for key in newest]
        found = photo_digests(paths, self.project.config.store.threads)
        for (key, digest), now in zip(newest.items(), found, strict=True):
            known = now is not None or keys is not None
            if known and now != digest and not entries.get(key, {}).get("source_digest"):
                entries[key] = {
                    "reason": "its newest features were damaged; extract it again",
                    "source_digest": LOST,
                }
        if entries or (self.folder / "quarantine.json").exists():
            write_quarantine(self.folder, entries)

    def restore(self, shard: Shard, rows: Sequence[int]) -> set[int]:
        """Compute rows again, into the shard's private features; return those that succeeded."""
        if not rows:
            return set()
        with self.show.bar(len(rows), "rows") as progress:
            restored = self._restore(shard, rows, progress)
        self.result.restored += len(restored)
        self.result.identical += sum(shard.row_is_intact(row) for row in restored)
        return restored

    def _restore(self, shard: Shard, rows: Sequence[int], progress: Progress) -> set[int]:
        spec, keys = self.spec, shard.keys()
        assert spec is not None
        row_of = {keys[row]: row for row in rows}
        names, paths = list(row_of), []
        if isinstance(spec, VisionSpec):
            lookup = self.project.dataset.images.lookup
            found = {key: path for key in names if (path := lookup(key)) is not None}
            names, paths = list(found), list(found.values())
        encoding = encoding_of(spec, self.project.encoder(spec), self.project.config.store)
        restored = set()
        for item in encoding.rows(names, paths):
            progress(1)
            row = row_of[item.key]
            part: Any
            if isinstance(spec, VisionSpec):
                part = (row, 0)
                same = item.digest == tuple(shard.index["source_digests"][row].tolist())
            else:
                part = slice(*shard.index["offsets"][row : row + 2].tolist())
                same = np.array_equal(shard.index["token_ids"][part], np.asarray(item.token_ids))
            if same and item.numbers is not None:
                shard.features[part] = item.numbers
                restored.add(row)
        return restored

    def rewrite(self, path: Path) -> None:
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
        restored = self.restore(shard, damaged)
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

    def extract(self, keys: Sequence[str] | None) -> None:
        """Extract what is missing of some keys; None: of all that the rows ask for."""
        project, spec = self.project, self.spec
        assert spec is not None
        wanted, images = project.keys(spec.kind), None
        if spec.kind == "vit":
            images = project.dataset.images
            wanted = wanted if keys is None else sorted(set(keys) & set(wanted))
        elif keys is not None:
            wanted = list(keys)
        name = project.preset_name(spec.kind)
        job = Job(spec, name, project.config.store, wanted, images, lambda: project.encoder(spec))
        plan = make_plan(job)
        if not plan.keys:
            return
        plan.check_space()
        summary = extract_alone(plan, self.show)
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

    def run(self) -> RepairReport:
        """Mend everything, in an order in which a kill never makes it worse.

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
            write_spec(self.folder, self.spec, {"preset": self.project.preset_name(self.spec.kind)})
        if self.of("quarantine"):
            self.mend_quarantine()
        if self.of("manifest"):
            self.mark_stale()
        for path in sorted({problem.path for problem in self.of(*REWRITTEN)}):
            if path not in {problem.path for problem in self.of(*DROPPED)}:
                self.rewrite(path)
        known = self.drop()
        if self.of("manifest"):
            self.lines.clear()
        self.condemned.clear()
        self.publish_manifest()
        write_manifest(self.folder, self.folder.name, reconcile_manifest(self.folder))
        if self.of(*DROPPED) or self.result.dropped:
            # Of an unreadable or missing shard, keys may be lost that nothing names.
            self.extract(sorted(self.result.dropped) if known else None)
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
    folder: Path, project: Project, show: Show = SILENT, dry_run: bool = False
) -> RepairReport:
    """Mend one feature folder.

    Args:
        folder: Of the features.
        project: The configuration: what the damaged rows are computed with.
        show: How it is shown.
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
        return _Repair(report, project).planned()
    with writing(folder):
        # Again: another process may have changed the folder before the lock was ours.
        return _Repair(verify_folder(folder), project, show).run()


def repair_store(
    project: Project,
    kinds: Sequence[str] = KINDS,
    show: Show = SILENT,
    dry_run: bool = False,
) -> list[RepairReport]:
    """Mend the feature folders of a store; see `repair_folder`."""
    return [
        repair_folder(folder, project, show, dry_run)
        for folder in feature_folders(project.root, kinds)
    ]
