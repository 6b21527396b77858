"""Which process makes which shard: the written plan, the locks, and publishing.

An extraction begins by writing down its plan: the rows that are missing, in
order, of which each `shard_rows` make one planned shard with a number of its
own. Every process that is asked for the same rows reads that plan, so the rows
of a shard do not depend on who makes it, or when. A row that fails makes its
shard shorter and shifts no other.

    plan.json         the plan; goes when every planned shard is dealt with
    .lock             held for moments: to plan, or to give a shard its name
    .claim-worker-…   held by each process at work as long as it lives
    .claim-00003      held by the one that makes shard 3

A lock belongs to a process: the system takes it back when that dies, and
another one goes on. Who needs the folder for itself (`writing`) waits until
nobody is at work.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock

from featstore.encoders.spec import FORMAT, FeatureSpec
from featstore.errors import StoreError
from featstore.extract.plan import Plan
from featstore.publish import (
    package_versions,
    publish,
    read_json,
    remove_leftovers,
    text_digest,
    write_json,
)
from featstore.store.folder import (
    manifest_damage,
    read_manifest,
    read_quarantine,
    reconcile_manifest,
    shard_paths,
    write_manifest,
    write_quarantine,
    write_spec,
)
from featstore.store.shard import describe_file, open_shard, shard_name
from featstore.store.write import ShardRows, write_shard

PLAN = "plan.json"
LOCK = ".lock"
CLAIM = ".claim-"
WORKER = f"{CLAIM}worker-"
# Key to the reason and the digest of a photo that failed.
Failed = Mapping[str, tuple[str, tuple[int, int] | None]]


def _lock(path: Path, timeout_seconds: float) -> filelock.BaseFileLock:
    """Take a lock that any thread of this process may release."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path, timeout=timeout_seconds, thread_local=False)
        lock.acquire()
    except filelock.Timeout as error:
        raise StoreError(f"{path.parent}: another extraction holds the lock") from error
    except OSError as error:
        raise StoreError(
            f"{path.parent}: cannot be written ({error.strerror}); make it writable for you, or set"
            " [store] root to another folder"
        ) from error
    return lock


@contextlib.contextmanager
def _locked(folder: Path, timeout_seconds: float = -1) -> Iterator[None]:
    lock = _lock(folder / LOCK, timeout_seconds)
    try:
        yield
    finally:
        lock.release()


def _try_lock(path: Path) -> filelock.BaseFileLock | None:
    """Take a lock if nobody has it."""
    lock = filelock.FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return None
    return lock


def _is_held(path: Path) -> bool:
    lock = _try_lock(path)
    if lock is not None:
        lock.release()
    return lock is None


def _workers(folder: Path, own: Path | None = None) -> list[Path]:
    """Return the claims of other living workers. The caller holds the lock."""
    return [path for path in sorted(folder.glob(f"{WORKER}*")) if path != own and _is_held(path)]


def _clean(folder: Path, own: Path | None = None) -> None:
    """Delete what the dead left. The caller holds the lock, and nobody else is at work."""
    remove_leftovers(folder)
    for path in folder.glob(f"{CLAIM}*"):
        if path != own:
            path.unlink(missing_ok=True)


def _wait_for(path: Path, timeout_seconds: float = -1) -> None:
    """Wait until the owner of a claim is gone."""
    _lock(path, timeout_seconds).release()


@contextlib.contextmanager
def writing(folder: Path, timeout_seconds: float = -1) -> Iterator[None]:
    """Have a features folder for oneself: no other process plans, extracts or mends.

    Raises:
        StoreError: The folder cannot be made or locked, or others were at work
            for `timeout_seconds`.
    """
    until = time.monotonic() + timeout_seconds
    while True:
        left = max(0.0, until - time.monotonic()) if timeout_seconds >= 0 else -1
        with _locked(folder, left):
            others = _workers(folder)
            if not others:
                _clean(folder)
                yield
                return
        _wait_for(others[0], left)


