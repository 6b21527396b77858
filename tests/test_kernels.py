"""Which kernels compute photos' features: the faster ones, the same for all rows of a folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jobs import image_job
from PIL import Image

from featstore.care import gc
from featstore.config import EncodersConfig, StoreConfig
from featstore.data.images import ImageIndex, index_images
from featstore.encoders.compiled import KERNELS, TENSORFLOW, XLA
from featstore.encoders.spec import vision_spec
from featstore.encoders.tower import VisionEncoder
from featstore.extract import kernels
from featstore.extract.encode import encoding_of
from featstore.extract.extract import extract
from featstore.extract.kernels import choose_kernels, kernels_of, record_of, time_kernels
from featstore.extract.plan import Job
from featstore.progress import Show
from featstore.store.folder import shard_paths, write_manifest

IDS = [f"p{number:02}" for number in range(24)]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ImageIndex:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name in IDS:
        Image.fromarray(rng.integers(0, 256, (40, 44, 3), np.uint8)).save(folder / f"{name}.png")
    return index_images(folder)


@pytest.fixture(scope="module")
def vit(tiny_vit: Path) -> VisionEncoder:
    return VisionEncoder(str(tiny_vit))


@pytest.fixture
def job(tmp_path: Path, tiny_vit: Path, index: ImageIndex, vit: VisionEncoder) -> Job:
    root = str(tmp_path / "store")
    store = StoreConfig(root=root, shard_rows=6, encode_batch_size=4, dtype="float32")
    return image_job(EncodersConfig(vit=str(tiny_vit)), store, IDS, index, lambda: vit)


@pytest.fixture
def tensorflow_wins(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have all extractions choose, and TensorFlow's kernels win; return the batches timed."""
    timed: list[int] = []

    def found(encoder: Any, batch_size: int, k_vit: int) -> dict[str, float]:
        timed.append(batch_size)
        return {XLA: 7.0, TENSORFLOW: 7.5}

    monkeypatch.setattr(kernels, "LEAST_PHOTOS", len(IDS))
    monkeypatch.setattr(kernels, "time_kernels", found)
    return timed


def rows(job: Job, vit: VisionEncoder) -> np.ndarray:
    """Return the features as a store's encoding makes them now."""
    paths = [path for key in IDS if job.images and (path := job.images.lookup(key))]
    found = encoding_of(job.spec, vit, job.store).rows(IDS, paths)
    return np.stack([np.asarray(item.numbers.values) for item in found if item.numbers is not None])


def shards(job: Job) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in shard_paths(job.folder)}


def test_the_faster_kernels_make_every_row(
    job: Job, vit: VisionEncoder, tensorflow_wins: list[int]
) -> None:
    xla = rows(job, vit)
    said: list[str] = []
    extract(job, Show(note=said.append))
    assert kernels_of(job.folder) == TENSORFLOW
    assert tensorflow_wins == [4]
    both = "7 images/s by XLA, 7.5 images/s by TensorFlow's own kernels"
    assert f"{both}: all are made by TensorFlow's own kernels" in said
    own = rows(job, vit)
    # They round differently, which shows that the other kernels were at work.
    assert not np.array_equal(own, xla)
    np.testing.assert_allclose(own, xla, rtol=1e-4, atol=1e-5)
    whole = shards(job)
    # What a kill left is completed by the same kernels, without timing again.
    for path in shard_paths(job.folder)[1:]:
        path.unlink()
    write_manifest(job.folder, job.spec.fingerprint, [])
    extract(job)
    assert shards(job) == whole
    assert tensorflow_wins == [4]


def test_rows_that_xla_made_are_continued_by_xla(
    job: Job, vit: VisionEncoder, tensorflow_wins: list[int]
) -> None:
    few = dataclasses.replace(job, keys=IDS[:6])
    extract(few)
    extract(dataclasses.replace(job, keys=[*IDS, *IDS]))
    assert tensorflow_wins == []
    assert not record_of(job.folder).exists()
    assert kernels_of(job.folder) == XLA


def test_few_photos_and_a_damaged_record_are_xlas(
    job: Job, vit: VisionEncoder, tensorflow_wins: list[int]
) -> None:
    choose_kernels(job, vit, len(IDS) - 1)
    assert tensorflow_wins == []
    choose_kernels(job, vit, len(IDS))
    assert kernels_of(job.folder) == TENSORFLOW
    path = record_of(job.folder)
    path.write_text(path.read_text().replace('"tensorflow"', '"xlb"'))
    assert kernels_of(job.folder) == XLA
    path.write_text("")
    assert kernels_of(job.folder) == XLA


def test_its_record_is_the_stores_own(
    job: Job, vit: VisionEncoder, tensorflow_wins: list[int]
) -> None:
    choose_kernels(job, vit, len(IDS))
    assert gc._is_ours(record_of(job.folder))
    gc._delete_folder(job.folder)
    assert not job.folder.exists()


def test_the_first_of_two_that_choose_wins(
    job: Job, vit: VisionEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_first(encoder: Any, batch_size: int, k_vit: int) -> dict[str, float]:
        monkeypatch.setattr(kernels, "time_kernels", lambda *_: {XLA: 1.0, TENSORFLOW: 2.0})
        choose_kernels(job, vit, kernels.LEAST_PHOTOS)
        return {XLA: 2.0, TENSORFLOW: 1.0}

    monkeypatch.setattr(kernels, "time_kernels", other_first)
    choose_kernels(job, vit, kernels.LEAST_PHOTOS)
    assert kernels_of(job.folder) == TENSORFLOW


def test_too_little_memory_for_a_batch_leaves_the_choice(
    job: Job, vit: VisionEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*given: Any) -> dict[str, float]:
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 3 bytes")

    monkeypatch.setattr(kernels, "time_kernels", refused)
    choose_kernels(job, vit, kernels.LEAST_PHOTOS)
    assert kernels_of(job.folder) == XLA
    monkeypatch.setattr(kernels, "time_kernels", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        choose_kernels(job, vit, kernels.LEAST_PHOTOS)


def test_both_kinds_are_timed(vit: VisionEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    encode = vit.encode

    def noted(pixels: np.ndarray, k_vit: int = 0, kernels: str = XLA) -> np.ndarray:
        ran.append(kernels)
        return encode(pixels, k_vit, kernels)

    monkeypatch.setattr(vit, "encode", noted)
    rates = time_kernels(vit, 4)
    assert ran == [*KERNELS] * (1 + kernels.ROUNDS)
    assert all(rate > 0 for rate in rates.values())


def test_a_spec_of_blocks_below_is_timed_where_it_is_cut(
    job: Job, tiny_vit: Path, vit: VisionEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut: list[int] = []
    monkeypatch.setattr(
        kernels, "time_kernels", lambda *given: cut.append(given[2]) or {XLA: 2.0, TENSORFLOW: 1.0}
    )
    spec = vision_spec(EncodersConfig(vit=str(tiny_vit)), job.store, 1)
    choose_kernels(dataclasses.replace(job, spec=spec), vit, kernels.LEAST_PHOTOS)
    assert cut == [1]
