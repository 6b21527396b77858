"""Find what nothing needs any more, and delete it when told to.

Only files that this program writes are ever deleted; anything else is listed.
A process that has mapped a deleted file goes on reading it.

Needed is what this configuration asks for, what the runs given refer to, and what any other
user needs that the store knows of (`featstore/store/users.py`): by its runs where they can be
read from here, else all that was recorded of it, until someone names it to be forgotten.
Features whose users were never recorded are garbage only to one who says so.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from featstore.care.info import disk_bytes, feature_folders, open_folder
from featstore.care.runs import read_runs
from featstore.encoders.presets import DIGESTS_FILE
from featstore.errors import Advice, Command, RunError, StoreError, UsageError, counted
from featstore.extract.claims import CLAIM, writing
from featstore.extract.kernels import RECORDS
from featstore.extract.lengths import LENGTHS
from featstore.extract.photos import FOLDER as PHOTOS
from featstore.extract.plan import KINDS
from featstore.extract.publisher import PLAN
from featstore.extract.speed import SPEEDS_FILE
from featstore.project import Project
from featstore.publish import TEMPORARY
from featstore.store.folder import (
    listed,
    read_spec,
    reconcile_manifest,
    shard_paths,
    write_manifest,
)
from featstore.store.shard import open_shard, shard_number
from featstore.store.users import (
    CONFIGURATION,
    FOLDER,
    RUNS,
    Use,
    User,
    give_up,
    read_uses,
)
from featstore.store.write import rewrite_shard

# The manifest goes first: a folder that is deleted in part is refused until this goes on.
LISTS = ("quarantine.json", "spec.json", LENGTHS, PLAN, ".lock")
ROOT_ENTRIES = (
    *(*KINDS, "splits", "reports", FOLDER, "demo", PHOTOS),
    *(DIGESTS_FILE, SPEEDS_FILE, "README.md", ".gitignore"),
)
# Splits and reports are written without a lock: a younger file may be in the making.
TEMPORARY_SECONDS = 3600.0


@dataclass(frozen=True)
class Garbage:
    """Something that can go.

    Attributes:
        what: "features", "superseded rows", "temporary file", "split" or "report".
        path: File or folder.
        bytes: What deleting it frees; an estimate for superseded rows.
        detail: Why it can go.
    """

    what: str
    path: Path
    bytes: int
    detail: str

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-able."""
        return {**vars(self), "path": str(self.path)}


@dataclass
class Collection:
    """What a store has to spare.

    Attributes:
        garbage: What can go.
        unknown: Files that this program did not write; never deleted.
        users: Who else needs something of the store: `what`, `path`, whether it is `here`, and
            the `features` that are kept for it alone.
        unrecorded: Features that nobody here refers to and whose users were never recorded.
        notes: What could not be judged or is kept, and why; see `Advice`.
        deleted: What of the garbage was deleted.
        kept: What of it was not, and why.
        forgotten: Uses that count no more, and are given up with the deletion.
        root: The store's.
        seen: Records of the users that were asked.
    """

    garbage: list[Garbage] = field(default_factory=list)
    unknown: list[Path] = field(default_factory=list)
    users: list[dict[str, Any]] = field(default_factory=list)
    unrecorded: list[Path] = field(default_factory=list)
    notes: list[Advice] = field(default_factory=list)
    deleted: list[Garbage] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    forgotten: list[Use] = field(default_factory=list)
    root: Path = Path()
    seen: set[Path] = field(default_factory=set)

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-able."""
        return {
            "garbage": [item.to_dict() for item in self.garbage],
            "bytes": sum(item.bytes for item in self.garbage),
            "unknown": [str(path) for path in self.unknown],
            "users": self.users,
            "unrecorded": [str(path) for path in self.unrecorded],
            "notes": [str(note) for note in self.notes],
            "deleted": [item.to_dict() for item in self.deleted],
            "kept": self.kept,
        }


def _is_ours(path: Path) -> bool:
    """Tell whether a file of a feature folder was written by this program."""
    name = path.name
    return path.is_file() and (
        shard_number(path) is not None
        or name in (*LISTS, "manifest.json")
        or name.startswith((TEMPORARY, CLAIM))
        or path.match(RECORDS)
    )


def _superseded(folder: Path) -> dict[Path, list[int]]:
    """Return shard to its rows whose key has a newer row."""
    opened = open_folder(folder)
    older = np.setdiff1d(np.arange(opened.rows), opened.newest())
    shards, rows = opened.locate(older)
    found: dict[Path, list[int]] = {}
    for number, row in zip(shards.tolist(), rows.tolist(), strict=True):
        found.setdefault(opened.shards[number].path, []).append(row)
    return found


def _inside(folder: Path, needed: set[str], recorded: set[str] | None, found: Collection) -> None:
    """Judge one feature folder; `recorded`: digests that ever had a user, None: do not ask."""
    files = listed(folder)
    ours = [path for path in files if _is_ours(path)]
    found.unknown += [path for path in files if path not in ours]
    if folder.name not in needed:
        if recorded is not None and folder.name not in recorded:
            found.unrecorded.append(folder)
            return
        detail = "neither the configuration nor a run refers to it"
        found.garbage.append(Garbage("features", folder, disk_bytes(ours), detail))
        return
    for path in ours:
        if path.name.startswith(TEMPORARY):
            found.garbage.append(
                Garbage("temporary file", path, disk_bytes([path]), "left by a killed writer")
            )
    try:
        for path, rows in _superseded(folder).items():
            shard = open_shard(path, folder.parent.name, folder.name, read_spec(folder)["dtype"])
            freed = path.stat().st_size * len(rows) // max(1, len(shard))
            detail = f"{len(rows)} of {counted(len(shard), 'row')} superseded by a newer one"
            found.garbage.append(Garbage("superseded rows", path, freed, detail))
    except StoreError as error:
        found.notes.append(Advice(f"superseded rows not looked for: {error}"))


def _names_of(digests: set[str]) -> set[str]:
    """Return what features, splits and reports are called: a report by half of its rows' digest."""
    return digests | {digest[:16] for digest in digests}


