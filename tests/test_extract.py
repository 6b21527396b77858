"""Extraction: every row is its own photo's or sentence's, whatever fails, stops or restarts.

Processes that these tests and others start import this file: TensorFlow only where it is needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jobs import image_job, text_job
from PIL import Image

from featstore.config import EncodersConfig, StoreConfig
from featstore.data.images import ImageIndex, decode_image, index_images
from featstore.encoders.presets import DIGESTS_FILE
from featstore.encoders.spec import FeatureSpec, VisionSpec, text_spec, vision_spec
from featstore.encoders.tower import TextEncoder, VisionEncoder
from featstore.errors import ConfigError, FeatstoreError, StoreError
from featstore.extract.claims import writing
from featstore.extract.encode import Batched
from featstore.extract.extract import Summary, estimate, extract, extract_alone
from featstore.extract.plan import Job, Plan, make_plan
from featstore.progress import Show
from featstore.store.folder import read_quarantine, shard_paths, write_manifest
from featstore.store.store import open_features_of

ROOT = Path(__file__).resolve().parent.parent
BATCH = 4
WORDS = ["a", "the", "dog", "cat", "man", "woman", "runs", "sits", "on", "in", "red", "two"]
WORDS += ["park", "ball", "is", "not", "sleeping"]
WORKER = (
    "import sys; sys.path[:0] = ['tests', '.']; import test_extract;"
    " test_extract.worker(*sys.argv[1:])"
)


def write_photos(folder: Path, count: int = 40, size: int = 40) -> list[str]:
    """Write photos of noise, some JPEG and some PNG; return their ids."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = []
    for number in range(count):
        pixels = rng.integers(0, 256, (size + number % 7, size + number % 5, 3), np.uint8)
        suffix = ".png" if number % 3 else ".jpg"
        Image.fromarray(pixels).save(folder / f"p{number:02}{suffix}")
        names.append(f"p{number:02}")
    return names


class PixelEncoder:
    """A vision encoder without TensorFlow: mean colours of a 2×2 grid, then scaled."""

    num_tokens, width = 4, 3

    def __init__(self, scale: float = 1.0, seconds: float = 0.0) -> None:
        self.scale, self.seconds = scale, seconds

    def to_pixels(self, image: np.ndarray) -> np.ndarray:
        height, width = image.shape[0] // 2, image.shape[1] // 2
        parts = [image[i * height :, j * width :][:height, :width] for i in (0, 1) for j in (0, 1)]
        return np.stack([part.mean((0, 1)) for part in parts]).astype(np.float32)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        time.sleep(self.seconds)
        return pixels * np.float32(self.scale)


PIXEL_SPEC = VisionSpec(
    encoder="PixelEncoder",
    weights="0",
    architecture={"image_shape": [2, 2, 3], "patch_size": 1, "hidden_dim": 3, "num_layers": 1},
    boundary=1,
    dtype="float32",
    precision="float32",
    final_norm=True,
    converter={},
    decoder="v1",
    tokens="patches",
)


def pixel_job(
    store: StoreConfig,
    ids: list[str],
    index: ImageIndex,
    spec: FeatureSpec = PIXEL_SPEC,
    load: Callable[[], Any] = PixelEncoder,
) -> Job:
    return Job(spec, "pixels", store, ids, index, load)


def run_alone(job: Job) -> tuple[Plan, Summary]:
    """Plan and extract with the folder for oneself, as a repair does."""
    with writing(job.folder):
        plan = make_plan(job)
        return plan, extract_alone(plan)


def run_pixels(
    store: StoreConfig,
    ids: list[str],
    index: ImageIndex,
    encoder: Any = None,
    spec: FeatureSpec = PIXEL_SPEC,
) -> tuple[Plan, Summary]:
    return run_alone(pixel_job(store, ids, index, spec, lambda: encoder or PixelEncoder()))


