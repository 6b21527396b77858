"""Settings that belong to a whole process or thread, held at our values while our code runs.

Other libraries keep such settings where their callers and their users' own
files set them (Keras's `floatx`, Pillow's `LOAD_TRUNCATED_IMAGES`). Where one
of them decides a number, it is set for as long as our calls last, and put back
as it was found.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import SimpleNamespace, TracebackType
from typing import Any


@contextlib.contextmanager
def setting(read: Callable[[], Any], write: Callable[[Any], object], value: Any) -> Iterator[None]:
    """Give a setting a value, and put back the one it had."""
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


class Outermost:
    """A context that many calls share: entered by the first, left by the last.

    Nested calls cost nothing. Among threads, one that ends first does not put
    back what another still needs.

    Args:
        make: Makes the context.
        of_thread: It is of the thread that enters it; else of the process.
    """

    def __init__(
        self, make: Callable[[], AbstractContextManager[Any]], of_thread: bool = False
    ) -> None:
        self._make, self._lock = make, threading.RLock()
        self._state: Any = threading.local() if of_thread else SimpleNamespace()

    def __enter__(self) -> None:
        with self._lock:
            depth = getattr(self._state, "depth", 0)
            if depth == 0:
                context = self._make()
                context.__enter__()
                self._state.context = context
            self._state.depth = depth + 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._lock:
            self._state.depth -= 1
            if self._state.depth == 0:
                context, self._state.context = self._state.context, None
                context.__exit__(None, None, None)
