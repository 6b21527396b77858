"""A run's TensorBoard log: one file of events a session, written without TensorFlow."""

from __future__ import annotations

import contextlib
import os
import socket
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featstore.errors import WriteError
from featstore.publish import write_error


class EventLog:
    """The event file of one session of a run, made when something is first written.

    A session that goes on with a run adds a file of its own: TensorBoard reads
    a folder's files one after the other.

    Args:
        folder: The run's `tensorboard` folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: Any = None

    def hparams(self, params: Mapping[str, Any], trial: str) -> None:
        """Write a trial's settings where TensorBoard's HParams tab finds them."""
        from tensorboard.plugins.hparams import api

        values = {k: v if isinstance(v, bool | int | float) else str(v) for k, v in params.items()}
        self._write(0, [api.hparams_pb(values, trial_id=trial)])

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Write the figures of an epoch."""
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb

        figures = {k: v for k, v in record.items() if k != "epoch" and v is not None}
        self._write(record["epoch"], [scalar_pb(f"epoch/{k}", v) for k, v in figures.items()])

    def _write(self, step: int, summaries: list[Any]) -> None:
        """Append what belongs to one step; it is in the file when this returns.

        Raises:
            WriteError: It cannot be written.
        """
        try:
            self._append(step, summaries)
        except OSError as error:
            # What is left in its buffer would be written, and fail, once more.
            with contextlib.suppress(WriteError):
                self.close()
            raise write_error(self.folder, error) from error

    def _append(self, step: int, summaries: list[Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            # TensorBoard knows its files by this name, and reads them in its order.
            name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
            self._file = RecordWriter((self.folder / f"{name}.{uuid.uuid4().hex[:8]}").open("wb"))
            first = Event(wall_time=time.time(), file_version="brain.Event:2")
            self._file.write(first.SerializeToString())
        event = Event(wall_time=time.time(), step=step)
        for summary in summaries:
            # By its bytes: a plugin's may be of another copy of the protocol's classes.
            event.summary.MergeFromString(summary.SerializeToString())
        self._file.write(event.SerializeToString())
        self._file.flush()

    def close(self) -> None:
        """Close the file, if there is one; a later write makes another.

        Raises:
            WriteError: The disk is full, or refuses.
        """
        if self._file is not None:
            file, self._file = self._file, None
            try:
                file.close()
            except OSError as error:
                raise write_error(self.folder, error) from error
