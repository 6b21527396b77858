"""Which process makes which shard: the written plan, and its shards claimed one by one.

An extraction begins by writing down its plan: the rows that are missing, in
order, of which each `shard_rows` make one planned shard with a number of its
own. Every process that is asked for the same rows reads that plan, so the rows
of a shard do not depend on who makes it, or when. A row that fails makes its
shard shorter and shifts no other.

    plan.json         the plan; goes when every planned shard is dealt with
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock

from featstore.data.images import Photo
from featstore.encoders.spec import FORMAT
from featstore.extract.claims import (
    CLAIM,
    WORKER,
    clean,
    locked,
    take_lock,
    try_lock,
    wait_for_owner,
    workers,
)
from featstore.extract.plan import Job, Plan, folder_state, make_plan
from featstore.extract.publisher import (
    PLAN,
    Failed,
    Publisher,
    in_order,
    plan_token,
    read_plan,
    release_from_quarantine,
    request_token,
)
from featstore.progress import SILENT, Show
from featstore.publish import (
    write_json,
)
from featstore.store.folder import (
    read_manifest,
    read_quarantine,
    reconcile_manifest,
    shard_paths,
    write_manifest,
    write_spec,
)
from featstore.store.shard import open_shard, shard_name
from featstore.store.write import ShardRows


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
    paths: list[Photo] = field(default_factory=list)


class WorkList:
    """The planned shards of one extraction.

    Safe to use from several threads of a process. `alone` and `sharing` make one.

    Args:
        job: Whose shards they are.
        publisher: Gives them their names.
        first: Number of the first planned shard.
        keys: The rows of all planned shards, in order.
        worker: This process's claim; None where it holds the folder alone.
    """

    def __init__(
        self,
        job: Job,
        publisher: Publisher,
        first: int,
        keys: Sequence[str],
        worker: Path | None = None,
    ) -> None:
        self.job, self.publisher, self.first = job, publisher, first
        self.keys, self.worker = list(keys), worker
        self.folder, self.shard_rows = job.folder, job.shard_rows
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
        return PlannedShard(self.first + position, keys, self.job.paths_of(keys))

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
        lock = try_lock(self._claim(number))
        if lock is None and not wait:
            return False
        self._claims[number] = lock or take_lock(self._claim(number), -1)
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
            # One that stays is free without its lock; what went wrong before is to be read.
            with contextlib.suppress(OSError):
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
            if not workers(self.folder, self.worker):
                clean(self.folder, self.worker)

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


def _prepare(job: Job) -> int:
    """Make a job's folder ready for shards; return the number of the next one."""
    folder, spec = job.folder, job.spec
    if not shard_paths(folder) or not (folder / "spec.json").exists():
        write_spec(folder, spec, {"preset": job.preset})
    lines = reconcile_manifest(folder)
    if not lines or len(read_manifest(folder)) < len(lines):
        # Before the first shard: where there are shards, a missing manifest is a lost one.
        write_manifest(folder, spec.fingerprint, lines)
    numbers = [int(path.stem.split("-")[1]) for path in shard_paths(folder)]
    return max(numbers, default=-1) + 1


def alone(plan: Plan) -> WorkList:
    """Return the work of a caller that holds the folder for itself (`writing`).

    A written plan that others did not end is given up: its numbers are used now.
    """
    first = _prepare(plan.job)
    (plan.folder / PLAN).unlink(missing_ok=True)
    return WorkList(plan.job, Publisher(plan.folder, plan.job.spec, None), first, plan.keys)


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


@contextlib.contextmanager
def sharing(
    job: Job, start: int = 0, show: Show = SILENT, plan: Plan | None = None
) -> Iterator[Share]:
    """Join the processes that extract the same rows, or be the first of them.

    Waits while others extract other rows into the folder. What is missing is
    found without the lock, for that may take long.

    Args:
        job: What is asked for.
        start: The first planned shard that this process would make; a plan
            that does not reach it is not written.
        show: Shows the reading of photos where it takes long.
        plan: Of the job, made just now: not made again unless the folder has changed since.

    Raises:
        StoreError: The folder cannot be written, or the disk is too small.
    """
    folder, shard_rows = job.folder, job.shard_rows
    request = request_token(job.keys, shard_rows)
    worker = folder / f"{WORKER}{uuid.uuid4().hex[:12]}"
    with contextlib.ExitStack() as held:
        if job.photos is not None:
            held.callback(job.photos.save)
        share, wait_for = None, None
        while share is None:
            if wait_for is not None:
                wait_for_owner(wait_for)
            if plan is None or plan.state != folder_state(folder):
                plan = make_plan(job, show)
            if not plan.keys and not (folder / PLAN).exists():
                yield Share(plan, None)
                return
            with locked(folder):
                others = workers(folder)
                written = read_plan(folder)
                joined = written is not None and written["request"] == request
                wait_for = others[0] if others and not joined else None
                if wait_for is not None or (not joined and plan.state != folder_state(folder)):
                    continue
                if not others:
                    clean(folder)
                if not joined:
                    (folder / PLAN).unlink(missing_ok=True)
                    if start * shard_rows >= len(plan.keys):
                        share = Share(plan, None)
                        continue
                    plan.check_space()
                if not joined or not others:
                    first = _prepare(job)
                if not joined:
                    written = _write_plan(plan, request, first)
                assert written is not None
                claim = take_lock(worker, -1)
                held.callback(claim.release)
                held.callback(worker.unlink, missing_ok=True)
                publisher = Publisher(folder, job.spec, written["token"])
                work = WorkList(job, publisher, written["first"], written["keys"], worker)
                held.callback(work.close)
                share = Share(plan, work, joined and _leaves_out(work, plan))
        yield share


def _write_plan(plan: Plan, request: str, first: int) -> dict[str, Any]:
    written: dict[str, Any] = {
        "format": FORMAT,
        "fingerprint": plan.job.spec.fingerprint,
        "request": request,
        "first": first,
        "shard_rows": plan.job.shard_rows,
        "empty": [],
        "keys": plan.keys,
    }
    written["token"] = plan_token(written)
    write_json(plan.folder / PLAN, written)
    return written


def _leaves_out(work: WorkList, plan: Plan) -> bool:
    return bool(set(plan.keys) - work.pending_keys())
