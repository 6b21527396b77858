"""The workers of a search on a Ray cluster: one actor each, on any node that has room.

Actors meet in the search's folder and its storage, as the processes of one
machine do (`trainer.tuning.workers`), so the folders of the search, the store and the
photos must be the same on every node. What an actor, its process or its node
was running when it ended is gone on with by the next that is free.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featstore.encoders.framework import import_framework, in_own_process, limit_threads
from featstore.errors import FeatstoreError, RunError, StoppedError
from featstore.publish import TEMPORARY, command_line, work_for, write_text
from featstore.ray_cluster import (
    ENVIRONMENT,
    Actors,
    connect,
    one_line,
    resources_of,
)
from trainer.tuning.memory import anonymous_bytes
from trainer.tuning.study import Search
from trainer.tuning.trials import work_in
from trainer.tuning.workers import MEMORY_GROWTH, MOST_DEATHS, STOP_SECONDS, Watched, position

POLL_SECONDS = 1.0
UNPLACED_SECONDS = 30.0


@dataclass(frozen=True)
class _Job:
    """What every actor of a search is told.

    Attributes:
        folder: Of the search; `marker` in it holds `token`.
        url: The study's storage; None: the journal.
        deadline: No trial is drawn after this `time.time()`.
        here: The driver's working folder, which relative paths start from.
        threads: Of a step; 0: as many as TensorFlow takes.
        environment: Variables of the driver's that count.
        arguments: The driver's `sys.argv`.
        command: That outputs record.
    """

    folder: Path
    marker: str
    token: str
    url: str | None
    deadline: float
    here: str
    threads: int
    environment: dict[str, str]
    arguments: tuple[str, ...]
    command: str


@dataclass(frozen=True)
class _Ended:
    """How an actor's work ended: "done", "renew", "stopped" or "refused", and why."""

    how: str
    why: str = ""


class TrialActor:
    """Runs trials of a search on one node."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    def work(self, job: _Job) -> _Ended:
        """Run trials until none is left, or until asked to stop."""
        os.environ.update(job.environment)
        # Lines name the program of the one who asked, outputs record its command.
        sys.argv[:] = job.arguments
        work_for(job.command)
        in_own_process()
        with contextlib.suppress(OSError):
            os.chdir(job.here)
        try:
            self._check_folder(job)
            import_framework()
            limit_threads(job.threads, job.threads)
            grown = work_in(
                job.folder, job.url, self._asked.is_set, job.deadline, growth=MEMORY_GROWTH
            )
        except StoppedError:
            return _Ended("stopped")
        except FeatstoreError as error:
            return _Ended("refused", f"node {socket.gethostname()}: {error}")
        return _Ended("renew" if grown else "done")

    @staticmethod
    def _check_folder(job: _Job) -> None:
        try:
            same = (job.folder / job.marker).read_text(encoding="utf-8") == job.token
        except OSError:
            same = False
        if not same:
            raise RunError(
                f"{job.folder} is not there; a search on several machines needs one folder that"
                " all of them see under the same path: give it with --runs"
            )

    def stop(self) -> None:
        """Have the running trials saved and the work ended."""
        self._asked.set()

    def own_bytes(self) -> int:
        """Return the memory that this actor's process holds of its own."""
        return anonymous_bytes()


