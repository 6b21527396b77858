"""Several processes on one folder: the bytes of one process, whoever makes which shard."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from test_extract import (
    BATCH,
    IDS,
    PIXEL_SPEC,
    PixelEncoder,
    bomb,
    check_rows,
    pixel_job,
    write_photos,
)

from featstore.care.gc import compact
from featstore.config import StoreConfig
from featstore.data.images import index_images
from featstore.encoders.spec import FeatureSpec, TextSpec
from featstore.errors import StoreError, UsageError
from featstore.extract.claims import writing
from featstore.extract.extract import ALL, Summary, extract
from featstore.extract.plan import Job, Plan
from featstore.extract.publisher import PLAN, Publisher, read_plan, request_token
from featstore.extract.worklist import sharing
from featstore.publish import write_json
from featstore.store.folder import read_quarantine, shard_paths
from featstore.store.numbers import Numbers
from featstore.store.store import TextStore, open_features_of
from featstore.store.write import ShardRows
from trainer.commands.extract import _shard_range
from trainer.commands.main import cli

ROOT = Path(__file__).resolve().parent.parent
BAD = ["p00", "p07", "p09", "p20", *(f"p{i:02}" for i in range(28, 35))]
# As many sentences, of which the same ones fail.
SENTENCES = [f"{'loud ' * (name in BAD)}a dog named {name}" for name in IDS]
WORKER = (
    "import sys; sys.path[:0] = ['tests', '.']; import test_shard_range;"
    " test_shard_range.worker(*sys.argv[1:])"
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 photos; some are damaged, all of p28 to p34 among them: one whole planned shard."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    write_photos(folder)
    for name in BAD:
        (path,) = folder.glob(f"{name}.*")
        path.write_bytes(path.read_bytes()[:300])
    bomb(folder / "p20.png")
    return folder


class WordEncoder:
    """A text encoder without TensorFlow: of each word its length and its place."""

    num_layers, width = 3, 2

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def tokenize(self, sentences: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        token_ids = np.zeros((len(sentences), 8), np.int32)
        for row, sentence in zip(token_ids, sentences, strict=True):
            words = sentence.split()
            row[: len(words)] = [zlib.crc32(word.encode()) >> 8 for word in words]
        return token_ids, token_ids > 0

    def encode(self, token_ids: np.ndarray, mask: np.ndarray, k_txt: int) -> np.ndarray:
        time.sleep(self.seconds)
        places = np.broadcast_to(np.arange(token_ids.shape[1]), token_ids.shape)
        values = np.stack([token_ids, k_txt * places], -1).astype(np.float32)
        values[token_ids[:, 0] == self.tokenize(["loud"])[0][0, 0]] = np.inf
        return values


WORD_SPEC = TextSpec(
    encoder="WordEncoder",
    weights="0",
    architecture={"hidden_dim": 2, "num_layers": 3},
    boundary=1,
    dtype="float32",
    precision="float32",
    tokenizer="0",
    sequence_length=8,
)


@pytest.fixture(scope="module", params=["vit", "text"])
def inputs(request: pytest.FixtureRequest, photos: Path) -> Path | None:
    """The photos, or None for the sentences."""
    return photos if request.param == "vit" else None


def store_in(root: Path) -> StoreConfig:
    return StoreConfig(
        root=str(root), shard_rows=7, encode_batch_size=BATCH, dtype="float32", decode_threads=2
    )


def share(
    root: Path,
    photos: Path | None,
    shards: range = ALL,
    ids: list[str] = IDS,
    seconds: float = 0.0,
) -> tuple[Plan, Summary]:
    store = store_in(root)
    if photos is None:
        words = functools.partial(WordEncoder, seconds)
        job = Job(WORD_SPEC, "words", store, SENTENCES, load=words)
    else:
        pixels = functools.partial(PixelEncoder, seconds=seconds)
        job = pixel_job(store, ids, index_images(photos), load=pixels)
    return extract(job, shards=shards)


def worker(root: str, photos: str, first: str, end: str, seconds: str) -> None:
    """Be one job of an array; run by the tests in processes."""
    print("ready", flush=True)
    folder = Path(photos) if photos else None
    share(Path(root), folder, range(int(first), int(end)), seconds=float(seconds))


def start(root: Path, photos: Path | None, first: int, end: int, seconds: float = 0.0) -> Any:
    arguments = [str(root), str(photos or ""), str(first), str(end), str(seconds)]
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, *arguments], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.stdout.close()
    return process


def spec_of(photos: Path | None) -> FeatureSpec:
    return WORD_SPEC if photos is None else PIXEL_SPEC


def folder_of(root: Path, spec: FeatureSpec = PIXEL_SPEC) -> Path:
    return spec.folder(root)


def contents(root: Path, spec: FeatureSpec = PIXEL_SPEC) -> dict[str, Any]:
    """What two stores have in common: all but the commands that made them."""
    folder = folder_of(root, spec)
    found: dict[str, Any] = {path.name: path.read_bytes() for path in shard_paths(folder)}
    manifest = json.loads((folder / "manifest.json").read_text())
    found["manifest"] = (manifest["shards"], manifest["quarantine"])
    found["quarantine"] = json.loads((folder / "quarantine.json").read_text())
    found["spec"] = json.loads((folder / "spec.json").read_text())["spec"]
    found["files"] = sorted(os.listdir(folder))
    return found


@pytest.fixture(scope="module")
def single(inputs: Path | None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The store of a single process."""
    root = tmp_path_factory.mktemp("single")
    share(root, inputs)
    return contents(root, spec_of(inputs))


