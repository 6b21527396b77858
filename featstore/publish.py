"""Files that appear whole or not at all.

A file is written under a temporary name beside its final one, flushed to the
disk, renamed, and the folder's entry flushed too. A kill at any moment leaves
the old file or the new one; what remains of an unfinished one starts with
`TEMPORARY` and is removed by the next writer of the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import stat
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from featstore.errors import Advice, StoreError, WriteError
from featstore.progress import running_call
from featstore.quantities import size

# Of `scheme://user:password@host`; a password may have an @ of its own.
PASSWORD = re.compile(r"(\w+://[^\s/:@]*:)\S*@")
TEMPORARY = ".tmp-"
MAKE_ROOM = "free space or permissions, then run the command again"
# Left free beside what a check of the space was for: a table, a picture, some lines of a log.
SPARE_BYTES = 1_000_000
RECORDED_PACKAGES = (
    "featstore",
    "tensorflow",
    "jax",
    "keras",
    "keras-hub",
    "numpy",
    "h5py",
    "pillow",
)


def package_versions() -> dict[str, str]:
    """Return the versions that an output records: Python and the packages that shape numbers."""
    import importlib.metadata  # here, since `--help` answers sooner without it

    found = {"python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def program() -> str:
    """Return what the running program was called by, as its user typed it."""
    path = Path(sys.argv[0])
    if path.name == "__main__.py":
        return f"python -m {path.parent.name}"
    return f"python {path.name}" if path.suffix == ".py" else path.name


def interactive() -> bool:
    """Tell whether Python is typed at: in a notebook or at a prompt, or as `python -c`."""
    path = Path(sys.argv[0])
    kernel = path.stem.endswith("kernel_launcher") or path.parent.name == "ipykernel"
    return kernel or path.name in ("", "-c", "ipython", "ipython3")


_asked_by = ""


def work_for(command: str) -> None:
    """Have outputs of this process, a worker's, record the command of who started it."""
    global _asked_by
    _asked_by = command


def command_line() -> str:
    """Return the command that is running, as it could be typed again; a URL's password is not.

    Where Python is typed at, it is the call of this package's that is running, or "Python".
    A worker's is that of who started it, see `work_for`.
    """
    if _asked_by:
        return _asked_by
    if interactive():
        line = running_call() or "Python"
    else:
        line = " ".join([program(), shlex.join(sys.argv[1:])]).strip()
    return PASSWORD.sub(r"\1***@", line)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def nearest(folder: Path) -> Path:
    """Return a folder, or where it is not there yet the nearest above it that is."""
    above = (folder, *folder.absolute().parents)
    return next((path for path in above if path.exists()), folder)


def may_write(folder: Path) -> bool:
    """Tell whether a folder can be written, or made where it is not there yet."""
    effective = os.access in os.supports_effective_ids
    return os.access(nearest(folder), os.W_OK, effective_ids=effective)


def check_may_write(path: Path, mend: Advice) -> None:
    """See that a file can be written into its folder, before the work that is to fill it.

    Args:
        path: The file; its folder need not be there yet.
        mend: What to do where it cannot.

    Raises:
        WriteError: There is no right to.
    """
    if not may_write(path.parent):
        where = nearest(path.parent)
        raise WriteError(f"{path}: cannot be written (no right to write into {where})", mend)


def check_space(folder: Path, num_bytes: int) -> None:
    """See that a disk has room for what is about to be written, with some to spare.

    Args:
        folder: Where; it need not be there yet.
        num_bytes: What is to be written.

    Raises:
        WriteError: The disk has less than that free.
    """
    try:
        free = shutil.disk_usage(nearest(folder)).free
    except OSError:
        # A file system that does not say: the write itself will.
        return
    if free < num_bytes + SPARE_BYTES:
        raise WriteError(
            f"{folder}: needs {size(num_bytes + SPARE_BYTES)}, and {size(free)} of"
            " the disk are free",
            Advice("free some space, then run the command again"),
        )


def write_error(path: Path, error: OSError, state: str = "nothing was changed") -> WriteError:
    """Return the error of a file that could not be written, with its reason and what mends it."""
    reason = error.strerror or str(error)
    return WriteError(
        f"{path}: cannot be written ({reason}); {state}",
        Advice(MAKE_ROOM),
    )


