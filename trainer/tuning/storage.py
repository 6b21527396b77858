"""Where Optuna keeps a study: a journal in the search's folder, or a database."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import filelock
import optuna
from optuna.storages.journal import JournalFileBackend

from featstore.errors import Advice, RunError, UsageError
from featstore.publish import PASSWORD, may_write, write_error


@contextlib.contextmanager
def quiet_optuna() -> Iterator[None]:
    """Keep Optuna from printing, and leave its verbosity and the warnings' filters as they were."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def masked(url: str) -> str:
    """Return a storage URL without its password."""
    return PASSWORD.sub(r"\1***@", url)


def driver_url(url: str) -> str:
    """Return a PostgreSQL URL with the driver that the project installs, others as they are."""
    for scheme in ("postgresql://", "postgres://"):
        if url.startswith(scheme):
            return f"postgresql+psycopg://{url.removeprefix(scheme)}"
    return url


def open_storage(folder: Path, url: str | None) -> optuna.storages.BaseStorage:
    """Return where a study is kept: a journal in its folder, or a database.

    Args:
        folder: The search's folder, on a file system that all workers see.
        url: Such as `postgresql://user:password@host/database`; None: the
            journal.

    Raises:
        UsageError: The database cannot be reached, its driver is missing, or the
            password is where it would be written down with the command.
        WriteError: The journal cannot be made.
    """
    if url is not None and "password=" in url:
        raise UsageError(
            "--storage: its password is not looked for after the ?; expected a URL such as"
            " postgresql://user:password@host/database"
        )
    if url is None:
        return optuna.storages.JournalStorage(_Journal(folder))
    try:
        return optuna.storages.RDBStorage(driver_url(url), engine_kwargs={"pool_pre_ping": True})
    except ImportError as error:
        raise UsageError(
            f"--storage {masked(url)}: its driver is not installed ({error.name or error});"
            " for PostgreSQL: pip install -e '.[postgresql]'"
        ) from error
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise UsageError(
            f"--storage {masked(url)}: cannot be opened ({reason[0] if reason else error});"
            " expected a URL such as postgresql://user:password@host/database"
        ) from error


class _Journal(JournalFileBackend):
    """Optuna's journal, whose refused writes and damaged lines are errors of one line.

    Someone else's search can be looked at: of a folder that may not be written, a copy is opened.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "study.journal"
        if self._path.exists() and not may_write(folder):
            # Goes when this object does.
            self._copied = tempfile.TemporaryDirectory()
            self._path = Path(shutil.copy(self._path, self._copied.name))
            self._path.chmod(0o600)
        # Optuna names no public type for it; it asks for these two methods.
        lock: Any = _JournalLock(self._path)
        try:
            super().__init__(str(self._path), lock)
        except OSError as error:
            raise write_error(self._path, error) from error

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """Read the journal from a line on.

        Raises:
            RunError: A line is not what was written.
        """
        try:
            yield from super().read_logs(log_number_from)
        except ValueError as error:
            raise RunError(
                f"{self._path}: a line is damaged ({error})",
                Advice(
                    "restore it; or delete that line and all after it, and the search draws again"
                    " what they said"
                ),
            ) from error

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append to the journal.

        Raises:
            WriteError: The disk is full, or refuses.
        """
        try:
            super().append_logs(logs)
        except OSError as error:
            # The lock takes a line that was cut short away before the next one is written.
            raise write_error(self._path, error) from error


class _JournalLock:
    """The journal's lock, held by the process: the system takes it back when that dies.

    A line that a killed writer or a full disk cut short is taken away before
    the next one is written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = filelock.FileLock(f"{path}.lock")

    def acquire(self) -> bool:
        """Take the lock, waiting for it."""
        self._lock.acquire()
        _cut_torn_line(self._path)
        return True

    def release(self) -> None:
        """Give it back."""
        self._lock.release()


def _cut_torn_line(path: Path) -> None:
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        if not size:
            return
        file.seek(size - 1)
        if file.read(1) == b"\n":
            return
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
