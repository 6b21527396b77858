"""The same plan on a Ray cluster: actors hold the encoder, a planned shard is a task.

The driver plans, hands out planned shards and keeps their claims. An actor
publishes what it made into the shared folder; where it cannot see that folder,
it sends the file's bytes to the driver. A shard that is lost on the way, with
its actor, its worker process or its node, is made again by another actor: the
bytes are the same, and the first to publish a number wins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from featstore.errors import StoreError
from featstore.extract.actor import Finished, Host, ShardActor, Task
from featstore.extract.extract import ALL, Summary
from featstore.extract.plan import Job, Plan
from featstore.extract.worklist import WorkList, sharing
from featstore.progress import SILENT, Progress, Show
from featstore.publish import TEMPORARY, write_text
from featstore.ray_cluster import (
    ENVIRONMENT,
    Actors,
    connect,
    one_line,
    resources_of,
)
from featstore.store.folder import read_quarantine
from featstore.store.shard import open_shard, shard_name
from featstore.store.write import ShardRows

# A photo that ends its process each time must not be tried without end.
MOST_TRIES = 4
# Actors that die one after the other while no shard is finished, for each actor.
MOST_DEATHS = 4
WAIT_SECONDS = 30.0
SAMPLED_PHOTOS = 3


class _Driver:
    """Hands planned shards to actors until all are there."""

    def __init__(
        self,
        ray: Any,
        work: WorkList,
        task: Task,
        resources: tuple[int, float, float],
        show: Show,
        progress: Progress,
        summary: Summary,
    ) -> None:
        self.ray, self.work, self.task, self.show = ray, work, task, show
        self.progress, self.summary = progress, summary
        self.count, gpus, cpus = resources
        self.make_actor = ray.remote(ShardActor).options(
            num_gpus=gpus, num_cpus=cpus, max_restarts=-1, max_task_retries=0
        )
        self.actors: list[Any] = []
        self.idle: list[Any] = []
        self.starting: dict[Any, Any] = {}
        self.running: dict[Any, tuple[Any, int]] = {}
        self.tries: Counter[int] = Counter()
        self.deaths = 0
        self.blind: set[str] = set()
        self.versions: tuple[tuple[str, str], ...] | None = None

    def run(self, positions: range) -> None:
        """Make planned shards; wait for those that other processes make."""
        for _ in range(self.count):
            self._start()
        for position in self._make_all(deque(self.work.pending(positions))):
            # With no claim of our own: two drivers that wait for each other would never end.
            if self.work.claim(position, wait=True):
                self._make_all(deque([position]))
            else:
                self.progress(len(self.work.shard(position).keys))
        self.work.finish()

    def stop(self) -> None:
        """End the actors."""
        for actor in self.actors:
            with contextlib.suppress(Exception):
                self.ray.kill(actor)

    def _start(self) -> None:
        actor = self.make_actor.remote(self.task)
        self.actors.append(actor)
        self.starting[actor.ready.remote()] = actor

    def _make_all(self, queue: deque[int]) -> list[int]:
        """Make planned shards; return those that other processes have."""
        others: list[int] = []
        waited = False
        while queue or self.running:
            while self.idle and queue:
                position = queue.popleft()
                if not self.work.claim(position):
                    others.append(position)
                    continue
                actor = self.idle.pop()
                ref = actor.make.remote(self.work.shard(position))
                self.running[ref] = (actor, position)
            if not queue and not self.running:
                break
            refs = [*self.running, *self.starting]
            ready, _ = self.ray.wait(refs, num_returns=1, timeout=WAIT_SECONDS)
            if not ready and not self.running and not waited:
                waited = True
                self.show.note(
                    "Ray: no actor has started yet; waiting for a node with room for one"
                )
            for ref in ready:
                self._settle(ref, queue)
        return others

    def _settle(self, ref: Any, queue: deque[int]) -> None:
        """Deal with what an actor answered, or with its end."""
        actor, position = self.running.pop(ref, (None, None))
        actor = actor or self.starting.pop(ref)
        errors = self.ray.exceptions
        try:
            found = self.ray.get(ref)
        except errors.RayTaskError as error:
            raise StoreError(f"Ray: an actor failed: {one_line(error)}") from error
        except errors.RayError as error:
            self._lost(actor, position, error, queue)
            return
        if found.refusal:
            raise StoreError(found.refusal)
        if position is None:
            self._introduce(found)
        else:
            self._take(position, found)
        self.idle.append(actor)

    def _lost(self, actor: Any, position: int | None, error: Exception, queue: deque[int]) -> None:
        """Have a shard made again whose actor, or whose bytes, are gone."""
        self.deaths += 1
        reason = one_line(error)
        if position is not None:
            self.tries[position] += 1
            if self._published_before_the_end(position):
                self.work.release(self.work.first + position)
            elif self.tries[position] >= MOST_TRIES:
                shard = self.work.shard(position)
                raise StoreError(
                    f"Ray: shard {shard.number} ({shard.keys[0]!r} to {shard.keys[-1]!r}) ended"
                    f" its actor {MOST_TRIES} times; the last: {reason}"
                ) from error
            else:
                queue.appendleft(position)
        if self.deaths >= MOST_DEATHS * max(MOST_TRIES, self.count):
            raise StoreError(
                f"Ray: actors ended {self.deaths} times and no shard was finished; the last:"
                f" {reason}"
            ) from error
        if isinstance(error, self.ray.exceptions.ActorDiedError):
            # Ray restarts a killed one; this one it has given up.
            self.actors.remove(actor)
            self._start()
        else:
            self.starting[actor.ready.remote()] = actor

    def _published_before_the_end(self, position: int) -> bool:
        """Count a shard that its actor published and could not report any more."""
        work = self.work
        if work.pending(range(position, position + 1)):
            return False
        shard, spec = work.shard(position), self.task.job.spec
        path = work.folder / shard_name(shard.number)
        made: list[str] = []
        if path.exists():
            made = open_shard(path, spec.kind, spec.fingerprint, spec.dtype).keys()
        entries = read_quarantine(work.folder)
        missing = set(shard.keys) - set(made)
        self.summary.extracted += len(made)
        self.summary.failed |= {
            key: entries[key]["reason"] for key in shard.keys if key in missing & entries.keys()
        }
        self.progress(len(shard.keys))
        return True

    def _introduce(self, host: Host) -> None:
        if self.versions not in (None, host.versions):
            found = dict(host.versions).items() ^ dict(self.versions or ()).items()
            differing = ", ".join(sorted({name for name, _ in found}))
            raise StoreError(
                f"node {host.name}: other versions than on another node ({differing}); install"
                " the same on every node, or their features may differ"
            )
        self.versions = host.versions
        if not host.sees_folder and not self.task.return_shards and host.name not in self.blind:
            self.blind.add(host.name)
            self.show.note(
                f"Ray: node {host.name} does not see {self.work.folder}; its shards are sent here"
            )

    def _take(self, position: int, found: Finished) -> None:
        number = self.work.first + position
        keys, failed = found.keys, found.failed
        if found.data is not None:
            assert found.line is not None
            publisher = self.work.publisher
            if not publisher.publish_file(number, found.data, found.line, keys, failed):
                keys, failed = (), {}
        elif not keys and self.work.pending(range(position, position + 1)):
            # All its rows failed, far from the folder.
            self.work.publisher.publish(number, ShardRows([], [], []), failed)  # type: ignore[arg-type]
        self.work.release(number)
        self.deaths = 0
        self.summary.extracted += len(keys)
        self.summary.failed |= {key: reason for key, (reason, _) in failed.items()}
        if found.batch_size < self.summary.batch_size:
            self.summary.batch_size = found.batch_size
            self.show.halved(found.batch_size)
        self.progress(len(self.work.shard(position).keys))


@contextlib.contextmanager
def _marked(folder: Path, token: str) -> Iterator[str]:
    """Have a file in a folder by which a node tells whether it sees the same one."""
    marker = folder / f"{TEMPORARY}marker-{uuid.uuid4().hex[:12]}"
    write_text(marker, token)
    try:
        yield marker.name
    finally:
        marker.unlink(missing_ok=True)


def _task(
    work: WorkList,
    pending: Sequence[int],
    wanted: Actors,
    resources: tuple[int, float, float],
    marker: str,
) -> Task:
    token = work.publisher.token
    assert token is not None
    _, gpus, cpus = resources
    return Task(
        job=dataclasses.replace(work.job, keys=(), images=None, load=None),
        token=token,
        marker=marker,
        photos=tuple(p for p in work.shard(pending[0]).paths[:SAMPLED_PHOTOS] if p.is_file()),
        threads=0 if gpus else int(cpus),
        return_shards=wanted.return_shards,
        environment={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        command=tuple(sys.argv),
    )


def _anywhere(job: Job) -> Job:
    """Return a job with absolute paths: actors have another working folder."""
    store = dataclasses.replace(job.store, root=str(Path(job.store.root).absolute()))
    preset = str(Path(job.preset).absolute()) if Path(job.preset).exists() else job.preset
    images = job.images
    if images is not None:
        images = dataclasses.replace(images, folder=images.folder.absolute())
    return dataclasses.replace(job, store=store, preset=preset, images=images)


def extract_on_ray(
    job: Job,
    address: str,
    wanted: Actors | None = None,
    show: Show = SILENT,
    shards: range = ALL,
) -> tuple[Plan, Summary]:
    """Make the store hold the features of a job's inputs, encoded on a Ray cluster.

    Args:
        job, show, shards: As in `featstore.extract.extract.extract`.
        address: As in `connect`. Not used where there is nothing to do.
        wanted: The actors.

    Returns:
        What was missing, and what was done.

    Raises:
        UsageError: The cluster cannot be used.
        StoreError: A node does not see the photos or has another encoder; a
            shard, or every shard, ends its actor again and again.
    """
    wanted, job = wanted or Actors(), _anywhere(job)
    begun: Plan | None = None
    total = Summary(batch_size=job.store.encode_batch_size)
    rest = True
    with contextlib.ExitStack() as held:
        ray: Any = None
        while rest:
            with sharing(job, shards.start, show) as share:
                begun = begun or share.plan
                rest = share.rest and shards == ALL
                work = share.work
                pending = work.pending(shards) if work else []
                if work and pending:
                    ray = ray or held.enter_context(connect(address))
                    _drive(ray, work, pending, wanted, show, shards, total)
                elif work:
                    work.finish()
    assert begun is not None
    return begun, total


def _drive(
    ray: Any,
    work: WorkList,
    pending: Sequence[int],
    wanted: Actors,
    show: Show,
    shards: range,
    total: Summary,
) -> None:
    """Have actors make planned shards."""
    started = time.perf_counter()
    resources = resources_of(ray, wanted, len(pending))
    show.note("Ray: {} actors, each with {:g} GPUs and {:g} CPUs".format(*resources))
    with (
        _marked(work.folder, str(work.publisher.token)) as marker,
        show.bar(work.rows(shards), work.job.unit) as progress,
    ):
        task = _task(work, pending, wanted, resources, marker)
        driver = _Driver(ray, work, task, resources, show, progress, total)
        try:
            driver.run(shards)
        finally:
            driver.stop()
    total.seconds += time.perf_counter() - started
