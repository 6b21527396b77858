"""What the runs and searches of a folder refer to in a store."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from featstore.config import RECORDS
from featstore.errors import RunError
from featstore.publish import read_json
from featstore.store.shard import MAKE_READABLE

STATE = "last.npz"  # of a run, beside its manifest
DIGEST = re.compile(r"(?<![0-9a-zA-Z])[0-9a-f]{32}(?![0-9a-zA-Z])")


@dataclass(frozen=True)
class Runs:
    """What a folder of runs needs, and what it has no use for.

    Attributes:
        digests: Every fingerprint and split digest that a run or a search names.
        old_states: The optimizer states that finished runs of earlier versions left.
    """

    digests: set[str] = field(default_factory=set)
    old_states: list[Path] = field(default_factory=list)


def read_runs(runs: Path) -> Runs:
    """Read what runs and searches below a folder wrote of themselves.

    Raises:
        RunError: One cannot be read: what it refers to is not known.
    """
    found = Runs()
    for path in _records(runs):
        try:
            record = read_json(path)
            digests = DIGEST.findall(json.dumps(record))
            if not isinstance(record, dict) or not digests:
                raise ValueError("it names no features")
        except (OSError, ValueError) as error:
            raise RunError(
                f"{path}: cannot be read ({error}), so the features that the run needs are not"
                " known; mend or delete that run first"
            ) from error
        found.digests.update(digests)
        state = path.with_name(STATE)
        has_state = path.name == "manifest.json" and state.is_file()
        if has_state and record.get("status") == "finished" and not record.get("keeps_state"):
            found.old_states.append(state)
    return found


def _records(runs: Path) -> list[Path]:
    """Return what runs and searches wrote of themselves; links to folders are followed.

    A search names the features of its trials before it has any.

    Raises:
        RunError: A folder cannot be listed. Passed over, its runs would not count.
    """

    def refuse(error: OSError) -> None:
        raise RunError(
            f"{error.filename}: cannot be listed ({error.strerror}), so the features that its"
            f" runs need are not known",
            MAKE_READABLE,
        ) from error

    found, seen = [], set[str]()
    if runs.exists():
        for folder, inner, names in os.walk(runs, onerror=refuse, followlinks=True):
            seen.add(os.path.realpath(folder))
            inner[:] = [name for name in inner if os.path.realpath(f"{folder}/{name}") not in seen]
            found += [Path(folder, name) for name in names if name in RECORDS]
    return sorted(found)