def _beside(project: Project, needed: set[str], found: Collection) -> None:
    """Judge the splits and the reports."""
    asked_split = asked_report = ""
    if project.has_dataset:
        asked_split = project.dataset.splits_path.name
        asked_report = project.dataset.report.name if project.dataset.report else ""
    known = _names_of(needed)
    now = time.time()
    for kind, pattern, asked in (
        ("split", re.compile(r"([0-9a-f]{32})\.json"), asked_split),
        ("report", re.compile(r"rows-([0-9a-f]{16})\.csv"), asked_report),
    ):
        for path in listed(project.root / f"{kind}s"):
            match = pattern.fullmatch(path.name)
            if path.name.startswith(TEMPORARY) and path.is_file():
                if now - path.stat().st_mtime > TEMPORARY_SECONDS:
                    detail = "left by a killed writer"
                    found.garbage.append(
                        Garbage("temporary file", path, disk_bytes([path]), detail)
                    )
            elif not match or not path.is_file():
                found.unknown.append(path)
            elif path.name != asked and match[1] not in known:
                detail = f"the {kind} of other rows than the configuration's"
                detail += "; no run refers to it"
                found.garbage.append(Garbage(kind, path, disk_bytes([path]), detail))


def _forgotten(uses: Iterable[Use], names: Iterable[str | os.PathLike[str]]) -> set[Path]:
    """Return the records of users that are named by their paths.

    Raises:
        UsageError: Nobody of that path was recorded.
    """
    found = set[Path]()
    for name in names:
        path = os.path.abspath(os.path.expanduser(name))
        named = {use.path for use in uses if use.user.path == path}
        if not named:
            known = sorted({use.user.path for use in uses if not use.forgotten})
            raise UsageError(
                f"--forget {os.fspath(name)}: no such user of this store; recorded are:"
                f" {', '.join(known) or 'none'}"
            )
        found |= named
    return found


def _needs_of(user: User, uses: Iterable[Use]) -> tuple[set[str], bool]:
    """Return what another user needs, and whether it was asked itself.

    Runs that can be read here say what they need; a deleted run needs nothing. What a
    configuration needed once it may need again: only its own `gc` lets go of that.
    """
    if user.what == RUNS and user.is_here:
        with contextlib.suppress(RunError):
            return read_runs(Path(user.path)).digests, True
    return {digest for use in uses for digest in use.digests}, user.is_here and user.what != RUNS


def _why_kept(user: User, is_here: bool, features: list[str], runs: Path) -> Advice:
    """Say whose features are kept, and what to do where the user cannot be found."""
    kept = f"{', '.join(features)}: used by {user}"
    mend = Command("store", "gc", forget=user.path)
    if is_here and user.what == RUNS:
        return Advice(kept)
    if is_here and Path(user.path).exists():
        mend = Command("store", "gc", config=user.path)
        return Advice(f"{kept}; where that needs it no more, ", mend, " gives it up")
    if is_here:
        return Advice(f"{kept}; if nobody needs it there, ", mend, " gives it up")
    another = "there is none, or another one, at that path now, or it cannot be read from here"
    if user.what == RUNS and User(RUNS, str(runs), user.identity).is_here:
        another = f"they were moved to {runs}, or copied"
    return Advice(f"{kept} ({another}); if that is gone for good, ", mend, " gives it up")