def check_sentences(root: Path, sentences: list[str]) -> None:
    """Compare each key's row with its own sentence, encoded alone."""
    opened = open_features_of(root, WORD_SPEC)
    assert isinstance(opened, TextStore)
    hidden, valid = opened.gather(opened.lookup(sentences), 8)
    for sentence, row, mask in zip(sentences, hidden, valid, strict=True):
        token_ids, wanted = WordEncoder().tokenize([sentence])
        assert np.array_equal(mask, wanted[0])
        assert np.array_equal(row[mask], WordEncoder().encode(token_ids, wanted, 2)[0][mask])


def test_a_failed_row_shortens_its_shard_and_shifts_no_other(
    inputs: Path | None, single: dict[str, Any], tmp_path: Path
) -> None:
    share(tmp_path, inputs)
    spec, keys = spec_of(inputs), SENTENCES if inputs is None else IDS
    opened = open_features_of(tmp_path, spec)
    rows = {shard.path.name: shard.keys() for shard in opened.shards}
    good = [key for key, name in zip(keys, IDS, strict=True) if name not in BAD]
    assert rows == {
        f"shard-{number:05d}.h5": [key for key in keys[number * 7 :][:7] if key in good]
        for number in (0, 1, 2, 3, 5)
    }
    if inputs is None:
        check_sentences(tmp_path, good)
    else:
        check_rows(store_in(tmp_path), index_images(inputs), good)
    assert sorted(read_quarantine(folder_of(tmp_path, spec))) == sorted(set(keys) - set(good))
    assert single["files"] == [
        ".lock",
        "manifest.json",
        "quarantine.json",
        *(f"shard-{number:05d}.h5" for number in (0, 1, 2, 3, 5)),
        "spec.json",
    ]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 2, 0]])
def test_ranges_in_any_order_give_the_bytes_of_one_process(
    inputs: Path | None, single: dict[str, Any], tmp_path: Path, order: list[int]
) -> None:
    extracted, folder = 0, folder_of(tmp_path, spec_of(inputs))
    for job in order:
        before = set(shard_paths(folder))
        _, summary = share(tmp_path, inputs, range(job * 2, job * 2 + 2))
        extracted += summary.extracted
        made = {int(p.stem[6:]) for p in set(shard_paths(folder)) - before}
        assert made == {job * 2, job * 2 + 1} - {4}
        open_features_of(tmp_path, spec_of(inputs)).lookup([])
    assert extracted == 40 - len(BAD)
    assert contents(tmp_path, spec_of(inputs)) == single
    # A job that is started again, and one whose range lies beyond the plan, do nothing.
    for again in (range(2), range(6, 8), ALL):
        plan, summary = share(tmp_path, inputs, again)
        assert (summary.extracted, plan.keys) == (0, [])
    assert contents(tmp_path, spec_of(inputs)) == single