def worker(root: str, photos: str) -> None:
    """Extract slowly; run by the tests in processes that are killed."""
    store = StoreConfig(root=root, shard_rows=5, encode_batch_size=BATCH)
    index = index_images(photos)
    print("ready", flush=True)
    run_pixels(store, [f"p{i:02}" for i in range(40)], index, PixelEncoder(seconds=0.02))


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        # Learnt of inputs, and no part of the features.
        if path.name != DIGESTS_FILE and "photo-digests" not in path.relative_to(folder).parts
    }


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in shard_paths(folder)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "photos"
    write_photos(folder)
    return folder


IDS = [f"p{number:02}" for number in range(40)]


@pytest.fixture
def own(photos: Path, tmp_path: Path) -> Path:
    """A copy of the photos that the test may change."""
    return Path(shutil.copytree(photos, tmp_path / "photos"))


@pytest.fixture
def store(tmp_path: Path) -> StoreConfig:
    return StoreConfig(
        root=str(tmp_path / "store"), shard_rows=7, encode_batch_size=BATCH, dtype="float32"
    )


def check_rows(
    store: StoreConfig, index: ImageIndex, ids: list[str], spec: Any = PIXEL_SPEC
) -> None:
    """Compare each key's row with its own photo, encoded alone."""
    opened = open_features_of(Path(store.root), spec)
    positions = opened.lookup(ids)
    assert (positions >= 0).all()
    found = opened.gather(positions)
    for image_id, row in zip(ids, found, strict=True):
        path = index.lookup(image_id)
        assert path is not None
        pixels = PixelEncoder().to_pixels(decode_image(path.read_bytes(), path.name))
        assert np.array_equal(row, pixels.astype(row.dtype)), image_id


# --- the real encoder -------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoders(tiny_vit: Path, tiny_text: Path) -> EncodersConfig:
    return EncodersConfig(vit=str(tiny_vit), text=str(tiny_text), sequence_length=8)


@pytest.fixture(scope="module")
def vit(encoders: EncodersConfig) -> VisionEncoder:
    return VisionEncoder(encoders.vit, "patches", "float32")


@pytest.fixture(scope="module")
def bert(encoders: EncodersConfig) -> TextEncoder:
    return TextEncoder(encoders.text, encoders.sequence_length, "float32")


def pixels_of(vit: VisionEncoder, index: ImageIndex, image_id: str) -> np.ndarray:
    path = index.lookup(image_id)
    assert path is not None
    return vit.to_pixels(decode_image(path.read_bytes(), path.name))


def alone(vit: VisionEncoder, index: ImageIndex, image_id: str, batch: int = BATCH) -> np.ndarray:
    """Encode one photo in a batch of nothing but itself."""
    return vit.encode(np.repeat(pixels_of(vit, index, image_id)[None], batch, axis=0))[0]


