"""Files that this very process may not read or write, also where it runs as root."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Of <linux/capability.h>: the version of its two structures, and what root reads everything by.
VERSION = 0x20080522
DAC_OVERRIDE, DAC_READ_SEARCH = 1 << 1, 1 << 2


def _set_effective(words: ctypes.Array[ctypes.c_uint32]) -> None:
    header = (ctypes.c_uint32 * 2)(VERSION, 0)
    if ctypes.CDLL(None, use_errno=True).capset(header, words):
        raise OSError(ctypes.get_errno(), "capset")


@contextlib.contextmanager
def forbidden(path: Path, left: int = 0) -> Iterator[None]:
    """Take a file's or folder's permissions away but `left`, root's right to pass over them too."""
    mode = path.stat().st_mode
    words = (ctypes.c_uint32 * 6)()
    if os.geteuid() == 0:
        if not hasattr(ctypes.CDLL(None), "capset"):
            pytest.skip("root can read everything on this system")
        header = (ctypes.c_uint32 * 2)(VERSION, 0)
        ctypes.CDLL(None).capget(header, words)
    kept = words[0]
    path.chmod(left)
    try:
        if os.geteuid() == 0:
            words[0] = kept & ~(DAC_OVERRIDE | DAC_READ_SEARCH)
            _set_effective(words)
        yield
    finally:
        if os.geteuid() == 0:
            words[0] = kept
            _set_effective(words)
        path.chmod(mode)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Take the right to write a folder and all below it; of this process, not of its children."""
    below = [path for path in folder.rglob("*") if not path.is_symlink()]
    modes = {path: path.stat().st_mode for path in below}
    for path, mode in modes.items():
        path.chmod(mode & ~0o222)
    try:
        with forbidden(folder, 0o555):
            yield
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
