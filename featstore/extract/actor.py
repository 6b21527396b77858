"""What works on a node of a Ray cluster: it holds the encoder and makes planned shards."""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featstore.config import EncodersConfig
from featstore.data.images import Photo
from featstore.encoders.framework import import_framework, limit_threads
from featstore.encoders.spec import FeatureSpec, TextSpec, VisionSpec, text_spec, vision_spec
from featstore.errors import FeatstoreError, StoreError
from featstore.extract.encode import Encoding, encoding_of, load_encoder
from featstore.extract.plan import Job
from featstore.extract.publisher import Publisher
from featstore.extract.worklist import PlannedShard
from featstore.publish import package_versions
from featstore.store.shard import shard_name
from featstore.store.write import ShardRows, write_shard


@dataclass(frozen=True)
class Task:
    """What every actor of an extraction is told.

    Attributes:
        job: What is extracted, without its inputs.
        token: What the file `marker` in the features' folder holds.
        photos: Some of the photos that are there on the driver's machine.
        threads: Of a forward pass; 0: as many as TensorFlow takes.
    """

    job: Job
    token: str
    marker: str
    photos: tuple[Photo, ...]
    threads: int
    return_shards: bool
    environment: dict[str, str]
    command: tuple[str, ...]


@dataclass(frozen=True)
class Host:
    """What an actor says of itself; `refusal` tells why it cannot work."""

    name: str
    sees_folder: bool = False
    versions: tuple[tuple[str, str], ...] = ()
    refusal: str = ""


@dataclass(frozen=True)
class Finished:
    """What became of a planned shard.

    Attributes:
        keys: Rows published, or to publish from `data`.
        failed: Key to reason and digest.
        batch_size: Rows of a forward pass at the end.
        line: Of the manifest, with `data`.
        data: The file, where the actor does not see the folder.
        refusal: Why it could not be made.
    """

    keys: tuple[str, ...] = ()
    failed: dict[str, tuple[str, tuple[int, int] | None]] = dataclasses.field(default_factory=dict)
    batch_size: int = 0
    line: dict[str, Any] | None = None
    data: Any = None
    refusal: str = ""


class ShardActor:
    """Holds the encoder on one node and makes planned shards."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.name = socket.gethostname()
        self.sees_folder = False
        self.encoding: Encoding | None = None

    def ready(self) -> Host:
        """Look at the folders and load the encoder; a refusal is returned, not raised."""
        task = self.task
        if self.encoding is None:
            os.environ.update(task.environment)
            # Outputs record the command of the one who asked.
            sys.argv[:] = task.command
            unseen = [path for path in task.photos if not path.is_file()]
            if unseen:
                return self._refused(
                    f"the photo {unseen[0]} is not there; give every node the folder of the"
                    " photos under the same path"
                )
            try:
                self._load()
            except FeatstoreError as error:
                return self._refused(str(error))
        self.sees_folder = not task.return_shards and self._sees_folder()
        return Host(self.name, self.sees_folder, tuple(package_versions().items()))

    def _refused(self, why: str) -> Host:
        return Host(self.name, refusal=f"node {self.name}: {why}")

    def _sees_folder(self) -> bool:
        marker = self.task.job.folder / self.task.marker
        try:
            same = marker.read_text() == self.task.token
        except OSError:
            return False
        return same and os.access(self.task.job.folder, os.W_OK)

    def _load(self) -> None:
        task = self.task
        import_framework()
        limit_threads(task.threads, task.threads)
        job = task.job
        found = _spec_here(job).fingerprint
        if found != job.spec.fingerprint:
            raise StoreError(
                f"{job.preset} gives features {found}, expected {job.spec.fingerprint};"
                " install the same versions and weights on every node"
            )
        self.encoding = encoding_of(job.spec, load_encoder(job.spec, job.preset), job.store)

    def make(self, shard: PlannedShard) -> Finished:
        """Encode a planned shard; publish it, or return it.

        Args:
            shard: Its photos' paths are this node's too.
        """
        try:
            return self._make(shard)
        except FeatstoreError as error:
            return Finished(refusal=f"node {self.name}: {error}")

    def _make(self, shard: PlannedShard) -> Finished:
        job, encoding = self.task.job, self.encoding
        assert encoding is not None
        _, rows, failed = next(iter(encoding.shards([shard], lambda count: None)))
        keys, size = tuple(rows.keys), encoding.batched.batch_size
        if self.sees_folder:
            publisher = Publisher(job.folder, job.spec, self.task.token)
            if not publisher.publish(shard.number, rows, failed):
                return Finished(batch_size=size)
            return Finished(keys, dict(failed), size)
        if not keys:
            return Finished(keys, dict(failed), size)
        line, data = file_of(shard.number, rows, job.spec)
        return Finished(keys, dict(failed), size, line, data)


def _spec_here(job: Job) -> FeatureSpec:
    """Return a job's spec as this machine's preset files and packages make it."""
    spec = job.spec
    k = int(spec.architecture["num_layers"]) - spec.boundary
    if isinstance(spec, VisionSpec):
        found = vision_spec(EncodersConfig(vit=job.preset), job.store, k)
        return dataclasses.replace(found, view=spec.view)
    assert isinstance(spec, TextSpec)
    encoders = EncodersConfig(text=job.preset, sequence_length=spec.sequence_length)
    return text_spec(encoders, job.store, k)


def file_of(number: int, rows: ShardRows, spec: FeatureSpec) -> tuple[dict[str, Any], bytes]:
    """Return a shard's line of the manifest and its file's bytes."""
    with tempfile.TemporaryDirectory(prefix="featstore-") as scratch:
        path = Path(scratch) / shard_name(number)
        versions = package_versions()
        line = write_shard(path, spec.kind, spec.fingerprint, spec.dtype, rows, versions)
        return line, path.read_bytes()