def test_images_of_the_real_encoder(
    photos: Path, store: StoreConfig, encoders: EncodersConfig, vit: VisionEncoder
) -> None:
    index, seen = index_images(photos), []

    @contextlib.contextmanager
    def bar(total: int, unit: str) -> Iterator[Callable[[int], None]]:
        assert unit == "images"
        seen.append(-total)
        yield seen.append

    job = image_job(encoders, store, [*IDS, *IDS[:3]], index)
    plan, summary = extract(job, Show(bar))
    assert (plan.requested, plan.cached, len(plan.keys), plan.changed) == (40, 0, 40, 0)
    assert (summary.extracted, summary.failed, summary.batch_size) == (40, {}, BATCH)
    assert summary.rows_per_second > 0
    assert seen[0] == -40
    assert sum(seen[1:]) == 40
    spec = vision_spec(encoders, store)
    opened = open_features_of(Path(store.root), spec)
    assert [len(shard) for shard in opened.shards] == [7, 7, 7, 7, 7, 5]
    assert opened.keys() == IDS
    assert opened.row_shape == (16, 16)
    rows = opened.gather(opened.lookup(IDS))
    for image_id, row in zip(IDS, rows, strict=True):
        # A kernel may round differently at another place in a batch, see featstore.care.repair.
        np.testing.assert_allclose(row, alone(vit, index, image_id), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(rows[0], alone(vit, index, IDS[0], 1), rtol=1e-5, atol=1e-5)
    manifest = json.loads((plan.folder / "manifest.json").read_text())
    assert [line["rows"] for line in manifest["shards"]] == [7, 7, 7, 7, 7, 5]
    assert json.loads((plan.folder / "spec.json").read_text())["names"] == {"preset": encoders.vit}
    before = tree(Path(store.root))
    again, summary = extract(image_job(encoders, store, IDS, index))
    assert (again.cached, again.keys, summary.extracted) == (40, [], 0)
    assert tree(Path(store.root)) == before


def test_resume_with_the_real_encoder_gives_the_same_bytes(
    photos: Path, store: StoreConfig, encoders: EncodersConfig, vit: VisionEncoder, tmp_path: Path
) -> None:
    index, spec = index_images(photos), vision_spec(encoders, store)
    run_pixels(store, IDS, index, vit, spec)
    other = dataclasses.replace(store, root=str(tmp_path / "other"))
    for shard in shard_paths(spec.folder(Path(store.root)))[:3]:
        # As after a kill: three shards that the manifest does not list.
        target = spec.folder(Path(other.root)) / shard.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(shard, target)
    shutil.copy(spec.folder(Path(store.root)) / "spec.json", target.parent)
    write_manifest(target.parent, spec.fingerprint, [])
    plan, _ = run_pixels(other, IDS, index, vit, spec)
    assert plan.cached == 21
    one, two = (spec.folder(Path(s.root)) for s in (store, other))
    assert shards(one) == shards(two)
    assert (one / "manifest.json").read_bytes() == (two / "manifest.json").read_bytes()


def out_of_memory() -> Any:
    import tensorflow as tf

    return tf.errors.ResourceExhaustedError(None, None, "failed to allocate memory")


class TooMuch:
    """What an accelerator was given and, when someone waits for it, has no memory for."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        raise out_of_memory()


class Small:
    """The real encoder on a device whose memory holds two rows.

    Args:
        inner: The encoder.
        late: It says so only to who waits for the result.
    """

    def __init__(self, inner: Any, late: bool = False) -> None:
        self.inner, self.late = inner, late

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def encode(self, *inputs: Any) -> Any:
        if len(inputs[0]) > 2:
            if self.late:
                return TooMuch()
            raise out_of_memory()
        return self.inner.encode(*inputs)


def test_a_halved_batch_has_no_shape_of_its_own() -> None:
    shapes: list[int] = []

    def encode(rows: np.ndarray) -> np.ndarray:
        shapes.append(len(rows))
        return rows

    # Gathered while the size was 16.
    rows = np.arange(11)
    assert (Batched(encode, 4).begin(rows)() == rows).all()
    assert shapes == [4, 4, 4]


@pytest.mark.parametrize("late", [False, True])
def test_out_of_memory_halves_the_batch(
    photos: Path, store: StoreConfig, encoders: EncodersConfig, vit: VisionEncoder, late: bool
) -> None:
    index, spec = index_images(photos), vision_spec(encoders, store)
    halved: list[int] = []
    store = dataclasses.replace(store, encode_batch_size=16)
    job = image_job(encoders, store, IDS, index, lambda: Small(vit, late))
    _, summary = extract(job, Show(halved=halved.append))
    assert halved == [8, 4, 2]
    assert (summary.batch_size, summary.extracted) == (2, 40)
    opened = open_features_of(Path(store.root), spec)
    assert opened.keys() == IDS
    for image_id, row in zip(IDS, opened.gather(np.arange(40)), strict=True):
        np.testing.assert_allclose(row, alone(vit, index, image_id, 2), rtol=1e-4, atol=1e-5)


def test_out_of_memory_of_text_loses_no_sentence(
    store: StoreConfig, encoders: EncodersConfig, bert: TextEncoder
) -> None:
    sentences = [f"{a} {b} {c}" for a in WORDS[:5] for b in WORDS[:6] for c in WORDS[:3]]
    spec = text_spec(encoders, store, 2)
    store = dataclasses.replace(store, shard_rows=1000)
    _, summary = run_alone(text_job(encoders, store, sentences, 2, lambda: Small(bert)))
    assert summary.extracted == len(sentences) == 90
    assert summary.batch_size == 2
    opened = open_features_of(Path(store.root), spec)
    assert opened.keys() == sentences
    ids, mask = bert.tokenize(sentences)
    for first in range(0, 90, 2):
        rows = np.arange(first, first + 2)
        found, valid = opened.gather(rows, 8)
        wanted = bert.encode(ids[rows], mask[rows], 2)
        assert np.array_equal(valid, mask[rows])
        assert np.array_equal(found[valid], wanted[mask[rows]])


def test_one_row_that_does_not_fit_and_other_errors_pass(photos: Path, store: StoreConfig) -> None:
    class Broken(PixelEncoder):
        def encode(self, pixels: np.ndarray) -> np.ndarray:
            raise MemoryError("out of memory")

    class Wrong(PixelEncoder):
        def encode(self, pixels: np.ndarray) -> np.ndarray:
            raise ValueError("bug")

    with pytest.raises(MemoryError):
        run_pixels(store, IDS, index_images(photos), Broken())
    with pytest.raises(ValueError, match="bug"):
        run_pixels(store, IDS, index_images(photos), Wrong())
    assert shards(PIXEL_SPEC.folder(Path(store.root))) == {}


def test_text_keeps_the_valid_tokens(
    store: StoreConfig, encoders: EncodersConfig, bert: TextEncoder
) -> None:
    sentences = [" ".join(WORDS[: 1 + i % 9]) + f" {WORDS[i]}" for i in range(17)]
    folders = set()
    for k_txt in (0, 2, 4):
        plan, summary = extract(text_job(encoders, store, [*sentences, sentences[0]], k_txt))
        assert (plan.requested, summary.extracted) == (17, 17)
        folders.add(plan.folder)
        opened = open_features_of(Path(store.root), text_spec(encoders, store, k_txt))
        assert [len(shard) for shard in opened.shards] == [7, 7, 3]
        ids, mask = bert.tokenize(sentences)
        assert opened.lengths(np.arange(17)).tolist() == mask.sum(1).tolist()
        positions = opened.lookup(sentences)
        found, valid = opened.gather(positions, 8)
        assert np.array_equal(valid, mask)
        for i in range(17):
            wanted = bert.encode(
                np.repeat(ids[i : i + 1], BATCH, 0), np.repeat(mask[i : i + 1], BATCH, 0), k_txt
            )
            assert np.array_equal(found[i][mask[i]], wanted[0][mask[i]])
        assert extract(text_job(encoders, store, sentences, k_txt))[1].extracted == 0
    assert len(folders) == 3
    more, summary = extract(text_job(encoders, store, [*sentences, "a new ball"], 2))
    assert (more.cached, summary.extracted) == (17, 1)


@pytest.mark.parametrize(
    ("tokens", "dtype", "shape"), [("all", "float16", (17, 16)), ("patches", "bfloat16", (16, 16))]
)
def test_variants(
    photos: Path, store: StoreConfig, encoders: EncodersConfig, tokens: str, dtype: str, shape: Any
) -> None:
    store = dataclasses.replace(store, tokens=tokens, dtype=dtype)
    index = index_images(photos)
    extract(image_job(encoders, store, IDS[:3], index))
    opened = open_features_of(Path(store.root), vision_spec(encoders, store))
    assert opened.row_shape == shape
    encoder = VisionEncoder(encoders.vit, tokens, "float32")
    for image_id, row in zip(IDS, opened.gather(np.arange(3)), strict=False):
        assert np.array_equal(row, alone(encoder, index, image_id).astype(row.dtype))


def test_an_estimate_changes_nothing(
    photos: Path, store: StoreConfig, encoders: EncodersConfig, tmp_path: Path
) -> None:
    index = index_images(photos)
    run_pixels(store, IDS[:3], index)
    before = tree(tmp_path)
    plan, rate = estimate(image_job(encoders, store, IDS, index))
    assert (len(plan.keys), plan.todo_bytes) == (40, 40 * 16 * 16 * 4)
    assert rate > 0
    plan, rate = estimate(text_job(encoders, store, ["a dog", "a cat"], 2))
    assert len(plan.keys) == 2
    assert rate > 0
    assert plan.to_dict()["todo"] == 2
    json.dumps(plan.to_dict())
    assert tree(tmp_path) == before


# --- failures, stops and restarts -------------------------------------------------------


@pytest.mark.parametrize("number", [0, 2, 5])
def test_a_failing_write_can_be_resumed(
    photos: Path, store: StoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    index, whole = index_images(photos), dataclasses.replace(store, root=str(tmp_path / "whole"))
    run_pixels(whole, IDS, index)
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name == f"shard-{number:05d}.h5":
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        before = threading.active_count()
        with pytest.raises(
            FeatstoreError, match=f"shard-{number:05d}.h5: cannot be written"
        ) as kept:
            run_pixels(store, IDS, index)
        # Whoever keeps the error keeps no thread: one that is waited for by the collector of
        # garbage, in a thread that is just beginning, would never end.
        assert kept.value is not None
        assert threading.active_count() == before
    folder = PIXEL_SPEC.folder(Path(store.root))
    assert len(shard_paths(folder)) == number
    assert not list(folder.glob(".tmp-*"))
    plan, _ = run_pixels(store, IDS, index)
    assert plan.cached == 7 * number
    assert shards(folder) == shards(PIXEL_SPEC.folder(Path(whole.root)))
    check_rows(store, index, IDS)


def test_kills_at_any_moment_give_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    index = index_images(photos)
    whole = StoreConfig(root=str(tmp_path / "whole"), shard_rows=5, encode_batch_size=BATCH)
    run_pixels(whole, IDS, index)
    root = tmp_path / "killed"
    folder = PIXEL_SPEC.folder(root)
    rng = np.random.default_rng(3)
    ends: list[int] = []
    reached: list[int] = []
    for number, kill in enumerate([True] * 6 + [False]):
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(root), str(photos)], cwd=ROOT, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        if kill:
            # Every other one comes after a new shard, however slow the machine is.
            while number % 2 and process.poll() is None and len(shard_paths(folder)) <= reached[-1]:
                time.sleep(0.002)
            time.sleep(rng.uniform(0.0, 0.15))
            process.kill()
        ends.append(process.wait())
        process.stdout.close()
        if shard_paths(folder):
            open_features_of(root, PIXEL_SPEC).gather(np.arange(0))
        reached.append(len(shard_paths(folder)))
    assert ends[-1] == 0
    assert -9 in ends
    # At least one kill came while shards were being made.
    assert any(0 < count < 8 for count in reached)
    wanted = PIXEL_SPEC.folder(Path(whole.root))
    assert shards(folder) == shards(wanted)
    assert (sorted(os.listdir(folder))) == sorted(os.listdir(wanted))
    lines = [json.loads((f / "manifest.json").read_text())["shards"] for f in (folder, wanted)]
    assert lines[0] == lines[1]


def test_a_changed_photo_is_extracted_again_and_no_other(own: Path, store: StoreConfig) -> None:
    run_pixels(store, IDS, index_images(own))
    folder = PIXEL_SPEC.folder(Path(store.root))
    before = shards(folder)
    Image.new("RGB", (9, 9), (1, 2, 3)).save(own / "p04.png")
    index = index_images(own)
    plan, summary = run_pixels(store, IDS, index)
    assert (plan.keys, plan.changed, summary.extracted) == (["p04"], 1, 1)
    after = shards(folder)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 1
    check_rows(store, index, IDS)
    assert make_plan(pixel_job(store, IDS, index)).keys == []


def bomb(path: Path) -> None:
    """Write a PNG whose header claims 60,000 × 60,000 pixels."""
    import struct
    import zlib

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)

    def chunk(name: bytes, data: bytes) -> bytes:
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"x"))


def test_bad_photos_are_quarantined_and_shift_no_row(own: Path, store: StoreConfig) -> None:
    (own / "p00.jpg").write_bytes((own / "p00.jpg").read_bytes()[:300])
    (own / "p07.png").write_bytes(b"")
    (own / "p09.jpg").write_text("not a photo")
    bomb(own / "p20.png")
    bad = ["p00", "p07", "p09", "p20"]
    good = [image_id for image_id in IDS if image_id not in bad]
    index = index_images(own)
    plan, summary = run_pixels(store, IDS, index)
    assert sorted(summary.failed) == bad
    assert summary.extracted == 36
    check_rows(store, index, good)
    opened = open_features_of(Path(store.root), PIXEL_SPEC)
    assert opened.keys() == good
    assert opened.lookup(bad).tolist() == [-1] * 4
    entries = read_quarantine(plan.folder)
    assert sorted(entries) == bad
    for image_id, words in zip(bad, ("cut short", "empty", "not a JPEG", "pixels"), strict=True):
        assert words in entries[image_id]["reason"]
        assert entries[image_id]["source_digest"] is not None
    again = make_plan(pixel_job(store, IDS, index))
    assert (again.keys, again.quarantined, again.cached) == ([], 4, 36)
    Image.new("RGB", (9, 9), (1, 2, 3)).save(own / "p07.png")
    plan, summary = run_pixels(store, IDS, index)
    assert plan.keys == ["p07"]
    assert sorted(read_quarantine(plan.folder)) == ["p00", "p09", "p20"]
    check_rows(store, index, [*good, "p07"])


def test_a_photo_that_changed_for_the_worse(own: Path, store: StoreConfig) -> None:
    index = index_images(own)
    run_pixels(store, IDS, index)
    content = (own / "p04.png").read_bytes()
    (own / "p04.png").write_bytes(b"x")
    _, summary = run_pixels(store, IDS, index)
    assert list(summary.failed) == ["p04"]
    again = make_plan(pixel_job(store, IDS, index))
    assert (again.keys, again.quarantined, again.cached) == ([], 1, 39)
    assert open_features_of(Path(store.root), PIXEL_SPEC).lookup(["p04"]).tolist() == [-1]
    (own / "p04.png").write_bytes(content)
    run_pixels(store, IDS, index)
    check_rows(store, index, IDS)
    assert read_quarantine(again.folder) == {}


def test_a_photo_that_cannot_be_read_is_tried_again(own: Path, store: StoreConfig) -> None:
    index = index_images(own)
    hidden = own / "p03.jpg"
    content = hidden.read_bytes()
    hidden.unlink()
    plan, summary = run_pixels(store, IDS, index)
    assert "cannot be read" in summary.failed["p03"]
    assert read_quarantine(plan.folder)["p03"]["source_digest"] is None
    assert make_plan(pixel_job(store, IDS, index)).keys == ["p03"]
    hidden.write_bytes(content)
    run_pixels(store, IDS, index)
    check_rows(store, index, IDS)
    assert read_quarantine(plan.folder) == {}


def test_an_overflow_is_quarantined_and_not_stored(own: Path, store: StoreConfig) -> None:
    spec = dataclasses.replace(PIXEL_SPEC, dtype="float16")
    Image.new("RGB", (9, 9), (255, 255, 255)).save(own / "p04.png")
    index = index_images(own)
    _, summary = run_pixels(store, IDS, index, PixelEncoder(scale=300.0), spec)
    assert list(summary.failed) == ["p04"]
    assert "do not fit float16; use [store] dtype float32" in summary.failed["p04"]
    opened = open_features_of(Path(store.root), spec)
    rows = opened.gather(np.arange(len(opened)))
    assert np.isfinite(rows).all()
    assert len(rows) == 39
    assert make_plan(pixel_job(store, IDS, index, spec)).keys == []


def test_a_sentence_that_overflows_is_not_tried_again(
    store: StoreConfig, encoders: EncodersConfig, bert: TextEncoder
) -> None:
    class Loud(Small):
        def encode(self, *inputs: Any) -> np.ndarray:
            values = np.array(self.inner.encode(*inputs))
            values[(inputs[0] == inputs[0].max()).any(axis=1)] = 1e6
            return values

    store = dataclasses.replace(store, dtype="float16")
    spec = text_spec(encoders, store, 1)
    sentences = ["a dog", "a dog .", "two dogs", "a cat"]
    job = text_job(encoders, store, sentences, 1, lambda: Loud(bert))
    _, summary = run_alone(job)
    (failed,) = summary.failed
    again = make_plan(job)
    assert (again.keys, again.quarantined, again.cached) == ([], 1, 3)
    opened = open_features_of(Path(store.root), spec)
    assert opened.keys() == [text for text in sentences if text != failed]


def test_space_is_checked_before_anything_is_written(
    photos: Path, store: StoreConfig, encoders: EncodersConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(photos)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StoreError, match=r"need 41 kB and 1 kB are free; free some space"):
        extract(image_job(encoders, store, IDS, index_images(photos)))
    assert shards(vision_spec(encoders, store).folder(Path(store.root))) == {}


def test_a_shard_that_is_too_large_is_refused(photos: Path, store: StoreConfig) -> None:
    fields = {"image_shape": [30_000, 30_000, 3], "patch_size": 1, "hidden_dim": 1}
    spec = dataclasses.replace(PIXEL_SPEC, architecture=fields)
    with pytest.raises(ConfigError, match=r"shard_rows = 7: one shard would take 25.2 GB .* 1$"):
        make_plan(pixel_job(store, IDS, index_images(photos), spec))
    assert len(make_plan(pixel_job(store, IDS[:1], index_images(photos), spec)).keys) == 1


def test_an_id_without_a_photo(photos: Path, store: StoreConfig) -> None:
    with pytest.raises(StoreError, match="no photo for image id 'none'"):
        make_plan(pixel_job(store, ["p00", "none"], index_images(photos)))


def test_the_lock(tmp_path: Path) -> None:
    with writing(tmp_path / "f"), pytest.raises(StoreError, match="another extraction"):  # noqa: SIM117
        with writing(tmp_path / "f", timeout_seconds=0.1):
            pass
    (tmp_path / "f" / ".tmp-1-x").touch()
    with writing(tmp_path / "f"):
        assert not (tmp_path / "f" / ".tmp-1-x").exists()
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be written"), writing(tmp_path / "file"):
        pass


@pytest.mark.parametrize("kind", ["vit", "text"])
def test_two_at_once_share_the_work(
    photos: Path, store: StoreConfig, encoders: EncodersConfig, kind: str
) -> None:
    job = image_job(encoders, store, IDS, index_images(photos))
    if kind == "text":
        job = text_job(encoders, store, [f"a {a} {b}" for a in WORDS[:8] for b in WORDS[:5]], 2)
    results = []

    def work() -> None:
        results.append(extract(job)[1].extracted)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(results) == 40
    assert open_features_of(Path(store.root), job.spec).keys() == job.keys


def test_two_processes_at_once_do_the_work_once(photos: Path, tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path), str(photos)],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
        )
        for _ in range(2)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    opened = open_features_of(tmp_path, PIXEL_SPEC)
    assert opened.keys() == IDS
    assert [len(shard) for shard in opened.shards] == [5] * 8


def test_text_shards_are_bounded(
    store: StoreConfig, encoders: EncodersConfig, bert: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featstore.extract.plan.TEXT_SHARD_TOKENS", 24)
    store = dataclasses.replace(store, shard_rows=10**9)
    job = text_job(encoders, store, [f"a {word}" for word in WORDS[:8]], 2, lambda: bert)
    extract(job)
    opened = open_features_of(Path(store.root), job.spec)
    assert [len(shard) for shard in opened.shards] == [3, 3, 2]
