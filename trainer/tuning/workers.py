"""The processes of a search on one machine: start, watch, replace, stop."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from featstore.config import usable_cores
from featstore.encoders.framework import import_framework, in_own_process, limit_threads
from featstore.errors import (
    Advice,
    Command,
    FeatstoreError,
    RunError,
    StoppedError,
    UsageError,
    WriteError,
)
from featstore.publish import command_line, work_for
from trainer.model.sizes import step_threads
from trainer.tuning.memory import anonymous_bytes, machine_bytes
from trainer.tuning.study import Search

POLL_SECONDS = 0.5
# Workers that die one after the other while no trial gets on.
MOST_DEATHS = 3
STOP_SECONDS = 60.0
# TensorFlow keeps each custom gradient, and with it a model's arrays, as long as the process
# lives. A worker that has grown so much ends with this code and is replaced.
MEMORY_GROWTH = 2.0
RENEW = 75


@dataclass
class Watched:
    """What is known of the workers.

    Attributes:
        workers: How many there are to be.
        peak_bytes: Most memory of their own that all of them held at once.
        deaths: Workers that ended by a signal or an error and were replaced.
        low_memory: Whether the machine came close to its end of memory.
    """

    workers: int = 1
    peak_bytes: int = 0
    deaths: int = 0
    low_memory: bool = False
    own_bytes: dict[int, int] = field(default_factory=dict)


@dataclass
class _Worker:
    """A worker's process, and where it sends the error that ended it."""

    process: SpawnProcess
    errors: Connection

    def error(self) -> FeatstoreError | None:
        """Return the error that a worker that is no longer alive sent."""
        with contextlib.suppress(EOFError, OSError):
            if self.errors.poll():
                error: FeatstoreError = self.errors.recv()
                return error
        return None


def run_workers(
    search: Search,
    workers: int,
    deadline: float,
    stopping: Callable[[], bool],
    watch: Callable[[Watched], None] = lambda watched: None,
) -> Watched:
    """Run a search's trials in processes of this machine until none is left.

    A process that dies is replaced; its trial is gone on with.

    Args:
        search: The search, its features extracted.
        workers: How many processes.
        deadline: No trial is drawn after this `time.time()`.
        stopping: Asked all the time; True has the workers save and end.
        watch: Called all the time.

    Returns:
        What was seen.

    Raises:
        StoppedError: `stopping` said so; the running trials are saved.
        RunError: Workers die without getting anywhere.
        UsageError: Keras cannot be imported, or has no device.
        WriteError: A worker could not write a file; the running trials are saved.
    """
    context = multiprocessing.get_context("spawn")
    threads = _threads(search, workers)
    alive: dict[int, _Worker] = {}
    watched = Watched(workers)
    deaths_since, got_to = 0, position(search)
    log = search.folder / "worker-0.log"
    try:
        for slot in range(workers):
            alive[slot] = _start(context, search, slot, deadline, threads)
        while alive:
            wait([worker.process.sentinel for worker in alive.values()], POLL_SECONDS)
            for slot, worker in list(alive.items()):
                process = worker.process
                if process.is_alive():
                    continue
                del alive[slot]
                if process.exitcode == 0 or stopping():
                    continue
                if process.exitcode == RENEW:
                    alive[slot] = _start(context, search, slot, deadline, threads)
                    continue
                error = worker.error()
                if isinstance(error, UsageError):
                    # Of the machine or its settings: the next worker would say the same.
                    raise error
                if isinstance(error, WriteError):
                    raise WriteError(
                        f"{search.folder}: a worker could not go on: {error.message}",
                        Advice(
                            "the running trials are kept; free space or permissions, then ",
                            Command("search", name=search.name, bare=True),
                            " goes on",
                        ),
                    ) from error
                watched.deaths += 1
                now = position(search)
                deaths_since, got_to = (1, now) if now != got_to else (deaths_since + 1, got_to)
                log = search.folder / f"worker-{slot}.log"
                if deaths_since >= MOST_DEATHS:
                    raise RunError(
                        f"{search.folder}: {deaths_since} workers ended one after the other"
                        f" ({_ending(process.exitcode)}); {_last_line(log)}"
                    )
                alive[slot] = _start(context, search, slot, deadline, threads)
            _measure(watched, alive)
            watch(watched)
            if stopping():
                break
    finally:
        _stop(alive)
    if stopping():
        raise StoppedError(
            f"{search.folder}: stopped; running trials are saved, and the same command with"
            f" --name {search.name} goes on"
        )
    return watched


