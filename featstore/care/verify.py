"""Find what is damaged in a store, and name it.

A full check reads every file once. The manifest keeps a digest of each
shard's bytes, so that no byte is left out; the checksum of each row and of the
index, which are in the shard itself, then tell which part it is. Where the
manifest was lost, these still cover every number that is ever returned.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash

from featstore.care.info import feature_folders
from featstore.care.report import FolderReport, Problem
from featstore.care.sources import compare_sources, extract_again
from featstore.errors import Advice, Command, CorruptShardError, StoreError, counted
from featstore.extract.plan import KINDS
from featstore.progress import SILENT, Progress, Show
from featstore.project import Project
from featstore.publish import TEMPORARY, read_json
from featstore.store.folder import (
    manifest_damage,
    read_manifest,
    read_quarantine,
    read_spec,
    shard_paths,
)
from featstore.store.shard import (
    HDF5_ERRORS,
    MAKE_READABLE,
    Shard,
    digest_keys,
    open_shard,
    salvage_keys,
    shard_number,
)

LISTS = ("spec.json", "manifest.json", "quarantine.json")
BLOCK_BYTES = 4 << 20


def blocks_of(folder: Path) -> int:
    """Return the 4 MiB blocks that a full check of a folder reads."""
    try:
        files = [path for path in shard_paths(folder) if path.is_file()]
    except (StoreError, OSError):
        return 0  # to be reported as not to be read
    return sum(-(-path.stat().st_size // BLOCK_BYTES) for path in files)


def folder_dtype(folder: Path) -> str:
    """Return the stored dtype of a folder; where its spec is lost, as its shards say.

    Raises:
        CorruptShardError: Neither says it.
    """
    try:
        return str(read_spec(folder)["dtype"])
    except StoreError:
        for path in filter(Path.is_file, shard_paths(folder)):
            try:
                with h5py.File(path, "r", locking=False) as file:
                    return str(file.attrs["dtype"])
            except HDF5_ERRORS:
                continue
        raise


def _short(error: StoreError, path: Path) -> str:
    """Return an error without its path and without its remedy."""
    return error.message.removeprefix(f"{path}: ")


def _check_bytes(
    path: Path, shard: Shard | None, on_block: Callable[[int], None]
) -> tuple[str, int, list[int]]:
    """Read a file once; return its digest, its size and the damaged rows.

    A row is compared right after its bytes were read: its pages are in memory,
    and a bad sector of the disk was met by `read`, which reports it, and not
    by the map, which would end the process.
    """
    state, size, row = xxhash.xxh3_128(), 0, 0
    ends = shard.row_ends() if shard is not None else np.zeros(0, np.int64)
    damaged = []
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            state.update(block)
            size += len(block)
            while shard is not None and row < len(ends) and ends[row] <= size:
                if not shard.row_is_intact(row):
                    damaged.append(row)
                row += 1
            on_block(1)
    return state.hexdigest(), size, damaged


def _repeated_rows(shard: Shard) -> list[int]:
    """Return the rows whose key stands again further down in the same shard."""
    last = {tuple(pair): row for row, pair in enumerate(shard.index["key_digests"].tolist())}
    return sorted(set(range(len(shard))) - set(last.values()))


def _check_shard(
    path: Path,
    line: dict[str, Any] | None,
    dtype: str,
    report: FolderReport,
    on_block: Callable[[int], None],
) -> tuple[Shard | None, str]:
    """Check one shard whole; return it, if it can be read, and its digest."""
    folder = report.folder
    shard, reason, keys = None, "", list[str]()
    try:
        shard = open_shard(path, folder.parent.name, folder.name, dtype)
        keys = shard.keys()
        if not np.array_equal(digest_keys(keys), shard.index["key_digests"]):
            raise CorruptShardError("the keys do not have their digests")
    except StoreError as error:
        shard, reason = None, _short(error, path)
    if not path.is_file():
        report.problems.append(Problem("unreadable shard", path, reason))
        return None, ""
    try:
        digest, size, damaged = _check_bytes(path, shard, on_block)
    except OSError as error:
        shard, reason, digest, size, damaged = None, error.strerror or str(error), "", 0, []
    if line is not None and line["bytes"] != size:
        reason = f"{size} bytes, the manifest says {line['bytes']}" + (reason and f"; {reason}")
    if shard is None:
        keys = keys or salvage_keys(path)
        known = f"; {len(keys)} of its keys can be told" if keys else ""
        report.problems.append(Problem("unreadable shard", path, reason + known, keys=tuple(keys)))
        return None, digest
    report.rows += len(shard)
    report.checked_rows += len(shard)
    if damaged:
        named = tuple(keys[row] for row in damaged)
        detail = f"{len(damaged)} of {counted(len(shard), 'row')} with another checksum than stored"
        report.problems.append(Problem("damaged rows", path, detail, tuple(damaged), named))
    elif line is not None and line.get("digest") != digest:
        detail = reason or "every row and the index are intact, bytes around them are not"
        report.problems.append(Problem("damaged bytes", path, detail))
    elif (
        line is not None
        and line.get("rows") != len(shard)
        and not any(problem.what == "manifest" for problem in report.problems)
    ):
        detail = (
            f"{path.name} has {counted(len(shard), 'row')}, the manifest says {line.get('rows')}"
        )
        report.problems.append(Problem("manifest", folder / "manifest.json", detail))
    repeated = _repeated_rows(shard)
    if repeated:
        named = tuple(keys[row] for row in repeated)
        detail = f"{counted(len(repeated), 'row')} with a key that stands again in this shard"
        report.problems.append(Problem("repeated keys", path, detail, tuple(repeated), named))
    return shard, digest


def _no_access(folder: Path) -> list[Problem]:
    """Find the files of a folder that cannot be opened.

    That is no damage: what is in them may be whole, and must not be replaced.
    """
    try:
        paths = [folder / name for name in LISTS] + shard_paths(folder)
    except StoreError as error:
        return [
            Problem(
                "no access", folder, f"{_short(error, folder)}; not checked", mend=MAKE_READABLE
            )
        ]
    problems = []
    for path in paths:
        try:
            # Opening a pipe would wait for a writer that never comes.
            if stat.S_ISREG(path.stat().st_mode):
                path.open("rb").close()
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                detail = f"cannot be opened ({error.strerror}); its folder was not checked"
                problems.append(Problem("no access", path, detail, mend=MAKE_READABLE))
    return problems


def _check_lists(report: FolderReport) -> None:
    """Check the spec, the manifest's own fields and the quarantine list."""
    folder = report.folder
    try:
        kind = read_spec(folder).get("kind")
        if kind != folder.parent.name:
            detail = f"kind {kind!r} below {folder.parent.name}/"
            report.problems.append(Problem("spec", folder / "spec.json", detail))
    except StoreError as error:
        path = folder / "spec.json"
        report.problems.append(Problem("spec", path, _short(error, path)))
    path = folder / "manifest.json"
    damage = manifest_damage(folder)
    if not damage and path.exists() and not read_json(path).keys() >= {"format", "fingerprint"}:
        damage = "it has no format or fingerprint"
    if damage:
        numbers = [shard_number(shard) or 0 for shard in shard_paths(folder)]
        gaps = max(numbers, default=-1) + 1 - len(numbers)
        damage += "; without it nobody can tell whether the newest shards are lost"
        damage += f": {gaps} numbers below the last are not there" if gaps else ""
        report.problems.append(Problem("manifest", path, damage))
    path = folder / "quarantine.json"
    try:
        read_quarantine(folder)
    except StoreError as error:
        report.problems.append(Problem("quarantine", path, _short(error, path)))
    leftovers = list(folder.glob(f"{TEMPORARY}*"))
    if leftovers:
        report.notes.append(
            Advice(
                f"{len(leftovers)} leftover temporary files; ",
                Command("store", "gc"),
                " removes them",
            )
        )