@contextlib.contextmanager
def publish(path: Path, before: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Yield a temporary path to write; on success it becomes `path`.

    The folder is made when it is missing. On an exception the temporary file
    is removed and `path` is left as it was.

    Args:
        path: The final name.
        before: Called when the file is whole and on the disk, right before it
            gets its name; an exception keeps it from getting it.

    Raises:
        WriteError: The file system refused (full, read-only, no permission);
            the message names the path and the reason.
    """
    # Unique even between threads of one process that publish the same path.
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{uuid.uuid4().hex[:12]}-{path.name}")
    state = "nothing was changed"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        before()
        os.replace(temporary, path)
        state = "it is there, but a power cut may still undo it"
        _sync(path.parent)
    except OSError as error:
        raise write_error(path, error, state) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_bytes(path: str | os.PathLike[str], data: bytes | memoryview) -> None:
    """Publish a file."""
    with publish(Path(path)) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Publish a UTF-8 text file."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Publish a JSON file, indented, keys in the order given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def why_not_kept(write: Callable[[], object]) -> str | None:
    """Write a report; return why that was refused, None where it was not.

    What was computed is not lost with its file, as in the folder of someone else's run.
    """
    try:
        write()
    except (WriteError, OSError) as error:
        return str(error).partition(";")[0]
    return None


def check_kept(what: str, not_kept: str | None, mend: Advice | None = None) -> None:
    """Refuse to go on without a report, see `why_not_kept`.

    Args:
        what: The start of the error, up to the reason.
        not_kept: The reason; None: it was kept.
        mend: What to do; None: make room for it.

    Raises:
        WriteError: It was not kept.
    """
    if not_kept:
        raise WriteError(f"{what}{not_kept}", mend or Advice(MAKE_ROOM))


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def read_json(path: Path) -> Any:
    """Return the value of a JSON file; NaN and infinity, which JSON does not know, are refused.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not a regular file (a pipe would be waited for without
            end), not JSON, or nested too deep.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("not a regular file")
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def text_digest(text: str) -> str:
    """Return the BLAKE2b-128 of a text in 32 hexadecimal digits: what specs and plans go by."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def canonical_json(value: Any) -> str:
    """Return the one JSON text of a value.

    Raises:
        StoreError: Something that JSON cannot hold exactly: another type, a
            non-string key, NaN or infinity, text that is not Unicode. Never a
            fallback.
    """

    def ensure_plain(item: Any, where: str) -> None:
        if isinstance(item, dict):
            for key, inner in item.items():
                if type(key) is not str:
                    raise StoreError(f"spec field {where}: key {key!r} is not a string")
                ensure_plain(key, where)
                ensure_plain(inner, f"{where}.{key}")
        elif isinstance(item, list | tuple):
            for index, inner in enumerate(item):
                ensure_plain(inner, f"{where}[{index}]")
        # Exact types: a NumPy scalar is a float too, and is written by other rules.
        elif item is not None and type(item) not in (str, int, bool, float):
            raise StoreError(f"spec field {where}: {type(item).__name__} cannot be fingerprinted")
        elif isinstance(item, float) and not math.isfinite(item):
            raise StoreError(f"spec field {where}: {item} cannot be fingerprinted")
        elif isinstance(item, str) and any("\ud800" <= letter <= "\udfff" for letter in item):
            raise StoreError(f"spec field {where}: {item!a} cannot be fingerprinted")

    try:
        ensure_plain(value, "spec")
    except RecursionError as error:
        raise StoreError("spec: nested too deep to be fingerprinted") from error
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def checksum(content: Mapping[str, Any]) -> str:
    """Return the XXH3-128, as hex, of an object's canonical JSON, its own `checksum` left out.

    Raises:
        StoreError: It holds what JSON cannot.
    """
    text = canonical_json({key: value for key, value in content.items() if key != "checksum"})
    return xxhash.xxh3_128_hexdigest(text.encode())


def write_checked(path: Path, content: Mapping[str, Any]) -> None:
    """Publish a JSON object with the checksum of its other fields as `checksum`."""
    write_json(path, {**content, "checksum": checksum(content)})


def read_checked(path: Path) -> dict[str, Any]:
    """Return what `write_checked` wrote, without the checksum.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not such a file, or was changed.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"expected an object, found {type(content).__name__}")
    try:
        expected = checksum(content)
    except StoreError as error:
        raise ValueError(str(error)) from error
    if content.pop("checksum", None) != expected:
        raise ValueError("its text was changed (checksum differs)")
    return content


def remove_leftovers(folder: Path) -> int:
    """Delete what killed writers left in `folder`; the caller holds its lock.

    Returns:
        Number of files removed.
    """
    leftovers = list(folder.glob(f"{TEMPORARY}*"))
    for leftover in leftovers:
        with contextlib.suppress(OSError):
            leftover.unlink()
    return len(leftovers)
