"""The lists of a features folder, each with what tells whether it was changed.

<root>/<kind>/<fingerprint>/
    spec.json         the spec, and the names it was known by
    shard-00000.h5 …  immutable (see `shard.py`)
    manifest.json     name, rows, bytes and digest of each shard; can be
                      rebuilt from the shards, and is needed: without it
                      nobody could tell that the newest shard is lost
    quarantine.json   inputs that could not be encoded, each with its reason
    plan.json .claim-* .lock   of the processes that extract (see
                      `featstore/extract/worklist.py`)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from featstore.encoders.spec import FORMAT, FeatureSpec, canonical_json, format_of
from featstore.errors import (
    Advice,
    CorruptShardError,
    StoreError,
)
from featstore.publish import (
    checksum,
    command_line,
    package_versions,
    read_json,
    text_digest,
    write_checked,
    write_json,
)
from featstore.store.shard import (
    MAKE_READABLE,
    REPAIR,
    VERIFY,
    describe_file,
    open_shard,
    shard_number,
)

# In place of a photo's digest: its newest features were lost, and older ones are stale.
LOST = [0, 0]
MEND_QUARANTINE = Advice("run ", REPAIR, ", or delete it and extract again")
FIRST_FIELDS = {"format", "fingerprint", "command", "versions", "quarantine", "shards"}


def listed(folder: Path) -> list[Path]:
    """Return what is in a folder, by name; nothing where there is no folder.

    Raises:
        StoreError: It may not be listed. `Path.glob` would find it empty, and
            what is there would count as never extracted, or as needed by nobody.
    """
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StoreError(f"{folder}: cannot be listed ({error.strerror})", MAKE_READABLE) from error


def shard_paths(folder: Path) -> list[Path]:
    """Return the published shards of a folder in their order.

    A file of any other name, such as a copy that someone made, is no shard:
    its rows would count as the newest.

    Raises:
        StoreError: The folder may not be listed.
    """
    found = [path for path in listed(folder) if shard_number(path) is not None]
    return sorted(found, key=lambda path: (len(path.name), path.name))


def _manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest; an absent or broken one is empty."""
    try:
        found = read_json(folder / "manifest.json")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def manifest_damage(folder: Path) -> str:
    """Say what is wrong with a folder's manifest; empty where nothing is.

    It is written before the first shard, so a folder with shards and without
    it has lost it. A manifest of the first version has no checksum.
    """
    path = folder / "manifest.json"
    try:
        found = read_json(path)
    except FileNotFoundError:
        # Looked for again: a new folder's first shard may have been published meanwhile.
        return "is missing" if shard_paths(folder) and not path.exists() else ""
    except (OSError, ValueError) as error:
        return f"cannot be read ({error})"
    if not isinstance(found, dict) or not isinstance(found.get("shards"), list):
        return "has no list of shards"
    lines = read_manifest(folder)
    if len(lines) != len(found["shards"]):
        return "its lines cannot be read"
    if len({line["name"] for line in lines}) != len(lines):
        return "it lists a shard twice"
    if (found.get("format", FORMAT), found.get("fingerprint", folder.name)) != (
        FORMAT,
        folder.name,
    ):
        return "its format or fingerprint is not this folder's"
    try:
        if "checksum" in found:
            changed = found["checksum"] != checksum(found)
        else:
            # The first version had no other fields: this may have been the checksum's name.
            changed = not found.keys() <= FIRST_FIELDS
    except StoreError as error:
        return f"cannot be read ({error})"
    return "its text was changed (checksum differs)" if changed else ""


def read_manifest(folder: Path) -> list[dict[str, Any]]:
    """Return the manifest's shard lines; an absent or broken manifest gives none."""
    try:
        lines = [dict(line) for line in _manifest(folder)["shards"]]
    except (ValueError, KeyError, TypeError):
        return []
    sound = all(
        isinstance(line.get("name"), str)
        # A name that leads elsewhere would be read, or deleted, there.
        and shard_number(Path(line["name"])) is not None
        and Path(line["name"]).name == line["name"]
        and type(line.get("bytes")) is int
        for line in lines
    )
    return lines if sound else []


def manifest_lines(folder: Path) -> list[tuple[Path, dict[str, Any] | None]]:
    """Return each shard on the disk with its line of the manifest, if it has one.

    Raises:
        CorruptShardError: The manifest is damaged or lost, or a shard of it is
            gone or has another size.
    """
    if damage := manifest_damage(folder):
        raise CorruptShardError(f"{folder / 'manifest.json'}: {damage}", REPAIR)
    # The manifest first: a shard that is published meanwhile has no line, and no line is lost.
    known = {line["name"]: line for line in read_manifest(folder)}
    found = []
    for path in shard_paths(folder):
        line = known.pop(path.name, None)
        try:
            size = path.stat().st_size
        except OSError as error:
            raise CorruptShardError(f"{path}: {error.strerror}", VERIFY) from error
        if line is not None and line["bytes"] != size:
            raise CorruptShardError(f"{path}: {size} bytes, expected {line['bytes']}", VERIFY)
        found.append((path, line))
    if known:
        raise CorruptShardError(f"{folder}: shard {next(iter(known))} is missing", VERIFY)
    return found


def reconcile_manifest(folder: Path) -> list[dict[str, Any]]:
    """Return one line for each shard on the disk.

    A shard that a kill left out of the manifest is described from its file.

    Raises:
        CorruptShardError: The manifest is damaged or lost; a shard of it is
            gone, or has another size than when it was published; or a shard
            that is not in it is damaged.
    """
    lines = []
    for path, line in manifest_lines(folder):
        if line is None:
            spec = read_spec(folder)
            rows = len(open_shard(path, spec["kind"], folder.name, spec["dtype"]))
            line = {"name": path.name, "rows": rows, **describe_file(path)}
        lines.append(line)
    return lines


