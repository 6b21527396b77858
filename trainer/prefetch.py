"""Batches read in a thread, a few ahead of the step."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence

from trainer.batches import Batch, CachedRows, IntArray

PREFETCHED = 4
READ_AHEAD = 4


class Prefetcher:
    """Reads batches in a thread, a few ahead of the step.

    Use as a context manager and iterate. What goes wrong in the thread is
    raised in the reader's.

    Attributes:
        wait_seconds: Time that the reader spent waiting for a batch.
    """

    def __init__(self, rows: CachedRows, steps: Sequence[IntArray], batch_size: int) -> None:
        self.wait_seconds = 0.0
        self._queue: queue.Queue[Batch | BaseException | None] = queue.Queue(PREFETCHED)
        self._stopping = threading.Event()
        self._thread = threading.Thread(
            target=self._read, args=(rows, steps, batch_size), name="prefetch", daemon=True
        )

    def _put(self, item: Batch | BaseException | None) -> None:
        while not self._stopping.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def _read(self, rows: CachedRows, steps: Sequence[IntArray], batch_size: int) -> None:
        try:
            for ahead in steps[:READ_AHEAD]:
                rows.will_need(ahead)
            for i, step in enumerate(steps):
                if self._stopping.is_set():
                    return
                for ahead in steps[i + READ_AHEAD : i + READ_AHEAD + 1]:
                    rows.will_need(ahead)
                self._put(rows.batch(step, batch_size))
            self._put(None)
        except BaseException as error:
            self._put(error)

    def __enter__(self) -> Prefetcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            started = time.perf_counter()
            item = self._queue.get()
            self.wait_seconds += time.perf_counter() - started
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