def test_jobs_side_by_side_give_the_bytes_of_one_process(
    inputs: Path | None, single: dict[str, Any], tmp_path: Path
) -> None:
    jobs = [start(tmp_path, inputs, first, first + 2, 0.01) for first in (0, 2, 4)]
    assert [job.wait() for job in jobs] == [0, 0, 0]
    assert contents(tmp_path, spec_of(inputs)) == single


def test_processes_without_ranges_share_the_shards(
    inputs: Path | None, single: dict[str, Any], tmp_path: Path
) -> None:
    jobs = [start(tmp_path, inputs, 0, sys.maxsize, 0.02) for _ in range(3)]
    assert [job.wait() for job in jobs] == [0, 0, 0]
    assert contents(tmp_path, spec_of(inputs)) == single


@pytest.mark.slow
def test_jobs_killed_at_any_moment_give_the_bytes_of_one_process(
    inputs: Path | None, single: dict[str, Any], tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    reached = []
    for _ in range(4):
        jobs = [start(tmp_path, inputs, first, first + 2, 0.02) for first in (0, 2, 4)]
        time.sleep(rng.uniform(0.0, 0.1))
        for job in jobs:
            job.kill()
            job.wait()
        reached.append(len(shard_paths(folder_of(tmp_path, spec_of(inputs)))))
    assert any(reached)
    share(tmp_path, inputs)
    assert contents(tmp_path, spec_of(inputs)) == single


def test_a_dead_owner_is_survived_by_those_who_wait(
    inputs: Path | None, single: dict[str, Any], tmp_path: Path
) -> None:
    folder = folder_of(tmp_path, spec_of(inputs))
    owner = start(tmp_path, inputs, 1, 3, 30.0)
    while not (folder / ".claim-00001").exists():
        time.sleep(0.01)
    others = [threading.Thread(target=share, args=(tmp_path, inputs)) for _ in range(2)]
    for thread in others:
        thread.start()
    while not (folder / "shard-00005.h5").exists():
        time.sleep(0.01)
    assert not (folder / "shard-00001.h5").exists()
    owner.kill()
    owner.wait()
    for thread in others:
        thread.join()
    assert contents(tmp_path, spec_of(inputs)) == single


class StopError(Exception):
    pass


@pytest.mark.parametrize("moment", ["shard", "quarantine", "manifest", "empty"])
def test_a_stop_between_a_shard_and_its_lists_loses_nothing(
    inputs: Path | None,
    single: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    names = {
        "shard": "shard-00001.h5",
        "quarantine": "quarantine.json",
        "manifest": "manifest.json",
        "empty": PLAN,
    }
    replace, seen = os.replace, []

    def stop(source: Any, target: Any) -> None:
        if Path(target).name == names[moment]:
            seen.append(target)
            if len(seen) == (1 if moment == "shard" else 2):
                raise StopError
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(StopError):
            share(tmp_path, inputs)
    assert read_plan(folder_of(tmp_path, spec_of(inputs))) is not None
    share(tmp_path, inputs)
    assert contents(tmp_path, spec_of(inputs)) == single


def test_rows_of_other_requests_do_not_mix(photos: Path, tmp_path: Path) -> None:
    """Half a plan, then other rows, then the first again."""
    share(tmp_path, photos, range(1, 2))
    assert read_plan(folder_of(tmp_path)) is not None
    share(tmp_path, photos, ids=IDS[30:])
    assert read_plan(folder_of(tmp_path)) is None
    share(tmp_path, photos)
    check_rows(store_in(tmp_path), index_images(photos), [key for key in IDS if key not in BAD])
    opened = open_features_of(tmp_path, PIXEL_SPEC)
    assert len(opened) == 40 - len(BAD)


def test_who_extracts_other_rows_waits(photos: Path, tmp_path: Path) -> None:
    owner = start(tmp_path, photos, 1, 2, 30.0)
    while not (folder_of(tmp_path) / ".claim-00001").exists():
        time.sleep(0.01)
    other = threading.Thread(target=share, args=(tmp_path, photos), kwargs={"ids": IDS[:3]})
    other.start()
    other.join(0.5)
    assert other.is_alive()
    assert shard_paths(folder_of(tmp_path)) == []
    with pytest.raises(StoreError, match="another extraction"):  # noqa: SIM117
        with writing(folder_of(tmp_path), timeout_seconds=0):
            pass
    with pytest.raises(StoreError, match="another extraction"):
        compact(folder_of(tmp_path))
    owner.kill()
    owner.wait()
    other.join()
    assert open_features_of(tmp_path, PIXEL_SPEC).keys() == IDS[1:3]


def test_a_photo_that_changes_while_a_plan_is_open_is_not_left_stale(
    photos: Path, tmp_path: Path
) -> None:
    own = tmp_path / "photos"
    write_photos(own)
    share(tmp_path / "store", own, range(2))
    Image.new("RGB", (9, 9), (1, 2, 3)).save(own / "p04.png")
    _, summary = share(tmp_path / "store", own)
    assert summary.extracted == 40 - 14 + 1
    check_rows(store_in(tmp_path / "store"), index_images(own), IDS)


def test_another_shard_size_makes_another_plan(photos: Path, tmp_path: Path) -> None:
    share(tmp_path, photos, range(1))
    store = dataclasses.replace(store_in(tmp_path), shard_rows=10)
    extract(pixel_job(store, IDS, index_images(photos)))
    counts = [len(shard) for shard in open_features_of(tmp_path, PIXEL_SPEC).shards]
    assert counts == [6, 8, 9, 3, 3]


def test_a_damaged_plan_is_made_again(photos: Path, tmp_path: Path) -> None:
    share(tmp_path, photos, range(2))
    path = folder_of(tmp_path) / PLAN
    written = json.loads(path.read_text())
    for change in ({"first": 3}, {"keys": IDS[1:]}, {"empty": ["x"]}, {"shard_rows": 0}):
        write_json(path, {**written, **change})
        assert read_plan(path.parent) is None
    path.write_text("{")
    share(tmp_path, photos)
    assert not path.exists()
    check_rows(store_in(tmp_path), index_images(photos), [key for key in IDS if key not in BAD])


def test_a_process_that_was_taken_for_dead_publishes_nothing_wrong(
    photos: Path, tmp_path: Path
) -> None:
    """Its plan was given up, and another one uses the numbers."""
    job = pixel_job(store_in(tmp_path), IDS, index_images(photos))
    with sharing(job) as part:
        assert part.work is not None
        token = part.work.publisher.token
        rows = ShardRows(["p01"], Numbers.zeros((1, 1, 4, 3), "float32"), [(1, 2)])
    share(tmp_path, photos, range(1), ids=IDS[20:])
    late = Publisher(folder_of(tmp_path), PIXEL_SPEC, token)
    with pytest.raises(StoreError, match="has replaced the plan of shard 1; run the command"):
        late.publish(1, rows, {"p00": ("late", None)})
    assert late.publish(0, rows, {"p00": ("late", None)}) is False
    assert not list(folder_of(tmp_path).glob(".tmp-*"))
    assert "p00" not in read_quarantine(folder_of(tmp_path))


def test_two_who_make_the_same_shard_publish_it_once(photos: Path, tmp_path: Path) -> None:
    job = pixel_job(store_in(tmp_path), IDS, index_images(photos))
    with sharing(job) as part:
        assert part.work is not None
        rows = ShardRows(["p01"], Numbers.zeros((1, 1, 4, 3), "float32"), [(1, 2)])
        two = Publisher(folder_of(tmp_path), PIXEL_SPEC, part.work.publisher.token)
        assert part.work.publisher.publish(0, rows, {"p00": ("bad", (3, 4))}) is True
        before = contents(tmp_path)
        assert two.publish(0, rows, {"p00": ("other", None)}) is False
        empty = ShardRows([], Numbers.zeros((0, 1, 4, 3), "float32"), [])
        assert two.publish(1, empty, {}) is True
        assert two.publish(1, empty, {}) is False
        assert part.work.pending(range(3)) == [2]
    assert {**contents(tmp_path), "files": []} == {**before, "files": []}


def test_bytes_that_changed_on_the_way_are_refused(photos: Path, tmp_path: Path) -> None:
    job = pixel_job(store_in(tmp_path), IDS, index_images(photos))
    rows = ShardRows(["p01"], Numbers.zeros((1, 1, 4, 3), "float32"), [(1, 2)])
    other = Publisher(PIXEL_SPEC.folder(tmp_path / "other"), PIXEL_SPEC, None)
    other.folder.mkdir(parents=True)
    from featstore.store.write import write_shard

    path = other.folder / "shard-00000.h5"
    spec = PIXEL_SPEC
    line = write_shard(path, "vit", spec.fingerprint, spec.dtype, rows, other.versions)
    with sharing(job) as part:
        assert part.work is not None
        data = path.read_bytes()
        wrong = data[:-1] + bytes([data[-1] ^ 1])
        with pytest.raises(StoreError, match="arrived, expected"):
            part.work.publisher.publish_file(0, wrong, line, ["p01"], {})
        assert shard_paths(folder_of(tmp_path)) == []
        assert part.work.publisher.publish_file(0, data, line, ["p01"], {})
    assert (folder_of(tmp_path) / "shard-00000.h5").read_bytes() == data


def test_the_plan_depends_on_the_request_and_not_on_the_time() -> None:
    assert request_token(["a", "b", "a"], 7) == request_token(["a", "b"], 7)
    assert len({request_token(k, n) for k, n in ((["a"], 7), (["b"], 7), (["a"], 8))}) == 3


def test_leftovers_go_when_nobody_is_at_work(photos: Path, tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    folder.mkdir(parents=True)
    for name in (".tmp-1-x", ".claim-00003", ".claim-worker-dead"):
        (folder / name).touch()
    share(tmp_path, photos, range(1))
    assert sorted(path.name for path in folder.glob(".*")) == [".lock"]
    # While another one works, its unfinished file stays.
    owner = start(tmp_path, photos, 1, 2, 30.0)
    while not (folder / ".claim-00001").exists():
        time.sleep(0.01)
    (folder / ".tmp-2-x").touch()
    share(tmp_path, photos, range(2, 3))
    assert (folder / ".tmp-2-x").exists()
    owner.kill()
    owner.wait()
    share(tmp_path, photos)
    assert not (folder / ".tmp-2-x").exists()


def test_the_range_of_the_command_line() -> None:
    assert _shard_range("2:5") == range(2, 5)
    assert _shard_range(None) == ALL
    assert _shard_range(":3") == range(3)
    assert _shard_range("4:").start == 4
    for wrong in ("3", "5:2", "2:2", "-1:3", "a:b", "1:2:3"):
        with pytest.raises(UsageError, match="expected A:B with 0 <= A < B, such as 0:8"):
            _shard_range(wrong)


def test_a_dry_run_is_of_all_shards() -> None:
    result = CliRunner().invoke(cli, ["extract-vit", "--dry-run", "--shard-range", "0:2"])
    assert result.exit_code == 2
    assert "--shard-range and --dry-run exclude each other" in result.stderr


def test_settings_of_ray_need_ray() -> None:
    for flags in (["--actors", "2"], ["--num-gpus", "0"], ["--return-shards"]):
        result = CliRunner().invoke(cli, ["extract-vit", *flags])
        assert result.exit_code == 2
        assert result.stderr.endswith("add --ray ADDRESS\n")