@dataclass(frozen=True)
class PlannedShard:
    """The rows that one shard is made of.

    Attributes:
        number: In its file's name.
        keys: Image ids or sentences, in order.
        paths: Photos of `keys`; empty for text.
    """

    number: int
    keys: list[str]
    paths: list[Path] = field(default_factory=list)


class _DoneError(Exception):
    """Another process has published this shard meanwhile."""


class Publisher:
    """Gives finished shards their names; several processes may, each with its own.

    Args:
        folder: Of the features.
        spec: Theirs.
        token: Of the written plan; None: the caller holds the folder alone.
    """

    def __init__(self, folder: Path, spec: FeatureSpec, token: str | None) -> None:
        self.folder, self.spec, self.token = folder, spec, token
        self.versions = package_versions()

    def publish(self, number: int, rows: ShardRows, failed: Failed) -> bool:
        """Publish a shard and its rows that failed.

        Args:
            number: Of the shard.
            rows: Its rows; without any, no file is written.
            failed: What is quarantined.

        Returns:
            False where another process was faster; its bytes are the same.

        Raises:
            StoreError: The plan is no longer in force.
            FeatstoreError: The file system refused.
        """

        def write(path: Path, before: Callable[[], None]) -> dict[str, Any]:
            spec = self.spec
            return write_shard(
                path, spec.kind, spec.fingerprint, spec.dtype, rows, self.versions, before
            )

        return self._publish(number, rows.keys, failed, write)

    def publish_file(
        self, number: int, data: bytes, line: dict[str, Any], keys: Sequence[str], failed: Failed
    ) -> bool:
        """Publish a shard that was made elsewhere.

        Args:
            number: Of the shard.
            data: The file's bytes.
            line: Its line of the manifest, as its maker saw it.
            keys: Of its rows.
            failed: As in `publish`, and so the result.

        Raises:
            StoreError: The bytes are not those that were sent.
        """

        def write(path: Path, before: Callable[[], None]) -> dict[str, Any]:
            with publish(path, before) as temporary:
                temporary.write_bytes(data)
                found = {"name": path.name, "rows": len(keys), **describe_file(temporary)}
                if found != line:
                    raise StoreError(f"{path}: {found} arrived, expected {line}; run it again")
            return found

        return self._publish(number, keys, failed, write)

    def _publish(
        self,
        number: int,
        keys: Sequence[str],
        failed: Failed,
        write: Callable[[Path, Callable[[], None]], dict[str, Any]],
    ) -> bool:
        path = self.folder / shard_name(number)
        with contextlib.ExitStack() as turn:

            def before() -> None:
                # The file is whole and on the disk; only its name needs the lock.
                turn.enter_context(self.lock())
                self._check(number)
                if failed:
                    self._quarantine(failed)

            try:
                if self._is_there(number):
                    return False
                if keys:
                    self._list(write(path, before), keys)
                else:
                    before()
                    self._mark_empty(number)
                    self._list(None, keys)
            except _DoneError:
                return False
        return True

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Return the folder's lock, for moments."""
        return contextlib.nullcontext() if self.token is None else _locked(self.folder)

    def _is_there(self, number: int) -> bool:
        return self.token is not None and (self.folder / shard_name(number)).exists()

    def _check(self, number: int) -> None:
        """Refuse to publish what is there, or was planned by a plan that was given up."""
        if self.token is None:
            return
        written = read_plan(self.folder)
        if self._is_there(number) or (written and number in written["empty"]):
            raise _DoneError
        if written is None or written["token"] != self.token:
            raise StoreError(
                f"{self.folder}: another extraction has replaced the plan of shard {number};"
                " run the command again"
            )

    def _quarantine(self, failed: Failed) -> None:
        entries = read_quarantine(self.folder, with_lost=True)
        for key, (reason, digest) in failed.items():
            entries[key] = {
                "reason": reason,
                "source_digest": None if digest is None else list(digest),
            }
        write_quarantine(self.folder, entries)

    def _mark_empty(self, number: int) -> None:
        written = read_plan(self.folder) if self.token is not None else None
        if written is not None:
            empty = [*written["empty"], number]
            write_json(self.folder / PLAN, {**written, "empty": empty})

    def _list(self, line: dict[str, Any] | None, keys: Sequence[str]) -> None:
        """Bring the lists up to a shard that has just got its name."""
        release_from_quarantine(self.folder, keys)
        if damage := manifest_damage(self.folder):
            raise StoreError(f"{self.folder / 'manifest.json'}: {damage}")
        # Other processes publish too: the list on the disk is the newest.
        lines = {line["name"]: line for line in read_manifest(self.folder)}
        if line is not None:
            lines[line["name"]] = line
        write_manifest(self.folder, self.spec.fingerprint, in_order(lines.values()))