def verify_folder(folder: Path, progress: Progress = lambda n: None) -> FolderReport:
    """Check every byte of a feature folder.

    Args:
        folder: Of the features. It is not locked: while another process
            writes to it, a shard may be reported that was replaced meanwhile.
        progress: Called with the number of 4 MiB blocks just read.

    Returns:
        What was found; nothing is changed.

    Cost: reads every file once; memory for one shard's index and one block.
    """
    report = FolderReport(folder, problems=_no_access(folder))
    if report.problems:
        return report
    lines = {line["name"]: line for line in read_manifest(folder)}
    _check_lists(report)
    paths = shard_paths(folder)
    report.shards = len(paths)
    for name in sorted(lines.keys() - {path.name for path in paths}):
        rows = lines[name].get("rows")
        known = counted(rows, "row") if isinstance(rows, int) else "rows"
        detail = f"is gone, with {known} of unknown key"
        report.problems.append(Problem("missing shard", folder / name, detail))
    try:
        dtype = folder_dtype(folder)
    except StoreError:
        # No shard can say it either: each is found unreadable.
        dtype = "unknown"
    shape, unlisted, digests = None, [], dict[str, str]()
    for path in paths:
        line = lines.get(path.name)
        shard, digest = _check_shard(path, line, dtype, report, progress)
        copied = digests.setdefault(digest, path.name) if digest else path.name
        if shard is None:
            continue
        if line is None:
            unlisted.append((path, copied))
        shape = shape or shard.features.shape[1:]
        if shard.features.shape[1:] != shape:
            detail = f"a row has shape {shard.features.shape[1:]}, expected {shape}"
            report.problems.append(Problem("other shape", path, detail, keys=tuple(shard.keys())))
    manifest_lost = any(problem.what == "manifest" for problem in report.problems)
    # A shard that was published while this ran is in the manifest by now.
    listed = {line["name"] for line in read_manifest(folder)}
    for path, copied in unlisted:
        if path.name not in listed and not manifest_lost:
            copy = f", a copy of {copied}" if copied != path.name else ""
            detail = f"is not in the manifest{copy}; a kill may have left it"
            report.problems.append(Problem("unlisted shard", path, detail))
    return report