def write_manifest(folder: Path, fingerprint: str, lines: list[dict[str, Any]]) -> None:
    """Publish the manifest; the quarantine list, if there is one, is written before."""
    manifest = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "command": command_line(),
        "versions": package_versions(),
        "quarantine": (folder / "quarantine.json").exists(),
        "shards": lines,
    }
    write_checked(folder / "manifest.json", manifest)


def quarantine_checksum(key: str, entry: Mapping[str, Any]) -> str:
    """Return the XXH3-64 of one entry of the quarantine list and its key."""
    text = json.dumps([key, entry["reason"], entry["source_digest"]])
    return xxhash.xxh3_64_hexdigest(text.encode())


def write_quarantine(folder: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Publish the quarantine list, each entry with its checksum."""
    checked = {
        key: {**entry, "checksum": quarantine_checksum(key, entry)}
        for key, entry in entries.items()
    }
    write_json(folder / "quarantine.json", checked)


def _is_sound(key: str, entry: Any) -> bool:
    """Tell whether a quarantine entry is one, with its checksum if it has any."""
    if not isinstance(entry, dict) or not entry.keys() >= {"reason", "source_digest"}:
        return False
    digest = entry["source_digest"]
    if digest is not None and not (
        isinstance(digest, list)
        and len(digest) == 2
        and all(type(part) is int and 0 <= part < 1 << 64 for part in digest)
    ):
        return False
    if not isinstance(entry["reason"], str) or any("\ud800" <= c <= "\udfff" for c in key):
        return False
    if "checksum" not in entry:
        # The first version had no other fields: this may have been the checksum's name.
        return entry.keys() == {"reason", "source_digest"}
    return bool(entry["checksum"] == quarantine_checksum(key, entry))


def salvage_quarantine(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the sound entries of a damaged quarantine list."""
    try:
        entries = read_json(folder / "quarantine.json")
    except (OSError, ValueError):
        return {}
    if not isinstance(entries, dict):
        return {}
    return {
        key: {"reason": entry["reason"], "source_digest": entry["source_digest"]}
        for key, entry in entries.items()
        if _is_sound(key, entry)
    }


def read_quarantine(folder: Path, with_lost: bool = False) -> dict[str, dict[str, Any]]:
    """Return key to {reason, source_digest} of the inputs that could not be encoded.

    Args:
        folder: Of the features.
        with_lost: Also return the photos whose newest features a repair could
            not restore; until they are extracted again they have none.

    Raises:
        CorruptShardError: The list was changed, or is gone though the manifest
            says that there is one.
    """
    path = folder / "quarantine.json"
    try:
        entries = read_json(path)
    except FileNotFoundError:
        if _manifest(folder).get("quarantine"):
            raise CorruptShardError(
                f"{path}: is missing, the manifest says that there is one",
                REPAIR,
            ) from None
        return {}
    except (OSError, ValueError) as error:
        raise CorruptShardError(f"{path}: cannot be read ({error})", MEND_QUARANTINE) from error
    if not isinstance(entries, dict):
        raise CorruptShardError(
            f"{path}: expected key to reason and source_digest", MEND_QUARANTINE
        )
    for key, entry in entries.items():
        if not _is_sound(key, entry):
            raise CorruptShardError(
                f"{path}: the entry of {key!r} was changed, or has no reason and source_digest",
                MEND_QUARANTINE,
            )
    return {
        key: {"reason": entry["reason"], "source_digest": entry["source_digest"]}
        for key, entry in entries.items()
        if with_lost or entry["source_digest"] != LOST
    }


# What every reader of a spec relies on, and the type that it has.
RELIED_ON = {"kind": str, "dtype": str, "boundary": int, "architecture": dict}


def read_spec(folder: Path) -> dict[str, Any]:
    """Read a features folder's `spec.json` and check it against the folder's name.

    Raises:
        CorruptShardError: The file is missing, is not JSON, or its fingerprint
            is not the folder's name.
    """
    path = folder / "spec.json"
    try:
        spec = read_json(path)["spec"]
        text = canonical_json(spec)
    except (OSError, ValueError, KeyError, TypeError, StoreError) as error:
        raise CorruptShardError(f"{path}: no readable spec ({error})") from error
    found = text_digest(text)
    if found != folder.name:
        raise CorruptShardError(
            f"{path}: fingerprint {found} does not match its folder; the file was changed"
        )
    if not isinstance(spec, dict):
        raise CorruptShardError(f"{path}: no readable spec (found {type(spec).__name__})")
    if spec.get("format") != (known := format_of(spec.get("dtype"))):
        raise StoreError(
            f"{path}: store format {spec.get('format')!r}; this version reads format {known}"
        )
    for name, kind in RELIED_ON.items():
        if type(spec.get(name)) is not kind:
            raise CorruptShardError(
                f"{path}: no readable spec ({name} is {type(spec.get(name)).__name__}, expected"
                f" {kind.__name__})"
            )
    return spec


def read_names(folder: Path) -> list[str]:
    """Return the preset names that a folder's features are known by, if any can be read."""
    try:
        names = read_json(folder / "spec.json")["names"]
        return [str(name) for name in names.values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def write_spec(folder: Path, spec: FeatureSpec, names: dict[str, str]) -> None:
    """Publish a features folder's `spec.json`, with the names that people know it by."""
    write_json(
        folder / "spec.json",
        {"spec": spec.to_dict(), "names": names, "command": command_line()},
    )
