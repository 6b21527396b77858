"""The store: look up, gather, and what it says when its folder is not what it should be."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_spec import TEXT, VISION

from featstore.encoders.spec import FeatureSpec
from featstore.errors import (
    CorruptShardError,
    MissingFeaturesError,
    MissingKeyError,
    StaleFeaturesError,
)
from featstore.store.folder import (
    read_manifest,
    read_quarantine,
    reconcile_manifest,
    shard_paths,
    write_manifest,
)
from featstore.store.numbers import Numbers, feature_dtype
from featstore.store.shard import digest_bytes, shard_name
from featstore.store.store import TextStore, VisionStore, open_features_of, open_store
from featstore.store.write import ShardRows, write_shard

SHAPE = (1, 5, 4)
COUNTS = (7, 1, 4)


def vision_shard(
    keys: list[str], seed: int, dtype: str = "float16", shape: Any = SHAPE
) -> ShardRows:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(len(keys), *shape)).astype(feature_dtype(dtype))
    return ShardRows(
        keys, Numbers(features), [digest_bytes(f"{key}{seed}".encode()) for key in keys]
    )


def text_shard(keys: list[str], seed: int, dtype: str = "float16") -> ShardRows:
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(2, 9, len(keys)))]).astype(np.int64)
    features = rng.normal(size=(offsets[-1], 4)).astype(feature_dtype(dtype))
    ids = rng.integers(0, 99, offsets[-1]).astype(np.int32)
    return ShardRows(keys, Numbers(features), offsets=offsets, token_ids=ids)


def make(root: Path, spec: FeatureSpec, parts: list[ShardRows]) -> Path:
    folder = spec.folder(root)
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text(json.dumps({"spec": spec.to_dict()}))
    lines = [
        write_shard(folder / shard_name(i), spec.kind, spec.fingerprint, spec.dtype, part, {})
        for i, part in enumerate(parts)
    ]
    (folder / "manifest.json").write_text(json.dumps({"shards": lines}))
    return folder


def key_lists() -> list[list[str]]:
    numbers = iter(range(sum(COUNTS)))
    return [[f"k{next(numbers)}" for _ in range(count)] for count in COUNTS]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    make(root, VISION, [vision_shard(keys, i) for i, keys in enumerate(key_lists())])
    make(root, TEXT, [text_shard(keys, i) for i, keys in enumerate(key_lists())])
    return root


@pytest.fixture(scope="module")
def vision(root: Path) -> VisionStore:
    return open_features_of(root, VISION)


@pytest.fixture(scope="module")
def text(root: Path) -> TextStore:
    return open_features_of(root, TEXT)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Folder of a vision store that the test may damage."""
    return make(tmp_path, VISION, [vision_shard(keys, i) for i, keys in enumerate(key_lists())])


def plain_vision(folder: Path) -> np.ndarray:
    rows = []
    for path in sorted(folder.glob("*.h5")):
        with h5py.File(path) as file:
            rows.append(file["features"][:, 0])
    return np.concatenate(rows)


def plain_text(folder: Path) -> list[np.ndarray]:
    rows = []
    for path in sorted(folder.glob("*.h5")):
        with h5py.File(path) as file:
            ends = file["offsets"][...]
            rows += [file["features"][a:b] for a, b in itertools.pairwise(ends)]
    return rows


positions = st.lists(st.integers(0, sum(COUNTS) - 1), max_size=30)


@settings(deadline=None)
@given(positions)
def test_gather_equals_a_plain_read(root: Path, vision: VisionStore, chosen: list[int]) -> None:
    wanted = plain_vision(VISION.folder(root))[chosen]
    found = vision.gather(np.array(chosen, np.int64))
    assert found.dtype == np.float16
    assert found.shape == (len(chosen), *SHAPE[1:])
    assert found.tobytes() == wanted.tobytes()
    out = np.ones_like(found)
    assert vision.gather(np.array(chosen, np.int64), out) is out
    assert out.tobytes() == wanted.tobytes()


