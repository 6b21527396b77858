"""Claims on a features folder: who plans, who is at work, who has it for itself.

    .lock             held for moments: to plan, or to give a shard its name
    .claim-worker-…   held by each process at work as long as it lives
    .claim-00003      held by the one that makes shard 3

A lock belongs to a process: the system takes it back when that dies, and
another one goes on. Who needs the folder for itself (`writing`) waits until
nobody is at work.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import filelock

from featstore.errors import StoreError
from featstore.publish import (
    remove_leftovers,
)

LOCK = ".lock"
CLAIM = ".claim-"
WORKER = f"{CLAIM}worker-"


def take_lock(path: Path, timeout_seconds: float) -> filelock.BaseFileLock:
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
def locked(folder: Path, timeout_seconds: float = -1) -> Iterator[None]:
    lock = take_lock(folder / LOCK, timeout_seconds)
    try:
        yield
    finally:
        lock.release()


def try_lock(path: Path) -> filelock.BaseFileLock | None:
    """Take a lock if nobody has it."""
    lock = filelock.FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return None
    return lock


def _is_held(path: Path) -> bool:
    lock = try_lock(path)
    if lock is not None:
        lock.release()
    return lock is None


def workers(folder: Path, own: Path | None = None) -> list[Path]:
    """Return the claims of other living workers. The caller holds the lock."""
    return [path for path in sorted(folder.glob(f"{WORKER}*")) if path != own and _is_held(path)]


def clean(folder: Path, own: Path | None = None) -> None:
    """Delete what the dead left. The caller holds the lock, and nobody else is at work."""
    remove_leftovers(folder)
    for path in folder.glob(f"{CLAIM}*"):
        if path != own:
            path.unlink(missing_ok=True)


def wait_for_owner(path: Path, timeout_seconds: float = -1) -> None:
    """Wait until the owner of a claim is gone."""
    take_lock(path, timeout_seconds).release()


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
        with locked(folder, left):
            others = workers(folder)
            if not others:
                clean(folder)
                yield
                return
        wait_for_owner(others[0], left)
