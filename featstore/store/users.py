"""Who uses a store: recorded in it, so that `store gc` deletes nothing that another project needs.

<root>/users/<digest>.json            one use: a user and the digests that it needs
<root>/users/<digest>.forgotten.json  the same, of a user that was given up

A user is a configuration, or a folder of runs. A use is never changed and is named by its own
content, so any number of processes record at once without a lock, and one that is known already
costs one look at the file system. A store that may not be written is used without a record.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featstore.config import DEFAULT_FILE, RECORDS, runs_of
from featstore.errors import FeatstoreError, StoreError
from featstore.publish import (
    TEMPORARY,
    canonical_json,
    command_line,
    read_checked,
    read_json,
    text_digest,
    write_checked,
)
from featstore.store.folder import listed

FOLDER = "users"
FORMAT = 1
FORGOTTEN = ".forgotten.json"
CONFIGURATION, RUNS = "configuration", "runs"
# In a folder of runs: which one it is, whatever its path.
RUNS_ID = ".runs-id"


@dataclass(frozen=True, order=True)
class User:
    """Someone who needs features of a store.

    Attributes:
        what: "configuration" or "runs".
        path: The configuration's file, or the folder of the runs; absolute.
        identity: Tells it from another one that has the same path later, or on another
            machine: the inode of the configuration's folder, or what the folder of runs says.
    """

    what: str
    path: str
    identity: str

    def __str__(self) -> str:
        if self.what == RUNS:
            return f"the runs in {self.path}"
        path = Path(self.path)
        return self.path if path.exists() else f"settings without a file, typed in {path.parent}"

    @property
    def is_here(self) -> bool:
        """Whether it is still at its path, and can be looked at from here."""
        if self.what == CONFIGURATION:
            return _inode(Path(self.path).parent) == self.identity
        return bool(self.identity) and runs_id(Path(self.path)) == self.identity


@dataclass(frozen=True)
class Use:
    """What a user was found to need.

    Attributes:
        user: Who.
        digests: Fingerprints of features, and digests of rows and splits.
        forgotten: Whether the user was given up since.
        path: Where that is recorded.
    """

    user: User
    digests: frozenset[str]
    forgotten: bool
    path: Path


def _inode(folder: Path) -> str:
    try:
        return str(folder.stat().st_ino)
    except OSError:
        return ""


def runs_id(folder: Path) -> str:
    """Return what a folder of runs calls itself; empty where it does not, or cannot be read."""
    try:
        return str(read_json(folder / RUNS_ID)["id"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _made_runs_id(folder: Path) -> str:
    """Return the same, and give it an identity where it has none; of several at once, one wins."""
    if known := runs_id(folder):
        return known
    made = folder / f"{TEMPORARY}{uuid.uuid4().hex}"
    with contextlib.suppress(OSError):
        try:
            made.write_text(f'{{"id": "{uuid.uuid4().hex}"}}\n', encoding="utf-8")
            os.link(made, folder / RUNS_ID)
        finally:
            made.unlink(missing_ok=True)
    return runs_id(folder)


def user_of(file: Path | None) -> User:
    """Return who a configuration's file stands for: itself, or the runs that it is of.

    Args:
        file: The file; None: settings without one, of the working directory.
    """
    path = Path(os.path.abspath(file or DEFAULT_FILE))
    if any((path.parent / name).exists() for name in RECORDS):
        runs = runs_of(path.parent)
        return User(RUNS, str(runs), _made_runs_id(runs))
    return User(CONFIGURATION, str(path), _inode(path.parent))


def record_use(root: Path, user: User, digests: Iterable[str]) -> None:
    """Record that a user needs something of a store; a store that refuses goes without.

    Args:
        root: The store's root; nothing is recorded where there is none.
        user: See `user_of`.
        digests: Fingerprints of features, and digests of rows and splits.
    """
    needed = sorted(set(digests))
    content: dict[str, Any] = {"format": FORMAT, **vars(user), "digests": needed}
    path = root / FOLDER / f"{text_digest(canonical_json(content))}.json"
    if user.identity and root.is_dir() and not path.exists():
        with contextlib.suppress(FeatstoreError, OSError):
            write_checked(path, {**content, "command": command_line()})


def read_uses(root: Path) -> list[Use]:
    """Return what is recorded of a store's users.

    Raises:
        StoreError: A record cannot be read: what its user needs is not known.
    """
    found = []
    for path in listed(root / FOLDER):
        if not path.name.endswith(".json") or path.name.startswith(TEMPORARY):
            continue
        try:
            content = read_checked(path)
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}, expected {FORMAT}")
            user = User(str(content["what"]), str(content["path"]), str(content["identity"]))
            digests = frozenset(map(str, content["digests"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{path}: cannot be read ({error}), so what a user of this store needs is not"
                " known; restore the file, or delete it if that user is gone for good"
            ) from error
        found.append(Use(user, digests, path.name.endswith(FORGOTTEN), path))
    return found


def give_up(use: Use) -> None:
    """Give up a use: what it names may go, and is known to have had a user.

    Raises:
        OSError: The record cannot be renamed.
    """
    if not use.forgotten:
        os.replace(use.path, use.path.with_name(use.path.stem + FORGOTTEN))