@pytest.fixture(scope="module", params=[1, 3])
def store_of_views(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[VisionStore, list[bytes]]:
    """A store of several shards and views, and the plain view of each of its rows."""
    shape = (request.param, *SHAPE[1:])
    parts = [vision_shard(keys, i, shape=shape) for i, keys in enumerate(key_lists())]
    spec = dataclasses.replace(VISION, views=request.param)
    root = tmp_path_factory.mktemp("views")
    make(root, spec, parts)
    rows = [row[0].tobytes() for part in parts for row in part.features.values]
    return open_features_of(root, spec), rows


@settings(deadline=None)
@given(positions, st.integers(0, 63))
def test_gather_takes_view_0_into_memory_at_any_address(
    store_of_views: tuple[VisionStore, list[bytes]], chosen: list[int], offset: int
) -> None:
    store, rows = store_of_views
    size = sum(len(rows[i]) for i in chosen)
    memory = np.zeros(size + 2 * offset, np.uint8)
    out = memory[2 * offset :].view(np.float16).reshape(len(chosen), *SHAPE[1:])
    assert store.gather(np.array(chosen, np.int64), out) is out
    assert [row.tobytes() for row in out] == [rows[i] for i in chosen]
    assert not memory[: 2 * offset].any()


@pytest.mark.parametrize("rows", [1, 7, 4096])
def test_an_empty_batch_is_aligned(vision: VisionStore, rows: int) -> None:
    found = vision.empty(rows)
    assert found.dtype == np.float16
    assert found.shape == (rows, *SHAPE[1:])
    assert found.ctypes.data % 64 == 0
    assert found.flags.c_contiguous
    assert found.flags.writeable


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system has no read-ahead advice")
def test_read_ahead_names_the_bytes_of_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [vision_shard(keys, i, shape=(2, 5, 4)) for i, keys in enumerate(key_lists())]
    make(tmp_path, dataclasses.replace(VISION, views=2), parts)
    store = open_features_of(tmp_path, dataclasses.replace(VISION, views=2))
    advise, found = os.posix_fadvise, []

    def recorded(descriptor: int, start: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        found.append(os.pread(descriptor, length, start))
        advise(descriptor, start, length, advice)

    monkeypatch.setattr(os, "posix_fadvise", recorded)
    rows = [row for part in parts for row in part.features.values]
    store.will_need(np.array([11, 0, 7, 8]))
    assert sorted(found) == sorted(rows[i].tobytes() for i in (11, 0, 7, 8))
    found.clear()
    store.gather(np.array([3, 9]))
    assert sorted(found) == sorted(rows[i].tobytes() for i in (3, 9))
    found.clear()
    store.gather(np.array([9, 3, 3]))
    store.will_need(np.array([], np.int64))
    assert not found


def test_read_ahead_is_only_a_hint(own: Path) -> None:
    store = VisionStore(own, VISION.to_dict())
    wanted = plain_vision(own)
    for path in own.glob("*.h5"):
        path.unlink()
    store.will_need(np.arange(store.rows))
    assert np.array_equal(store.gather(np.arange(store.rows)), wanted)
    with pytest.raises(IndexError):
        store.will_need(np.array([store.rows]))


@settings(deadline=None)
@given(positions, st.integers(8, 12))
def test_text_gather_equals_a_plain_read(
    root: Path, text: TextStore, chosen: list[int], length: int
) -> None:
    rows = plain_text(TEXT.folder(root))
    hidden, mask = text.gather(np.array(chosen, np.int64), length)
    assert hidden.shape == (len(chosen), length, 4)
    assert mask.shape == (len(chosen), length)
    for i, position in enumerate(chosen):
        count = len(rows[position])
        assert text.lengths(np.array([position])).tolist() == [count]
        assert hidden[i, :count].tobytes() == rows[position].tobytes()
        assert not hidden[i, count:].any()
        assert mask[i].tolist() == [True] * count + [False] * (length - count)


def test_text_lengths_and_the_first_token(root: Path, text: TextStore) -> None:
    rows = plain_text(TEXT.folder(root))
    everything = np.arange(text.rows)
    first, mask = text.gather(everything, 1)
    assert np.array_equal(first[:, 0], [row[0] for row in rows])
    assert mask.all()
    longest = int(text.lengths(everything).max())
    with pytest.raises(ValueError, match=f"has {longest} tokens, more than {longest - 1}"):
        text.gather(everything, longest - 1)


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_dtypes(tmp_path: Path, dtype: str) -> None:
    parts = [vision_shard(["a", "b"], 0, dtype), vision_shard(["c"], 1, dtype)]
    spec = dataclasses.replace(VISION, dtype=dtype)
    make(tmp_path, spec, parts)
    found = open_features_of(tmp_path, spec).gather(np.array([2, 0]))
    assert found.dtype == feature_dtype(dtype)
    assert found[0].tobytes() == parts[1].features.values[0, 0].tobytes()
    assert found[1].tobytes() == parts[0].features.values[0, 0].tobytes()
    words = dataclasses.replace(TEXT, dtype=dtype)
    sentence = text_shard(["a"], 0, dtype)
    make(tmp_path, words, [sentence])
    hidden, mask = open_features_of(tmp_path, words).gather(np.array([0]), 10)
    assert hidden[mask].tobytes() == sentence.features.values.tobytes()


def test_lookup(vision: VisionStore) -> None:
    keys = [key for keys in key_lists() for key in keys]
    assert vision.keys() == keys
    assert vision.lookup(keys).tolist() == list(range(len(keys)))
    asked = ["k3", "none", "k11", "k3", ""]
    assert vision.lookup(asked).tolist() == [3, -1, 11, 3, -1]
    assert vision.lookup(np.array(asked, object)).dtype == np.int64
    assert vision.lookup([]).shape == (0,)


def test_the_newest_of_equal_keys_counts(tmp_path: Path) -> None:
    parts = [vision_shard(keys, i) for i, keys in enumerate((["a", "b"], ["b", "c"], ["b"]))]
    make(tmp_path, VISION, parts)
    store = open_features_of(tmp_path, VISION)
    assert store.lookup(["a", "b", "c"]).tolist() == [0, 4, 3]
    assert store.rows == 5
    assert (len(store), store.keys()) == (3, ["a", "c", "b"])
    assert store.source_digests(np.array([4, 1])).tolist() == [
        list(digest_bytes(b"b2")),
        list(digest_bytes(b"b0")),
    ]


def test_a_photo_that_changed_and_failed_is_absent(own: Path) -> None:
    entries = {
        "k1": {"reason": "damaged", "source_digest": [1, 2]},
        "k2": {"reason": "cannot be read", "source_digest": None},
    }
    (own / "quarantine.json").write_text(json.dumps(entries))
    store = open_features_of(own.parent.parent, VISION)
    assert store.lookup(["k0", "k1", "k2"]).tolist() == [0, -1, 2]


@pytest.mark.parametrize("bad", [[-1], [sum(COUNTS)], [0, 10**12]])
def test_positions_out_of_range(vision: VisionStore, text: TextStore, bad: list[int]) -> None:
    with pytest.raises(IndexError):
        vision.gather(np.array(bad))
    with pytest.raises(IndexError):
        text.gather(np.array(bad), 12)
    with pytest.raises(IndexError):
        vision.source_digests(np.array(bad))
    with pytest.raises(IndexError):
        text.lengths(np.array(bad))


def test_out_must_fit(vision: VisionStore) -> None:
    for out in (np.empty((3, 5, 4), np.float16), np.empty((2, 5, 4), np.float32)):
        with pytest.raises(ValueError, match="out is"):
            vision.gather(np.array([0, 1]), out)


def test_a_flipped_feature_byte_is_never_returned(own: Path) -> None:
    path = own / shard_name(2)
    with h5py.File(path) as file:
        at = file["features"].id.get_offset() + 2 * 40 + 7
    content = bytearray(path.read_bytes())
    content[at] ^= 16
    path.write_bytes(content)
    store = open_features_of(own.parent.parent, VISION)
    out = np.zeros((2, *SHAPE[1:]), np.float16)
    for _ in range(2):
        with pytest.raises(CorruptShardError, match=r"shard-00002.h5: row 2 \('k10'\)"):
            store.gather(np.array([0, 10]), out)
        assert not out.any()
    store.gather(np.array([0, 9, 11]))


def test_a_missing_shard_and_a_wrong_size(own: Path) -> None:
    moved = own / shard_name(1)
    content = moved.read_bytes()
    moved.unlink()
    with pytest.raises(CorruptShardError, match=r"shard-00001.h5 is missing"):
        VisionStore(own, VISION.to_dict())
    moved.write_bytes(content + b"\0")
    with pytest.raises(CorruptShardError, match=f"{len(content) + 1} bytes, expected"):
        VisionStore(own, VISION.to_dict())


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"shards": [{}]}', b'{"shards": 3}'])
def test_the_manifest_can_be_rebuilt(own: Path, content: bytes | None) -> None:
    lines = read_manifest(own)
    (own / "manifest.json").unlink()
    if content is not None:
        (own / "manifest.json").write_bytes(content)
    # The newest shard may be lost with it, and an older row of a photo would come back.
    for read in (reconcile_manifest, lambda folder: VisionStore(folder, VISION.to_dict())):
        with pytest.raises(CorruptShardError, match=r"manifest\.json: .*store repair"):
            read(own)
    assert read_manifest(own) == []
    write_manifest(own, own.name, [])
    assert len(VisionStore(own, VISION.to_dict())) == sum(COUNTS)
    assert reconcile_manifest(own) == lines
    assert [line["rows"] for line in lines] == list(COUNTS)


def test_a_damaged_shard_is_not_taken_into_the_manifest(own: Path) -> None:
    write_manifest(own, own.name, [])
    (own / shard_name(1)).write_bytes(b"x")
    with pytest.raises(CorruptShardError, match="shard-00001"):
        reconcile_manifest(own)


def test_shards_of_different_shapes_are_refused(tmp_path: Path) -> None:
    parts = [vision_shard(["a"], 0), vision_shard(["b"], 1, shape=(1, 1, 4))]
    folder = make(tmp_path, VISION, parts)
    with pytest.raises(CorruptShardError, match=r"has shape \(1, 1, 4\), expected \(1, 5, 4\)"):
        VisionStore(folder, VISION.to_dict())


def test_shards_are_in_numeric_order(tmp_path: Path) -> None:
    for number in (100000, 2, 99999):
        (tmp_path / shard_name(number)).touch()
    names = [path.name for path in shard_paths(tmp_path)]
    assert names == ["shard-00002.h5", "shard-99999.h5", "shard-100000.h5"]


@pytest.mark.parametrize("content", [b"{", b"[1]", b'{"a": 1}', b'{"a": {"reason": "x"}}', b"\xff"])
def test_a_broken_quarantine_list(own: Path, content: bytes) -> None:
    assert read_quarantine(own) == {}
    (own / "quarantine.json").write_bytes(content)
    with pytest.raises(CorruptShardError, match="delete it and extract again"):
        read_quarantine(own)


def test_what_open_store_says(own: Path, tmp_path: Path) -> None:
    with pytest.raises(
        MissingFeaturesError, match=r"no text features .* run `featstore extract-text`"
    ):
        open_features_of(tmp_path, TEXT)
    other = dataclasses.replace(VISION, tokens="all", dtype="float32")
    wanted = "dtype: wanted 'float32', stored 'float16'; tokens: wanted 'all', stored 'patches'"
    with pytest.raises(StaleFeaturesError, match=wanted):
        open_features_of(tmp_path, other)
    empty = other.folder(tmp_path)
    empty.mkdir()
    (empty / "spec.json").write_text(json.dumps({"spec": other.to_dict()}))
    with pytest.raises(StaleFeaturesError, match=wanted):
        open_features_of(tmp_path, other)
    (own / "spec.json").write_text("{}")
    with pytest.raises(CorruptShardError, match="no readable spec"):
        open_features_of(tmp_path, VISION)
    with pytest.raises(MissingFeaturesError):
        open_features_of(tmp_path, other)


def test_gather_copies_no_more_than_the_batch(tmp_path: Path) -> None:
    keys = [f"k{i}" for i in range(64)]
    make(tmp_path, VISION, [vision_shard(keys, 0, shape=(1, 64, 64))])
    store = open_features_of(tmp_path, VISION)
    chosen = np.arange(0, 64, 8)
    out = np.empty((8, 64, 64), np.float16)
    tracemalloc.start()
    try:
        store.gather(chosen, out)
        assert tracemalloc.get_traced_memory()[1] < out[0].nbytes
        tracemalloc.reset_peak()
        store.gather(chosen)
        assert tracemalloc.get_traced_memory()[1] < out.nbytes * 1.2
    finally:
        tracemalloc.stop()


def test_threads(root: Path, text: TextStore) -> None:
    store = open_features_of(root, VISION)
    wanted = plain_vision(VISION.folder(root))

    def work(seed: int) -> bool:
        chosen = np.random.default_rng(seed).integers(0, store.rows, 40)
        text.gather(chosen, 8)
        return bool((store.gather(chosen) == wanted[chosen]).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(64)))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_a_fork(root: Path) -> None:
    store = open_features_of(root, VISION)
    wanted = plain_vision(VISION.folder(root))
    child = os.fork()
    if not child:
        same = np.array_equal(store.gather(np.arange(store.rows)), wanted)
        os._exit(0 if same and store.lookup(["k3"])[0] == 3 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert np.array_equal(store.gather(np.arange(store.rows)), wanted)


@pytest.fixture
def notebook(own: Path) -> VisionStore:
    """A store opened by path: "k1" superseded, "k2" changed and then failed."""
    newest = vision_shard(["k1"], 9)
    write_shard(own / shard_name(3), "vit", own.name, "float16", newest, {})
    spec = json.loads((own / "spec.json").read_text())
    (own / "spec.json").write_text(json.dumps({**spec, "names": {"preset": "tiny"}}))
    entry = {"reason": "k2.jpg: the file is empty", "source_digest": [1, 2]}
    (own / "quarantine.json").write_text(json.dumps({"k2": entry}))
    store = open_store(str(own))
    assert isinstance(store, VisionStore)
    return store


def test_a_store_reads_like_a_mapping(notebook: VisionStore) -> None:
    keys = [f"k{i}" for i in range(12) if i not in (1, 2)] + ["k1"]
    assert notebook.keys() == list(notebook) == keys
    assert (len(notebook), notebook.rows) == (11, 13)
    assert "k1" in notebook
    assert "k2" not in notebook
    assert "nobody" not in notebook
    assert 3 not in notebook
    plain = plain_vision(notebook.folder)
    assert notebook["k1"].tobytes() == plain[12].tobytes()
    assert notebook["k3"].tobytes() == plain[3].tobytes()
    assert notebook["k3"].shape == SHAPE[1:]
    notebook["k3"][...] = 0
    assert notebook["k3"].any()
    assert dict(notebook).keys() == set(keys)


def test_gather_takes_keys_and_positions_of_any_kind(notebook: VisionStore) -> None:
    wanted = plain_vision(notebook.folder)[[12, 0, 12]]
    asked = ["k1", "k0", "k1"]
    for keys in (asked, tuple(asked), np.array(asked), np.array(asked, object), iter(asked)):
        assert np.array_equal(notebook.gather(keys), wanted)
    for keys in ([12, 0, 12], np.array([12, 0, 12], np.int32), np.array([12, 0, 12], np.uint64)):
        assert np.array_equal(notebook.gather(keys), wanted)
    out = notebook.empty(3)
    assert notebook.gather(asked, out) is out
    assert np.array_equal(out, wanted)
    assert notebook.gather([]).shape == (0, *SHAPE[1:])


@pytest.mark.parametrize("keys", ["k0", [True, False], [0.0], [None], np.zeros(12, bool)])
def test_gather_refuses_what_is_neither(notebook: VisionStore, keys: Any) -> None:
    with pytest.raises(TypeError, match="expected"):
        notebook.gather(keys)


def test_a_key_that_is_absent(notebook: VisionStore, text: TextStore) -> None:
    said = r"no features of 'k0.jpg'; there are 11 keys such as 'k0'; run `featstore extract-vit`"
    with pytest.raises(MissingKeyError, match=said) as caught:
        notebook["k0.jpg"]
    assert isinstance(caught.value, KeyError)
    with pytest.raises(MissingKeyError, match=r"2 of 3 rows .*'k2'\), which is quarantined: k2"):
        notebook.gather(["k0", "k2", "none"])
    with pytest.raises(MissingKeyError, match=r"'none'.*extract-text"):
        text.token_ids("none")
    with pytest.raises(TypeError, match="expected a key, found 3"):
        notebook[3]  # type: ignore[index]


def test_what_a_store_shows(notebook: VisionStore, text: TextStore) -> None:
    shown = repr(notebook)
    boundary = notebook.spec["boundary"]
    for words in ("VisionStore tiny: 11 rows of 5 x 4 float16", f"boundary {boundary}"):
        assert words in shown
    assert f"{13 * 40} B in {notebook.folder}" in shown
    tokens = text.lengths(text.live()).sum()
    assert f"TextStore {TEXT.encoder}: 12 rows, {tokens} tokens x 4 float16" in repr(text)


def test_a_sentence_by_itself(root: Path, text: TextStore) -> None:
    rows = plain_text(TEXT.folder(root))
    with h5py.File(TEXT.folder(root) / shard_name(2)) as file:
        ids = file["token_ids"][file["offsets"][1] : file["offsets"][2]]
    assert text["k9"].tobytes() == rows[9].tobytes()
    assert text.token_ids("k9").tolist() == ids.tolist()
    assert len(text["k9"]) == len(ids)
    hidden, mask = text.gather(["k9", "k0"])
    assert hidden.shape[1] == max(len(rows[9]), len(rows[0]))
    assert hidden[mask].tobytes() == rows[9].tobytes() + rows[0].tobytes()


@pytest.mark.parametrize("path", [".", "{}/", "../{}"])
def test_a_store_is_opened_by_any_path(
    own: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(own)
    place = Path(path.format(own.name))
    if path == "{}/":
        monkeypatch.chdir(own.parent)
    assert open_store(place)["k0"].tobytes() == plain_vision(own)[0].tobytes()


def test_a_store_without_rows(own: Path) -> None:
    for path in own.glob("*.h5"):
        path.unlink()
    write_manifest(own, own.name, [])
    store = VisionStore(own, VISION.to_dict())
    assert (len(store), store.keys(), list(store), "k0" in store) == (0, [], [], False)
    assert "no rows" in repr(store)
    with pytest.raises(MissingKeyError, match="no features of 'k0'; run"):
        store["k0"]
    with pytest.raises(MissingFeaturesError, match="no features there"):
        open_store(own)


def test_opening_a_store_imports_no_framework(own: Path) -> None:
    code = (
        "import sys; from featstore.store.store import open_store;"
        f"print(open_store({str(own)!r})['k0'].shape, *sys.modules.keys()"
        " & {'tensorflow', 'keras', 'keras_hub', 'jax'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "(5, 4)\n"