class _Driver:
    """Keeps actors at work until no trial is left."""

    def __init__(
        self, ray: Any, search: Search, job: _Job, resources: tuple[int, float, float]
    ) -> None:
        self.ray, self.search, self.job = ray, search, job
        self.count, gpus, cpus = resources
        # Two calls at once: one works, the other asks it to stop or how large it is.
        self.make_actor = ray.remote(TrialActor).options(
            num_gpus=gpus, num_cpus=cpus, max_concurrency=2, max_restarts=0, max_task_retries=0
        )
        self.working: dict[Any, tuple[int, Any]] = {}
        self.sizes: dict[Any, int] = {}
        self.watched = Watched(self.count)
        self.deaths_since = 0
        self.got_to = position(search)

    def run(
        self,
        stopping: Callable[[], bool],
        watch: Callable[[Watched], None],
        say: Callable[[str], None],
    ) -> None:
        """Run the search's trials.

        Raises:
            RunError: A node does not see the folder or refuses the search;
                actors die without getting anywhere.
        """
        for slot in range(self.count):
            self._start(slot)
        began, unplaced = time.monotonic(), True
        while self.working and not stopping():
            ready, _ = self.ray.wait(list(self.working), num_returns=1, timeout=POLL_SECONDS)
            for ref in ready:
                self._settle(ref)
            self._measure()
            if self.watched.own_bytes:
                unplaced = False
            elif unplaced and time.monotonic() - began > UNPLACED_SECONDS:
                unplaced = False
                say("Ray: no worker has started yet; waiting for a node with room for one")
            watch(self.watched)

    def stop(self) -> None:
        """End the actors, by request first; the running trials are saved."""
        for _, actor in self.working.values():
            with contextlib.suppress(Exception):
                actor.stop.remote()
        with contextlib.suppress(Exception):
            refs = list(self.working)
            self.ray.wait(refs, num_returns=len(refs), timeout=STOP_SECONDS)
        for _, actor in self.working.values():
            self._kill(actor)

    def _start(self, slot: int) -> None:
        actor = self.make_actor.remote()
        self.working[actor.work.remote(self.job)] = slot, actor

    def _kill(self, actor: Any) -> None:
        with contextlib.suppress(Exception):
            self.ray.kill(actor)

    def _settle(self, ref: Any) -> None:
        """Deal with an actor whose work has ended, or with its own end."""
        slot, actor = self.working.pop(ref)
        self.watched.own_bytes.pop(slot, None)
        errors = self.ray.exceptions
        try:
            ended = self.ray.get(ref)
        except errors.RayTaskError as error:
            self._kill(actor)
            raise RunError(f"Ray: a worker failed: {one_line(error)}") from error
        except errors.RayError as error:
            self._died(slot, one_line(error))
            return
        self._kill(actor)
        if ended.how == "refused":
            raise RunError(ended.why)
        if ended.how == "renew":
            self._start(slot)

    def _died(self, slot: int, reason: str) -> None:
        """Start another actor, unless they die one after the other."""
        self.watched.deaths += 1
        now = position(self.search)
        self.deaths_since = 1 if now != self.got_to else self.deaths_since + 1
        self.got_to = now
        if self.deaths_since >= MOST_DEATHS * self.count:
            raise RunError(
                f"{self.search.folder}: {self.deaths_since} workers ended one after the other;"
                f" the last: {reason}"
            )
        self._start(slot)

    def _measure(self) -> None:
        """Take what the actors said of their memory, and ask again."""
        answered, _ = (
            self.ray.wait(list(self.sizes), num_returns=len(self.sizes), timeout=0)
            if self.sizes
            else ([], [])
        )
        for ref in answered:
            slot = self.sizes.pop(ref)
            with contextlib.suppress(self.ray.exceptions.RayError):
                self.watched.own_bytes[slot] = self.ray.get(ref)
        asked = set(self.sizes.values())
        for slot, actor in self.working.values():
            if slot not in asked:
                self.sizes[actor.own_bytes.remote()] = slot
        total = sum(self.watched.own_bytes.values())
        self.watched.peak_bytes = max(self.watched.peak_bytes, total)


def run_on_ray(
    address: str,
    search: Search,
    wanted: Actors,
    deadline: float,
    stopping: Callable[[], bool],
    watch: Callable[[Watched], None] = lambda watched: None,
    say: Callable[[str], None] = lambda line: None,
) -> Watched:
    """Run a search's trials on a Ray cluster until none is left.

    Args:
        address: As in `featstore.ray_cluster.connect`.
        search: The search, its features extracted.
        wanted: The actors; one runs one trial at a time, or one group at
            `k_txt` 0.
        deadline: No trial is drawn after this `time.time()`.
        stopping: Asked all the time; True has the workers save and end.
        watch: Called all the time.
        say: Called with lines for people.

    Returns:
        What was seen.

    Raises:
        StoppedError: `stopping` said so; the running trials are saved.
        UsageError: The cluster cannot be used.
        RunError: A node cannot work on the search; workers die without getting
            anywhere.
    """
    folder = search.folder.absolute()
    marker = folder / f"{TEMPORARY}marker-{uuid.uuid4().hex[:12]}"
    token = uuid.uuid4().hex
    with connect(address) as ray:
        resources = resources_of(ray, wanted, search.space.trials)
        say("Ray: {} workers, each with {:g} GPUs and {:g} CPUs".format(*resources))
        job = _Job(
            folder=folder,
            marker=marker.name,
            token=token,
            url=search.url,
            deadline=deadline,
            here=os.getcwd(),
            threads=0 if resources[1] else int(resources[2]),
            environment={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
            arguments=tuple(sys.argv),
            command=command_line(),
        )
        driver = _Driver(ray, search, job, resources)
        write_text(marker, token)
        try:
            driver.run(stopping, watch, say)
        finally:
            driver.stop()
            marker.unlink(missing_ok=True)
    if stopping():
        raise StoppedError(
            f"{search.folder}: stopped; running trials are saved, and the same command with"
            f" --name {search.name} goes on"
        )
    return driver.watched