def _threads(search: Search, workers: int) -> tuple[int, int]:
    """Return what `limit_threads` is told in each worker."""
    if workers > 1:
        share = max(1, usable_cores() // workers)
        return share, share
    rows = search.space.largest_batch(search.base)
    configs = search.space.feature_configs(search.base)
    return min(step_threads(each, rows) for each in configs), 0


def _start(
    context: Any, search: Search, slot: int, deadline: float, threads: tuple[int, int]
) -> _Worker:
    receiver, sender = context.Pipe(duplex=False)
    process: SpawnProcess = context.Process(
        target=work_in_process,
        args=(str(search.folder), search.url, deadline, slot, threads, sender, command_line()),
        name=f"worker-{slot}",
    )
    process.start()
    sender.close()
    return _Worker(process, receiver)


def position(search: Search) -> tuple[int, int]:
    """Return how far the search got: epochs reported, trials ended."""
    drawn = search.drawn()
    ended = sum(trial.state.is_finished() for trial in drawn)
    return sum(len(trial.intermediate_values) for trial in drawn), ended


def _measure(watched: Watched, alive: dict[int, _Worker]) -> None:
    pids = {slot: worker.process.pid for slot, worker in alive.items()}
    watched.own_bytes = {slot: anonymous_bytes(pid) for slot, pid in pids.items() if pid}
    watched.peak_bytes = max(watched.peak_bytes, sum(watched.own_bytes.values()))
    total, available = machine_bytes()
    watched.low_memory |= bool(total) and available < total // 20


def _stop(alive: dict[int, _Worker]) -> None:
    """End what still runs, by request first."""
    processes = [worker.process for worker in alive.values()]
    for process in processes:
        process.terminate()
    until = time.monotonic() + STOP_SECONDS
    try:
        for process in processes:
            process.join(max(0.0, until - time.monotonic()))
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"


def _last_line(log: Path) -> str:
    try:
        lines = [
            line for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()
        ]
    except OSError:
        lines = []
    return f"last line of {log}: {lines[-1]}" if lines else f"see {log}"


def work_in_process(
    folder: str,
    url: str | None,
    deadline: float,
    slot: int,
    threads: tuple[int, int],
    errors: Connection,
    command: str,
) -> None:
    """Be a worker: run trials until none is left, or until asked to stop.

    SIGTERM, or the end of the process that started this one, has the running
    trials saved first.

    Args:
        folder: The search's folder.
        url: Its storage.
        deadline: No trial is drawn after this `time.time()`.
        slot: The worker's number; names its log.
        threads: As `limit_threads` takes them.
        errors: Is sent the error that ends it, if one does.
        command: That its trials record as theirs.
    """
    work_for(command)
    in_own_process()
    # Its own group: Ctrl-C goes to the one that started it, who asks properly.
    os.setsid()
    _print_to(Path(folder) / f"worker-{slot}.log")
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: asked.set())
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent, asked), daemon=True).start()
    try:
        import_framework()
        # Here, not above: who starts workers has no need of Keras, which takes seconds to import.
        from trainer.tuning.trials import work_in

        limit_threads(*threads)
        if work_in(Path(folder), url, asked.is_set, deadline, MEMORY_GROWTH):
            sys.exit(RENEW)
    except StoppedError:
        sys.exit(StoppedError.exit_code)
    except FeatstoreError as error:
        errors.send(error)
        try:
            print(f"error: {error}", file=sys.stderr)
        except OSError:
            # Its log is on the full disk too, and what is left of it to write would be tried again.
            os._exit(error.exit_code)
        sys.exit(error.exit_code)
    finally:
        # As at the end of a command.
        gc.freeze()


def _follow(parent: Any, asked: threading.Event) -> None:
    parent.join()
    asked.set()


def _print_to(log: Path) -> None:
    """Send what this process prints, its compiled code's lines too, to a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace")