def in_order(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a manifest's lines by shard number."""
    return sorted(lines, key=lambda line: (len(line["name"]), line["name"]))


def release_from_quarantine(folder: Path, keys: Sequence[str]) -> None:
    """Take keys that have features now off the quarantine list."""
    entries = read_quarantine(folder, with_lost=True)
    stored = set(keys)
    left = {key: entry for key, entry in entries.items() if key not in stored}
    if len(left) < len(entries):
        write_quarantine(folder, left)


def request_token(keys: Sequence[str], shard_rows: int) -> str:
    """Return what two equal requests have in common: a digest of the rows and their order."""
    return text_digest(json.dumps([shard_rows, list(dict.fromkeys(keys))]))


def read_plan(folder: Path) -> dict[str, Any] | None:
    """Return the written plan, not to be changed; None where there is none that can be read.

    Cost: parsed once for each state of the file.
    """
    try:
        status = (folder / PLAN).stat()
    except OSError:
        return None
    return _parse_plan(folder, (status.st_ino, status.st_mtime_ns, status.st_size))


@functools.lru_cache(maxsize=4)
def _parse_plan(folder: Path, state: tuple[int, int, int]) -> dict[str, Any] | None:
    try:
        found = read_json(folder / PLAN)
        sound = (
            found["format"] == FORMAT
            and found["fingerprint"] == folder.name
            and type(found["first"]) is int
            and type(found["shard_rows"]) is int
            and found["shard_rows"] > 0
            and all(type(number) is int for number in found["empty"])
            and all(type(key) is str for key in found["keys"])
            and found["token"] == _plan_token(found)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(found) if sound else None


def _plan_token(written: Mapping[str, Any]) -> str:
    """Return the digest of a plan: of its request, its numbers and its rows."""
    fields = [written[name] for name in ("request", "first", "shard_rows", "keys")]
    return text_digest(json.dumps(fields))


class WorkList:
    """The planned shards of one extraction.

    Safe to use from several threads of a process. `alone` and `sharing` make one.
    """

    def __init__(
        self,
        publisher: Publisher,
        first: int,
        shard_rows: int,
        keys: Sequence[str],
        path_of: Callable[[str], Path] | None = None,
        worker: Path | None = None,
    ) -> None:
        self.publisher, self.first, self.shard_rows = publisher, first, shard_rows
        self.keys, self.path_of, self.worker = list(keys), path_of, worker
        self.folder = publisher.folder
        self._claims: dict[int, filelock.BaseFileLock] = {}

    def __len__(self) -> int:
        """Return the number of planned shards."""
        return -(-len(self.keys) // self.shard_rows)

    @property
    def shared(self) -> bool:
        """Whether other processes may be at work on it."""
        return self.publisher.token is not None

    def shard(self, position: int) -> PlannedShard:
        """Return the planned shard at a place of the plan."""
        keys = self._keys_of(position)
        paths = [] if self.path_of is None else [self.path_of(key) for key in keys]
        return PlannedShard(self.first + position, keys, paths)

    def pending(self, positions: range) -> list[int]:
        """Return the places of the plan, of these, that nobody has dealt with yet."""
        positions = range(positions.start, min(positions.stop, len(self)))
        if not self.shared:
            return list(positions)
        written = read_plan(self.folder)
        if written is None:
            # It goes when all is done; where it was given up, publishing refuses.
            return []
        empty = set(written["empty"]) if written["token"] == self.publisher.token else set()
        numbers = ((p, self.first + p) for p in positions)
        return [
            p for p, n in numbers if n not in empty and not (self.folder / shard_name(n)).exists()
        ]

    def rows(self, positions: range) -> int:
        """Return how many rows of these planned shards nobody has dealt with yet."""
        return sum(len(self._keys_of(p)) for p in self.pending(positions))

    def pending_keys(self) -> set[str]:
        """Return the rows of the planned shards that nobody has dealt with yet."""
        return {key for p in self.pending(range(len(self))) for key in self._keys_of(p)}

    def _keys_of(self, position: int) -> list[str]:
        return self.keys[position * self.shard_rows : (position + 1) * self.shard_rows]

    def claim(self, position: int, wait: bool = False) -> bool:
        """Take a planned shard for this process.

        Args:
            position: Its place in the plan.
            wait: Wait while another process has it, until it is done or dies.
                Only for a process that holds no other claim: two would wait
                for each other.

        Returns:
            True where it is ours to make; False where another process is making
            it, or it is done.
        """
        if not self.shared:
            return True
        number = self.first + position
        if number in self._claims:
            return True
        lock = _try_lock(self._claim(number))
        if lock is None and not wait:
            return False
        self._claims[number] = lock or _lock(self._claim(number), -1)
        if self.pending(range(position, position + 1)):
            return True
        self.release(number)
        return False

    def _claim(self, number: int) -> Path:
        return self.folder / f"{CLAIM}{number:05d}"

    def release(self, number: int) -> None:
        """Give a shard's claim back."""
        lock = self._claims.pop(number, None)
        if lock is not None:
            self._claim(number).unlink(missing_ok=True)
            lock.release()

    def publish(self, shard: PlannedShard, rows: ShardRows, failed: Failed) -> bool:
        """Publish a claimed shard; see `Publisher.publish`."""
        try:
            return self.publisher.publish(shard.number, rows, failed)
        finally:
            self.release(shard.number)

    def finish(self) -> None:
        """Close the plan if every planned shard is dealt with, by whomever."""
        if not self.shared:
            return
        with self.publisher.lock():
            written = read_plan(self.folder)
            ours = written is not None and written["token"] == self.publisher.token
            if ours and not self.pending(range(len(self))):
                self._settle()
                (self.folder / PLAN).unlink(missing_ok=True)
            if not _workers(self.folder, self.worker):
                _clean(self.folder, self.worker)

    def _settle(self) -> None:
        """Put right what a process left that was killed between a shard and the lists."""
        if read_quarantine(self.folder, with_lost=True).keys() & set(self.keys):
            spec = self.publisher.spec
            for position in range(len(self)):
                path = self.folder / shard_name(self.first + position)
                if path.exists():
                    shard = open_shard(path, spec.kind, spec.fingerprint, spec.dtype)
                    release_from_quarantine(self.folder, shard.keys())
        write_manifest(self.folder, self.folder.name, in_order(reconcile_manifest(self.folder)))

    def close(self) -> None:
        """Give every claim back."""
        for number in list(self._claims):
            self.release(number)


def _prepare(folder: Path, spec: FeatureSpec, preset: str) -> int:
    """Make a folder ready for shards; return the number of the next one."""
    if not shard_paths(folder) or not (folder / "spec.json").exists():
        write_spec(folder, spec, {"preset": preset})
    lines = reconcile_manifest(folder)
    if not lines or len(read_manifest(folder)) < len(lines):
        # Before the first shard: where there are shards, a missing manifest is a lost one.
        write_manifest(folder, spec.fingerprint, lines)
    numbers = [int(path.stem.split("-")[1]) for path in shard_paths(folder)]
    return max(numbers, default=-1) + 1


def alone(plan: Plan, shard_rows: int, preset: str) -> WorkList:
    """Return the work of a caller that holds the folder for itself (`writing`).

    A written plan that others did not end is given up: its numbers are used now.
    """
    first = _prepare(plan.folder, plan.spec, preset)
    (plan.folder / PLAN).unlink(missing_ok=True)
    paths = dict(zip(plan.keys, plan.paths, strict=True)) if plan.paths else None
    publisher = Publisher(plan.folder, plan.spec, None)
    return WorkList(
        publisher, first, shard_rows, plan.keys, None if paths is None else paths.__getitem__
    )


@dataclass
class Share:
    """This process's part of an extraction.

    Attributes:
        plan: What was missing when it joined.
        work: The planned shards; None where there is nothing to do.
        rest: Whether the plan, written earlier, leaves out rows that are
            missing now: their photos have changed since.
    """

    plan: Plan
    work: WorkList | None
    rest: bool = False


def _state(folder: Path) -> tuple[Any, ...]:
    """Return what a plan depends on, to see whether it is still true."""
    quarantine = folder / "quarantine.json"
    status = quarantine.stat() if quarantine.exists() else None
    names = tuple(path.name for path in shard_paths(folder))
    return names, status and (status.st_mtime_ns, status.st_size)


@contextlib.contextmanager
def sharing(
    make_plan: Callable[[], Plan],
    folder: Path,
    requested: Sequence[str],
    shard_rows: int,
    preset: str,
    path_of: Callable[[str], Path] | None = None,
    start: int = 0,
) -> Iterator[Share]:
    """Join the processes that extract the same rows, or be the first of them.

    Waits while others extract other rows into the folder.

    Args:
        make_plan: Finds what is missing now; called without the lock, for it
            may take long.
        folder: Of the features.
        requested: Every row asked for, in order: whose plan it is.
        shard_rows: Rows of a planned shard.
        preset: The encoder's name, kept for people.
        path_of: Photo of an image id.
        start: The first planned shard that this process would make; a plan
            that does not reach it is not written.

    Raises:
        StoreError: The folder cannot be written, or the disk is too small.
    """
    request = request_token(requested, shard_rows)
    worker = folder / f"{WORKER}{uuid.uuid4().hex[:12]}"
    with contextlib.ExitStack() as held:
        share, wait_for = None, None
        while share is None:
            if wait_for is not None:
                _wait_for(wait_for)
            before = _state(folder)
            plan = make_plan()
            if not plan.keys and not (folder / PLAN).exists():
                yield Share(plan, None)
                return
            with _locked(folder):
                others = _workers(folder)
                written = read_plan(folder)
                joined = written is not None and written["request"] == request
                wait_for = others[0] if others and not joined else None
                if wait_for is not None or (not joined and before != _state(folder)):
                    continue
                if not others:
                    _clean(folder)
                if not joined:
                    (folder / PLAN).unlink(missing_ok=True)
                    if start * shard_rows >= len(plan.keys):
                        share = Share(plan, None)
                        continue
                    plan.check_space()
                if not joined or not others:
                    first = _prepare(folder, plan.spec, preset)
                if not joined:
                    written = _write_plan(plan, request, first, shard_rows)
                assert written is not None
                claim = _lock(worker, -1)
                held.callback(claim.release)
                held.callback(worker.unlink, missing_ok=True)
                publisher = Publisher(folder, plan.spec, written["token"])
                work = WorkList(
                    publisher, written["first"], shard_rows, written["keys"], path_of, worker
                )
                held.callback(work.close)
                share = Share(plan, work, joined and _leaves_out(work, plan))
        yield share


def _write_plan(plan: Plan, request: str, first: int, shard_rows: int) -> dict[str, Any]:
    written: dict[str, Any] = {
        "format": FORMAT,
        "fingerprint": plan.spec.fingerprint,
        "request": request,
        "first": first,
        "shard_rows": shard_rows,
        "empty": [],
        "keys": plan.keys,
    }
    written["token"] = _plan_token(written)
    write_json(plan.folder / PLAN, written)
    return written


def _leaves_out(work: WorkList, plan: Plan) -> bool:
    return bool(set(plan.keys) - work.pending_keys())
