"""Plan, encode, publish: run a frozen encoder once for each input and keep the result.

A job says what is wanted. What is missing of it is a plan, cut into planned
shards (see `worklist.py`), which are encoded one by one (see `encode.py`); a run
that was killed continues at the shard that it was making. Photos and sentences
go the same way, on one process or on several that share the plan; `ray.py` has
it go on a cluster.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, cast

import numpy as np

from featstore.encoders.spec import TextSpec
from featstore.encoders.tower import VisionEncoder
from featstore.extract.encode import Encoder, Encoding, Failed, Made, encoding_of, load_encoder
from featstore.extract.kernels import choose_kernels
from featstore.extract.lengths import Cut, count_cut
from featstore.extract.plan import Job, Plan, make_plan
from featstore.extract.speed import estimated_speed, has_gpu, recorded_speed
from featstore.extract.worklist import PlannedShard, WorkList, alone, sharing
from featstore.progress import SILENT, Progress, Show, working
from featstore.store.folder import shard_paths
from featstore.store.store import TextStore, open_store
from featstore.store.write import ShardRows

ALL = range(sys.maxsize)


@dataclass
class Summary:
    """What an extraction did.

    Attributes:
        extracted: Rows published.
        failed: Key to reason of the inputs quarantined in this run.
        seconds: Wall time of encoding and publishing.
        batch_size: Rows of a forward pass at the end; smaller than asked for
            after memory ran out.
        cut: The sentences asked for that were cut; None for photos, and on a Ray cluster.
        views: Of several photometric views, each one's plan and summary; the figures above
            are those of all of them.
    """

    extracted: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    batch_size: int = 0
    cut: Cut | None = None
    views: Sequence[tuple[Plan, Summary]] = ()

    @classmethod
    def of_views(cls, made: Sequence[tuple[Plan, Summary]]) -> Self:
        """Return what several views' extractions did together."""
        each = [summary for _, summary in made]
        return cls(
            extracted=sum(one.extracted for one in each),
            failed={key: reason for one in each for key, reason in one.failed.items()},
            seconds=sum(one.seconds for one in each),
            batch_size=min(one.batch_size for one in each),
            views=made,
        )

    @property
    def rows_per_second(self) -> float:
        """Throughput over the whole run."""
        return self.extracted / self.seconds if self.seconds else 0.0

    def add(self, rows: ShardRows, failed: Failed) -> None:
        """Count a shard."""
        self.extracted += len(rows.keys)
        self.failed |= {key: reason for key, (reason, _) in failed.items()}


def extract(
    job: Job,
    show: Show = SILENT,
    shards: range = ALL,
    plan: Plan | None = None,
) -> tuple[Plan, Summary]:
    """Make the store hold the features of a job's inputs.

    Processes that ask for the same share the work: each planned shard is made
    once, and each process returns when all that it asked for is there.

    Args:
        job: What is wanted.
        show: How it is shown.
        shards: Which planned shards this process makes, by their place in the
            plan; may reach beyond its end.
        plan: What is missing, where that was just found.

    Returns:
        What was missing when this process began, and what it did. An input
        that cannot be decoded, or whose features do not fit the stored dtype,
        is quarantined and never shifts another.

    Raises:
        StoreError: The folder cannot be written, or the disk is too small.
        PresetError: The encoder cannot be loaded.
    """
    total = Summary(batch_size=job.store.encode_batch_size)
    encoding: Encoding | None = None
    begun: Plan | None = None
    rest = True
    while rest:
        with sharing(job, shards.start, show, plan) as share:
            begun, plan = begun or share.plan, None
            rest = share.rest and shards == ALL
            rows = share.work.rows(shards) if share.work else 0
            if share.work and rows:
                if encoding is None:
                    show.loading()
                    with working("loading an encoder"):
                        encoder = encoder_of(job)
                    choose_kernels(job, encoder, len(begun.keys), show)
                    encoding = encoding_of(job.spec, encoder, job.store, show.halved, job.photos)
                with show.bar(rows, job.unit) as progress:
                    make_shards(share.work, shards, encoding, progress, total)
            elif share.work:
                # A kill, or a process that had the last shard, left the plan open.
                share.work.finish()
    assert begun is not None
    if isinstance(job.spec, TextSpec) and shard_paths(job.folder):
        opened = cast(TextStore, open_store(job.folder))
        total.cut = count_cut(opened, job.keys, job.preset)
    return begun, total


