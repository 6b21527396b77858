"""One shard: what is written, what is found when it is opened, and every kind of damage."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import xxhash

from featstore.errors import CorruptShardError, FeatstoreError
from featstore.store.numbers import Numbers, feature_dtype
from featstore.store.shard import (
    INDEX_DATASETS,
    PAGE_BYTES,
    describe_file,
    digest_bytes,
    digest_keys,
    open_shard,
    shard_name,
    shard_number,
)
from featstore.store.write import ShardRows, write_shard

FINGERPRINT = "f" * 32
VERSIONS = {"numpy": "2.0", "python": "3.11"}
DTYPES = ("float16", "float32", "bfloat16")
KEYS = ["a", "sub/é 图", "", "dog", "x" * 300]


def vision_rows(dtype: str = "float16", keys: list[str] = KEYS, seed: int = 0) -> ShardRows:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(len(keys), 1, 5, 4)).astype(feature_dtype(dtype))
    return ShardRows(keys, Numbers(features), [digest_bytes(key.encode()) for key in keys])


def text_rows(dtype: str = "float16", lengths: tuple[int, ...] = (3, 0, 1, 7, 2)) -> ShardRows:
    rng = np.random.default_rng(1)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    features = rng.normal(size=(offsets[-1], 4)).astype(feature_dtype(dtype))
    ids = rng.integers(0, 99, offsets[-1]).astype(np.int32)
    return ShardRows(KEYS[: len(lengths)], Numbers(features), offsets=offsets, token_ids=ids)


ROWS: dict[str, Callable[..., ShardRows]] = {"vit": vision_rows, "text": text_rows}


def write(path: Path, kind: str, dtype: str = "float16", rows: ShardRows | None = None) -> Path:
    write_shard(path, kind, FINGERPRINT, dtype, rows or ROWS[kind](dtype), VERSIONS)
    return path


@pytest.fixture(params=["vit", "text"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def path(tmp_path: Path, kind: str) -> Path:
    return write(tmp_path / shard_name(0), kind)


def refused(path: Path, kind: str, message: str | None = None) -> None:
    with pytest.raises(CorruptShardError, match=message) as caught:
        open_shard(path, kind, FINGERPRINT, "float16")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_read(tmp_path: Path, kind: str, dtype: str) -> None:
    rows = ROWS[kind](dtype)
    shard = open_shard(write(tmp_path / "s.h5", kind, dtype), kind, FINGERPRINT, dtype)
    assert len(shard) == len(KEYS)
    assert shard.keys() == KEYS
    assert shard.versions == VERSIONS
    assert shard.features.values.dtype == feature_dtype(dtype)
    assert shard.features.values.tobytes() == rows.features.values.tobytes()
    assert not shard.features.values.flags.writeable
    assert all(shard.row_is_intact(row) for row in range(len(KEYS)))
    if kind == "vit":
        assert [tuple(pair) for pair in shard.index["source_digests"].tolist()] == (
            rows.source_digests
        )
    else:
        assert np.array_equal(shard.index["token_ids"], rows.token_ids)
        assert np.array_equal(shard.index["offsets"], rows.offsets)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_hdf5_tool_reads_the_documented_layout(tmp_path: Path, kind: str, dtype: str) -> None:
    rows = ROWS[kind](dtype)
    with h5py.File(write(tmp_path / "s.h5", kind, dtype)) as file:
        assert set(file) == {*INDEX_DATASETS[kind], "features"}
        for dataset in file.values():
            plist = dataset.id.get_create_plist()
            assert plist.get_layout() == h5py.h5d.CONTIGUOUS
            assert plist.get_nfilters() == 0
        stored = file["features"][...]
        assert stored.dtype == ("uint16" if dtype == "bfloat16" else dtype)
        assert stored.tobytes() == rows.features.values.tobytes()
        text, ends = file["keys"][...].tobytes(), file["key_offsets"][...]
        assert [text[a:b].decode() for a, b in itertools.pairwise(ends)] == KEYS
        digest = xxhash.xxh3_128_intdigest(KEYS[1].encode())
        assert file["key_digests"][1].tolist() == [digest >> 64, digest % 2**64]
        if kind == "vit":
            sums = [xxhash.xxh3_64_intdigest(row.tobytes()) for row in rows.features.values]
        else:
            assert rows.offsets is not None
            assert rows.token_ids is not None
            sums = [
                xxhash.xxh3_64_intdigest(
                    rows.token_ids[a:b].tobytes() + rows.features.values[a:b].tobytes()
                )
                for a, b in itertools.pairwise(rows.offsets)
            ]
        assert file["checksums"][...].tolist() == sums
        assert dict(file.attrs)["dtype"] == dtype


def test_features_start_on_a_page(tmp_path: Path) -> None:
    for number, keys in enumerate((["a"] * 40, ["b" * 5000] * 41)):
        rows = ShardRows(
            keys, Numbers(np.ones((len(keys), 1, 16, 8), np.float32)), [(0, 0)] * len(keys)
        )
        with h5py.File(write(tmp_path / shard_name(number), "vit", "float32", rows)) as file:
            assert file["features"].id.get_offset() % PAGE_BYTES == 0


def test_equal_rows_give_equal_bytes(tmp_path: Path, kind: str) -> None:
    one, two = write(tmp_path / "1.h5", kind), write(tmp_path / "2.h5", kind)
    assert one.read_bytes() == two.read_bytes()
    line = write_shard(tmp_path / "3.h5", kind, FINGERPRINT, "float16", ROWS[kind](), VERSIONS)
    assert line == {"name": "3.h5", "rows": len(KEYS), **describe_file(one)}
    assert line["bytes"] == one.stat().st_size
    assert line["digest"] == xxhash.xxh3_128_hexdigest(one.read_bytes())


def test_a_shard_is_never_written_again(path: Path, kind: str) -> None:
    before = path.read_bytes()
    with pytest.raises(CorruptShardError, match="never written again"):
        write(path, kind)
    assert path.read_bytes() == before


def test_digests() -> None:
    digest = xxhash.xxh3_128_intdigest(b"dog")
    assert digest_bytes(b"dog") == (digest >> 64, digest % 2**64)
    assert digest_keys(["dog"]).tolist() == [list(digest_bytes(b"dog"))]
    assert digest_keys([]).shape == (0, 2)


def test_every_changed_index_byte_is_found(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    with h5py.File(path) as file:
        spans = {
            name: (file[name].id.get_offset(), file[name].id.get_storage_size())
            for name in INDEX_DATASETS[kind]
        }
    rng = np.random.default_rng(5)
    for start, size in spans.values():
        for _ in range(50):
            at, bit = start + int(rng.integers(size)), 1 << int(rng.integers(8))
            content[at] ^= bit
            path.write_bytes(content)
            refused(path, kind)
            content[at] ^= bit
    path.write_bytes(content)
    open_shard(path, kind, FINGERPRINT, "float16")


def test_a_changed_feature_byte_fails_its_row_alone(path: Path, kind: str) -> None:
    shard = open_shard(path, kind, FINGERPRINT, "float16")
    rows = [row for row in range(len(KEYS)) if kind == "vit" or KEYS[row] != KEYS[1]]
    for row in rows:
        first = row if kind == "vit" else int(shard.index["offsets"][row])
        with h5py.File(path) as file:
            at = file["features"].id.get_offset() + first * shard.features[0].nbytes + 3
        content = bytearray(path.read_bytes())
        content[at] ^= 4
        path.write_bytes(content)
        opened = open_shard(path, kind, FINGERPRINT, "float16")
        assert [opened.row_is_intact(r) for r in range(len(KEYS))] == [
            r != row for r in range(len(KEYS))
        ]
        content[at] ^= 4
        path.write_bytes(content)


def test_any_changed_byte_of_the_structure_is_refused_or_harmless(path: Path, kind: str) -> None:
    """A flip outside the data gives an error or the same shard, never another one."""
    content = bytearray(path.read_bytes())
    good = open_shard(path, kind, FINGERPRINT, "float16")
    wanted = good.features.values.tobytes()
    rng = np.random.default_rng(6)
    for _ in range(300):
        at, bit = int(rng.integers(len(content))), 1 << int(rng.integers(8))
        content[at] ^= bit
        path.write_bytes(content)
        try:
            shard = open_shard(path, kind, FINGERPRINT, "float16")
        except CorruptShardError:
            pass
        else:
            intact = all(shard.row_is_intact(row) for row in range(len(shard)))
            assert shard.keys() == KEYS
            assert not intact or shard.features.values.tobytes() == wanted
        content[at] ^= bit


def test_a_truncated_file_is_refused(path: Path, kind: str) -> None:
    content = path.read_bytes()
    rng = np.random.default_rng(7)
    for length in [0, 1, 8, len(content) - 1, *rng.integers(len(content), size=40).tolist()]:
        path.write_bytes(content[:length])
        refused(path, kind)


def test_not_a_file(tmp_path: Path, kind: str) -> None:
    refused(tmp_path / "none.h5", kind)
    (tmp_path / "folder.h5").mkdir()
    refused(tmp_path / "folder.h5", kind)
    (tmp_path / "noise.h5").write_bytes(np.random.default_rng(0).bytes(5000))
    refused(tmp_path / "noise.h5", kind)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": "0" * 32}, "fingerprint is"),
        ({"dtype": "float32"}, "/features is float16, expected float32"),
        ({"dtype": "bfloat16"}, "/features is float16, expected uint16"),
    ],
)
def test_a_shard_of_another_spec(path: Path, kind: str, changes: Any, message: str) -> None:
    asked = {"kind": kind, "fingerprint": FINGERPRINT, "dtype": "float16", **changes}
    with pytest.raises(CorruptShardError, match=message):
        open_shard(path, **asked)
    with pytest.raises(CorruptShardError):
        open_shard(path, "text" if kind == "vit" else "vit", FINGERPRINT, "float16")


def _replace(name: str, **options: Any) -> Callable[[h5py.File, Path], None]:
    def change(file: h5py.File, folder: Path) -> None:
        data = file[name][...]
        del file[name]
        arguments = {
            key: value(data) if callable(value) else value for key, value in options.items()
        }
        file.create_dataset(name, **({"data": data} | arguments))

    return change


def _external(file: h5py.File, folder: Path) -> None:
    size = file["features"].nbytes
    shape, dtype = file["features"].shape, file["features"].dtype
    (folder / "raw").write_bytes(b"\1" * size)
    del file["features"]
    file.create_dataset(
        "features", shape, dtype, external=[(str(folder / "raw"), 0, h5py.h5f.UNLIMITED)]
    )


def _external_link(file: h5py.File, folder: Path) -> None:
    file.copy("features", file, "other")
    del file["features"]
    shutil.copy(file.filename, folder / "elsewhere.h5")
    file["features"] = h5py.ExternalLink("elsewhere.h5", "/other")


def _soft_link(file: h5py.File, folder: Path) -> None:
    file.move("features", "other")
    file["features"] = h5py.SoftLink("/other")


def _virtual(file: h5py.File, folder: Path) -> None:
    file.move("features", "other")
    layout = h5py.VirtualLayout(file["other"].shape, file["other"].dtype)
    layout[...] = h5py.VirtualSource(file["other"])
    file.create_virtual_dataset("features", layout)


def _group(file: h5py.File, folder: Path) -> None:
    del file["features"]
    file.create_group("features")


def _huge(file: h5py.File, folder: Path) -> None:
    del file["features"]
    file.create_dataset("features", (1 << 40, 1, 1 << 10, 1 << 10), "float16")


def _named_type(file: h5py.File, folder: Path) -> None:
    del file["keys"]
    file["keys"] = np.dtype("uint8")


def _attribute(name: str, value: Any) -> Callable[[h5py.File, Path], None]:
    def change(file: h5py.File, folder: Path) -> None:
        del file.attrs[name]
        if value is not None:
            file.attrs[name] = value

    return change


HOSTILE: dict[str, Callable[[h5py.File, Path], None]] = {
    "features missing": lambda file, _: file.__delitem__("features"),
    "checksums missing": lambda file, _: file.__delitem__("checksums"),
    "chunked": _replace("features", chunks=True),
    "compressed": _replace("features", compression="gzip"),
    "chunked index": _replace("checksums", chunks=True),
    "other dtype": _replace("features", data=lambda data: data.astype("float64")),
    "big endian": _replace("checksums", data=lambda data: data.astype(">u8")),
    "fewer features": _replace("features", data=lambda data: data[:-1]),
    "other rank": _replace("features", data=lambda data: data[..., None]),
    "fewer checksums": _replace("checksums", data=lambda data: data[:-1]),
    "fewer key offsets": _replace("key_offsets", data=lambda data: data[:-1]),
    "falling key offsets": _replace("key_offsets", data=lambda data: data[::-1].copy()),
    "offsets that overflow": _replace(
        "key_offsets",
        data=lambda data: np.array([0, 2**63 - 1, -(2**63), 5, 6, data[-1]], np.int64),
    ),
    "scalar keys": _replace("keys", data=3),
    "null keys": _replace("keys", data=h5py.Empty("uint8")),
    "object dtype": _replace("keys", data=["a", "b"], dtype=h5py.string_dtype(), shape=(2,)),
    "references": _replace("keys", data=None, shape=(3,), dtype=h5py.ref_dtype),
    "external storage": _external,
    "external link": _external_link,
    "soft link": _soft_link,
    "virtual": _virtual,
    "group": _group,
    "huge claim": _huge,
    "named type": _named_type,
    "no fingerprint": _attribute("fingerprint", None),
    "array fingerprint": _attribute("fingerprint", np.arange(3)),
    "array checksum": _attribute("index_checksum", np.arange(3)),
    "empty checksum": _attribute("index_checksum", h5py.Empty("f")),
    "other checksum": _attribute("index_checksum", "0" * 32),
    "other versions": _attribute("versions", "{}"),
    "no versions": _attribute("versions", None),
    "other format": _attribute("format", 2),
    "other dtype attribute": _attribute("dtype", "float32"),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_files_are_refused(
    path: Path, kind: str, change: Callable[[h5py.File, Path], None]
) -> None:
    with h5py.File(path, "r+") as file:
        change(file, path.parent)
    refused(path, kind)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system cannot reserve space")
def test_the_disk_is_asked_for_room_before_hdf5_writes(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HDF5 does not survive a disk that fills up under it."""
    reserved: list[int] = []
    monkeypatch.setattr(os, "posix_fallocate", lambda file, start, size: reserved.append(size))
    keys = ["k" * 900 + str(i) for i in range(300)]
    shards = [write(tmp_path / shard_name(0), kind)]
    if kind == "vit":
        shards.append(write(tmp_path / shard_name(1), kind, rows=vision_rows(keys=keys)))
        shards.append(write(tmp_path / shard_name(2), kind, rows=vision_rows(keys=keys[:1])))
    assert all(path.stat().st_size <= size for path, size in zip(shards, reserved, strict=True))

    def full(file: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(h5py, "File", None)
    with pytest.raises(FeatstoreError, match=r"shard-00007\.h5: .*No space left.*nothing was"):
        write(tmp_path / shard_name(7), kind)
    assert sorted(os.listdir(tmp_path)) == [path.name for path in shards]


def test_a_shard_states_its_number(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / shard_name(3), kind)
    assert open_shard(path, kind, FINGERPRINT, "float16").number == 3
    path.rename(tmp_path / shard_name(100_003))
    refused(tmp_path / shard_name(100_003), kind, "number is 3, expected 100003")
    with h5py.File(tmp_path / shard_name(100_003), "r+") as file:
        file.attrs["number"] = 100_003
    refused(tmp_path / shard_name(100_003), kind, "index checksum differs")
    with h5py.File(tmp_path / shard_name(100_003), "r+") as file:
        del file.attrs["number"]
    refused(tmp_path / shard_name(100_003), kind, "index checksum differs")


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("shard-00000.h5", 0),
        ("shard-99999.h5", 99_999),
        ("shard-100000.h5", 100_000),
        ("shard-000001.h5", None),
        ("shard-1.h5", None),
        ("shard-9999999999.h5", None),
        ("shard-00000.h5~", None),
        ("shard-٠٠٠٠٠.h5", None),
    ],
)
def test_what_is_a_shards_name(name: str, number: int | None) -> None:
    assert shard_number(Path(name)) == number
    assert number is None or shard_name(number) == name