def sample_folder(folder: Path, rows: int, seed: int = 0) -> FolderReport:
    """Check the lists, every shard's index, and the checksums of some random rows.

    Args:
        folder: Of the features.
        rows: How many to draw, without repeats, from all shards together.
        seed: Of the draw.
    """
    report = FolderReport(folder, problems=_no_access(folder))
    if report.problems:
        return report
    _check_lists(report)
    lines = {line["name"]: line for line in read_manifest(folder)}
    shards: list[Shard] = []
    for path in shard_paths(folder):
        report.shards += 1
        line = lines.pop(path.name, None)
        try:
            size = path.stat().st_size if path.is_file() else -1
            if line is not None and line["bytes"] != size:
                raise CorruptShardError(f"{size} bytes, the manifest says {line['bytes']}")
            shards.append(open_shard(path, folder.parent.name, folder.name, folder_dtype(folder)))
        except StoreError as error:
            keys = tuple(salvage_keys(path))
            report.problems.append(
                Problem("unreadable shard", path, _short(error, path), keys=keys)
            )
    for name in sorted(lines):
        report.problems.append(Problem("missing shard", folder / name, "is gone"))
    starts = np.concatenate([[0], np.cumsum([len(shard) for shard in shards], dtype=np.int64)])
    report.rows = int(starts[-1])
    report.checked_rows = min(rows, report.rows)
    chosen = np.random.default_rng(seed).choice(report.rows, report.checked_rows, replace=False)
    for position in sorted(chosen.tolist()):
        number = int(np.searchsorted(starts, position, side="right")) - 1
        shard, row = shards[number], int(position - starts[number])
        if not shard.row_is_intact(row):
            key = shard.keys()[row]
            detail = "a row of the sample does not have its checksum"
            report.problems.append(Problem("damaged rows", shard.path, detail, (row,), (key,)))
    return report


def verify_store(
    project: Project,
    kinds: Sequence[str] = KINDS,
    mine: bool = False,
    sample: int | None = None,
    photos: bool = False,
    show: Show = SILENT,
) -> list[FolderReport]:
    """Check the feature folders of a store.

    Args:
        project: The configuration; of it, only the store's root is needed
            unless `mine` or `photos` is set.
        kinds: "vit", "text" or both.
        mine: Only the folders that the configuration asks for.
        sample: Check that many random rows of each folder instead of all.
        photos: Compare the photos with what the rows were made from, too.
        show: How it is shown.

    Returns:
        One report a folder; all is well where none has a problem.

    Raises:
        StoreError: There is no store.
    """
    folders = feature_folders(project.root, kinds)
    if mine:
        wanted = project.fingerprints
        folders = [folder for folder in folders if folder.name in wanted]
    if sample is not None:
        reports = [sample_folder(folder, sample) for folder in folders]
    else:
        block_mib = BLOCK_BYTES >> 20
        with show.bar(sum(map(blocks_of, folders)) * block_mib, "MiB") as progress:
            reports = [
                verify_folder(folder, lambda blocks: progress(blocks * block_mib))
                for folder in folders
            ]
    for report in reports if photos else []:
        if report.folder.parent.name == "vit":
            if report.problems:
                report.notes.append(Advice("the photos were not compared; mend the folder first"))
                continue
            images, threads = project.dataset.images, project.config.store.threads
            with show.bar(report.rows, "photos") as progress:
                again = extract_again(project, report.folder)
                report.problems += compare_sources(report.folder, images, threads, progress, again)
    return reports
