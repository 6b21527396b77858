"""What a check of a store finds: problems, each with its remedy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featstore.errors import Advice, Command, shown
from featstore.store.shard import (
    REPAIR,
)

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it was published.

    Attributes:
        what: "no access", "spec", "manifest", "quarantine", "missing shard", "unreadable
            shard", "unlisted shard", "damaged rows", "damaged bytes",
            "repeated keys", "other shape", "changed photos" or "vanished
            photos".
        path: The file.
        detail: What was found, in one line.
        rows: Row numbers inside the shard, where rows are meant.
        keys: Their keys; of an unreadable shard, those that can be told.
        mend: What to type.
    """

    what: str
    path: Path
    detail: str
    rows: tuple[int, ...] = ()
    keys: tuple[str, ...] = ()
    mend: Command | Advice = REPAIR

    def to_dict(self, show: Callable[[Command], str] = Command.line) -> dict[str, Any]:
        """Return it JSON-able, its remedy's commands written by `show`."""
        return {
            "what": self.what,
            "path": str(self.path),
            "detail": self.detail,
            "rows": list(self.rows),
            "keys": list(self.keys),
            "mend": shown(self.mend, show),
        }


@dataclass
class FolderReport:
    """What a check of one feature folder found.

    Attributes:
        folder: Of the features.
        shards: Shards on the disk.
        rows: Rows in the shards that can be read, superseded ones included.
        checked_rows: Rows whose checksum was compared.
        problems: What is wrong; empty where all is well.
        notes: What is worth knowing and harms nothing.
    """

    folder: Path
    shards: int = 0
    rows: int = 0
    checked_rows: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[Advice] = field(default_factory=list)

    def to_dict(self, show: Callable[[Command], str] = Command.line) -> dict[str, Any]:
        """Return it JSON-able, the commands of remedies and notes written by `show`."""
        return {
            "folder": str(self.folder),
            "kind": self.folder.parent.name,
            "fingerprint": self.folder.name,
            "shards": self.shards,
            "rows": self.rows,
            "checked_rows": self.checked_rows,
            "problems": [problem.to_dict(show) for problem in self.problems],
            "notes": [shown(note, show) for note in self.notes],
        }