def find_garbage(
    project: Project,
    runs: Path,
    forget: Iterable[str | os.PathLike[str]] = (),
    unrecorded: bool = False,
) -> Collection:
    """List what nobody needs; change nothing.

    Args:
        project: The configuration.
        runs: Folder of the runs; may be absent.
        forget: Paths of users, as the store has recorded them, that are gone for good.
        unrecorded: Features whose users were never recorded are garbage too, where neither
            the configuration nor a known run refers to them.

    Raises:
        StoreError: There is no store, or the record of its users cannot be read.
        RunError: What a run or a search refers to cannot be read.
        PresetError: The configuration's fingerprints cannot be computed.
        UsageError: A user to forget is not known.
    """
    folders = feature_folders(project.root)
    uses = read_uses(project.root)
    found = Collection(root=project.root, seen={use.path for use in uses})
    gone = _forgotten(uses, forget)
    found.forgotten = [use for use in uses if use.path in gone and not use.forgotten]
    read = read_runs(runs)
    own = read.digests | project.fingerprints
    here = User(RUNS, os.path.abspath(runs), "")
    of_user: dict[User, list[Use]] = {}
    for use in uses:
        mine = use.user.what == CONFIGURATION and use.user == project.user
        if not (mine or use.forgotten or use.path in gone):
            of_user.setdefault(use.user, []).append(use)
    needed = set(own)
    for user, theirs in sorted(of_user.items()):
        if user.path == here.path and user.what == RUNS and user.is_here:
            # Read already, and its own.
            continue
        digests, is_here = _needs_of(user, theirs)
        needed |= digests
        kept = [f"{p.parent.name}/{p.name}" for p in folders if p.name in digests - own]
        about = {"what": user.what, "path": user.path, "here": is_here, "features": kept}
        if user.path != here.path or not is_here:
            found.users.append(about)
            if kept:
                found.notes.append(_why_kept(user, is_here, kept, runs))
    found.unknown += [
        path for path in sorted(project.root.iterdir()) if path.name not in ROOT_ENTRIES
    ]
    for kind in KINDS:
        found.unknown += [path for path in listed(project.root / kind) if path not in folders]
    recorded = None if unrecorded else {digest for use in uses for digest in use.digests}
    for folder in folders:
        _inside(folder, needed, recorded, found)
    if found.unrecorded:
        names = ", ".join(f"{path.parent.name}/{path.name}" for path in found.unrecorded)
        found.notes.append(
            Advice(
                f"{names}: nothing here refers to it, but it was made before the store kept a"
                " list of its users, so others may need it; if nobody does, ",
                Command("store", "gc", "--unrecorded"),
                " counts it as garbage",
            )
        )
    _beside(project, needed, found)
    for state in read.old_states:
        detail = "of a finished run, which needs it only to be trained for longer"
        found.garbage.append(Garbage("state", state, disk_bytes([state]), detail))
    return found


def _delete_folder(folder: Path) -> None:
    """Delete a feature folder's own files, oldest shard first; the folder too if it is empty."""
    with writing(folder, timeout_seconds=0):
        (folder / "manifest.json").unlink(missing_ok=True)
        for path in shard_paths(folder):
            path.unlink()
        for path in (*(folder / name for name in LISTS), *folder.glob(RECORDS)):
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def compact(folder: Path) -> int:
    """Write the shards of a folder again without their superseded rows.

    A kill leaves every key with its newest row: the manifest gives up a
    shard's line before the shard changes.

    Returns:
        Rows left out.

    Raises:
        StoreError: Another process holds the lock.
        CorruptShardError: A row that stays is damaged; that shard is as it was.
    """
    count = 0
    with writing(folder, timeout_seconds=0):
        kind, dtype = folder.parent.name, read_spec(folder)["dtype"]
        lines = {line["name"]: line for line in reconcile_manifest(folder)}
        for path, rows in _superseded(folder).items():
            shard = open_shard(path, kind, folder.name, dtype)
            keep = np.setdiff1d(np.arange(len(shard)), rows)
            for row in keep.tolist():
                # Before the manifest changes.
                shard.check_row(row)
            lines.pop(path.name)
            write_manifest(folder, folder.name, list(lines.values()))
            if len(keep):
                lines[path.name] = rewrite_shard(shard, keep, frozenset())
            else:
                path.unlink()
            count += len(rows)
            write_manifest(folder, folder.name, reconcile_manifest(folder))
    return count


def _asked_for_since(found: Collection, item: Garbage) -> bool:
    """Return whether a user needs it who was recorded after the garbage was looked for."""
    if item.what not in ("features", "split", "report"):
        return False
    news = [u for u in read_uses(found.root) if u.path not in found.seen and not u.forgotten]
    names = _names_of({digest for use in news for digest in use.digests})
    return item.path.stem.removeprefix("rows-") in names


def delete(found: Collection) -> None:
    """Delete the garbage that was found; what another process is using stays.

    So does what another command asked for meanwhile.

    Args:
        found: From `find_garbage`; its `deleted` and `kept` are filled.
    """
    for use in found.forgotten:
        try:
            give_up(use)
        except OSError as error:
            found.kept.append(f"{use.path}: {error}")
    for item in found.garbage:
        folder = item.path.parent
        try:
            if _asked_for_since(found, item):
                raise StoreError("asked for by a command that began meanwhile")
            if item.what == "features":
                _delete_folder(item.path)
            elif item.what == "superseded rows":
                compact(folder)
            elif item.what == "temporary file" and folder.parent.name in KINDS:
                # Under the lock no writer is at work: its leftovers are removed then.
                with writing(folder, timeout_seconds=0):
                    pass
            else:
                item.path.unlink(missing_ok=True)
        except (StoreError, OSError) as error:
            found.kept.append(f"{item.path}: {error}")
        else:
            found.deleted.append(item)