def encoder_of(job: Job) -> Encoder:
    """Return a job's encoder with its weights.

    Raises:
        PresetError: It cannot be loaded.
    """
    loaded: Encoder = job.load() if job.load else load_encoder(job.spec, job.preset)
    return loaded


def extract_alone(plan: Plan, show: Show = SILENT) -> Summary:
    """Encode and publish a plan's inputs. The caller holds the folder by `writing`."""
    summary = Summary(batch_size=plan.job.store.encode_batch_size)
    encoding = encoding_of(plan.job.spec, encoder_of(plan.job), plan.job.store, show.halved)
    with show.bar(len(plan.keys), plan.job.unit) as progress:
        make_shards(alone(plan), ALL, encoding, progress, summary)
    return summary


def make_shards(
    work: WorkList, shards: range, encoding: Encoding, progress: Progress, summary: Summary
) -> None:
    """Make planned shards: first those that nobody is making, then what is left of others'.

    Args:
        work: The planned shards.
        shards: Which of them, by their place in the plan.
        encoding: Encodes them.
        progress: Called with the number of rows just dealt with.
        summary: What this process did is added to it.
    """
    started = time.perf_counter()
    left: list[int] = []

    def take(positions: Iterable[int]) -> Iterator[PlannedShard]:
        for position in positions:
            if work.claim(position):
                yield work.shard(position)
            else:
                left.append(position)

    _publish_all(work, encoding.shards(take(work.pending(shards)), progress), summary)
    for position in left:
        # With no claim of our own: two processes that wait for each other would never end.
        if work.claim(position, wait=True):
            _publish_all(work, encoding.shards([work.shard(position)], progress), summary)
        else:
            progress(len(work.shard(position).keys))
    work.finish()
    summary.seconds += time.perf_counter() - started
    summary.batch_size = encoding.batched.batch_size


def _publish_all(work: WorkList, made: Generator[Made, None, None], summary: Summary) -> None:
    """Publish shards from a thread while the next one is being encoded."""
    pending: Future[None] | None = None

    def publish(shard: PlannedShard, rows: ShardRows, failed: Failed) -> None:
        if work.publish(shard, rows, failed):
            summary.add(rows, failed)

    with ThreadPoolExecutor(1) as pool, closing(made):
        for item in made:
            if pending is not None:
                pending.result()
            pending = pool.submit(publish, *item)
        if pending is not None:
            pending.result()


def rows_per_second(job: Job) -> float:
    """Time the compiled forward pass of a job's encoder on one batch, after its compilation."""
    size, spec, encoder = job.store.encode_batch_size, job.spec, encoder_of(job)
    inputs: tuple[np.ndarray, ...]
    if isinstance(spec, TextSpec):
        token_ids = np.zeros((size, spec.sequence_length), np.int32)
        inputs = (token_ids, np.ones(token_ids.shape, bool))
    else:
        pixels = (size, *cast(VisionEncoder, encoder).image_size, 3)
        inputs = (np.zeros(pixels, np.float32),)
    encode = encoding_of(spec, encoder, job.store).batched.encode
    np.asarray(encode(*inputs))
    started = time.perf_counter()
    np.asarray(encode(*inputs))
    return size / (time.perf_counter() - started)


def estimate(job: Job, speed: float | None = None) -> tuple[Plan, float]:
    """Say what `extract` would do, and how fast; change nothing.

    Args:
        job: What is wanted.
        speed: Inputs a second, where that was just found of the same encoder.

    Returns:
        The plan, and inputs a second on this machine, see `speed.py` (0 where there is
        nothing to do).
    """
    plan = make_plan(job)
    if not plan.keys:
        return plan, 0.0
    speed = speed or recorded_speed(Path(job.store.root), job.spec)
    if speed is None:
        photos, threads = job.paths_of(plan.keys), job.store.threads
        speed = rows_per_second(job) if has_gpu() else estimated_speed(job.spec, photos, threads)
    return plan, speed
