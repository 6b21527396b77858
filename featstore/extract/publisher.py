"""Give finished shards their names, by a written plan that processes share."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from featstore.encoders.spec import FORMAT, FeatureSpec
from featstore.errors import StoreError
from featstore.extract.claims import (
    locked,
)
from featstore.publish import (
    package_versions,
    publish,
    read_json,
    text_digest,
    write_json,
)
from featstore.store.folder import (
    manifest_damage,
    read_manifest,
    read_quarantine,
    write_manifest,
    write_quarantine,
)
from featstore.store.shard import describe_file, shard_name
from featstore.store.write import ShardRows, write_shard

PLAN = "plan.json"
# Key to the reason and the digest of a photo that failed.
Failed = Mapping[str, tuple[str, tuple[int, int] | None]]


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
        return contextlib.nullcontext() if self.token is None else locked(self.folder)

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
            and found["token"] == plan_token(found)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(found) if sound else None


def plan_token(written: Mapping[str, Any]) -> str:
    """Return the digest of a plan: of its request, its numbers and its rows."""
    fields = [written[name] for name in ("request", "first", "shard_rows", "keys")]
    return text_digest(json.dumps(fields))
