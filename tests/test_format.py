"""`docs/FORMAT.md` is enough to write a reader: here is one, of h5py, NumPy, hashlib and xxhash.

Nothing of the product is used below "the reader", and nothing of the reader's
knowledge comes from elsewhere than that page.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import xxhash
from jobs import text_job
from PIL import Image
from test_golden import GOLDEN, golden_folder
from tiny_runs import SENTENCES, extracted, tiny_config

from featstore.care.info import open_folder
from featstore.extract.extract import extract
from featstore.store.folder import read_quarantine
from featstore.store.store import VisionStore

# --- the reader -------------------------------------------------------------------------

INDEX = {
    "vit": {
        "keys": ("|u1", 1),
        "key_offsets": ("<i8", 1),
        "key_digests": ("<u8", 2),
        "source_digests": ("<u8", 2),
        "checksums": ("<u8", 1),
    },
    "text": {
        "keys": ("|u1", 1),
        "key_offsets": ("<i8", 1),
        "key_digests": ("<u8", 2),
        "offsets": ("<i8", 1),
        "token_ids": ("<i4", 1),
        "checksums": ("<u8", 1),
    },
}
STORED = {"float16": "<f2", "float32": "<f4", "bfloat16": "<u2"}


class RefusedError(Exception):
    pass


def need(condition: Any, what: str) -> None:
    if not condition:
        raise RefusedError(what)


def load(path: Path) -> Any:
    need(stat.S_ISREG(path.stat().st_mode), f"{path} is not a regular file")
    return json.loads(path.read_bytes().decode())


def canonical(value: Any) -> bytes:
    """Write canonical JSON by the page's rules, not by a library's options."""
    if isinstance(value, dict):
        parts = [canonical(key) + b":" + canonical(value[key]) for key in sorted(value)]
        return b"{" + b",".join(parts) + b"}"
    if isinstance(value, list):
        return b"[" + b",".join(map(canonical, value)) + b"]"
    if isinstance(value, str):
        short = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
        short |= {"\b": "\\b", "\f": "\\f"}
        text = "".join(short.get(c, f"\\u{ord(c):04x}" if c < " " else c) for c in value)
        return f'"{text}"'.encode()
    if value is None or isinstance(value, bool):
        return {None: b"null", True: b"true", False: b"false"}[value]
    return repr(value).encode()


def read_shard(path: Path, kind: str, fingerprint: str, dtype: str) -> list[dict[str, Any]]:
    """Return the rows of a shard, every checksum compared."""
    need(stat.S_ISREG(path.stat().st_mode), f"{path} is not a regular file")
    number = int(path.name[6:-3])
    with h5py.File(path, "r") as file:
        said = {key: file.attrs[key] for key in file.attrs}
        data = {}
        for name in [*INDEX[kind], "features"]:
            need(isinstance(file.get(name, getlink=True), h5py.HardLink), f"{name} is a link")
            dataset = file[name]
            plist = dataset.id.get_create_plist()
            plain = plist.get_layout() == h5py.h5d.CONTIGUOUS and not plist.get_external_count()
            need(plain, f"{name} is not contiguous")
            end = (dataset.id.get_offset() or 0) + dataset.nbytes
            need(end <= path.stat().st_size, f"{name} reaches beyond the file")
            data[name] = dataset[...]
    features = data.pop("features")
    rows = len(data["checksums"])
    for name, (type_, axes) in INDEX[kind].items():
        need((data[name].dtype.str, data[name].ndim) == (type_, axes), f"{name} is another type")
    need(features.dtype.str == STORED[dtype], "features are of another type")
    header: dict[str, Any] = {"dtype": dtype, "fingerprint": fingerprint, "format": 1, "kind": kind}
    if "number" in said:
        header["number"] = number
    for name, value in header.items():
        need(said[name] == value, f"{name} is {said[name]}")
    header |= {"shape": list(features.shape), "versions": said["versions"]}
    state = xxhash.xxh3_128(json.dumps(header).encode())
    for name in sorted(data):
        array = data[name]
        dimensions = ", ".join(map(str, array.shape)) + ("," if array.ndim == 1 else "")
        state.update(f"{name}:{INDEX[kind][name][0]}:({dimensions})".encode())
        state.update(array.tobytes())
    need(state.hexdigest() == said["index_checksum"], "the index checksum differs")
    ends = {"key_offsets": len(data["keys"])}
    if kind == "text":
        ends["offsets"] = len(data["token_ids"])
    for name, end in ends.items():
        values = data[name]
        need(len(values) == rows + 1 and values[0] == 0 and values[-1] == end, f"{name} is broken")
        need((np.diff(values) >= 0).all(), f"{name} falls")
    need(len(features) == (rows if kind == "vit" else ends["offsets"]), "features do not fit")
    found = []
    for row in range(rows):
        a, b = data["key_offsets"][row : row + 2]
        key = data["keys"][a:b].tobytes()
        digest = xxhash.xxh3_128_intdigest(key)
        need(data["key_digests"][row].tolist() == [digest >> 64, digest % 2**64], "key digest")
        entry: dict[str, Any] = {"key": key.decode()}
        hashed = b""
        if kind == "vit":
            values = features[row]
            entry["source"] = data["source_digests"][row].tolist()
        else:
            a, b = data["offsets"][row : row + 2]
            values, entry["ids"] = features[a:b], data["token_ids"][a:b]
            hashed = entry["ids"].tobytes()
        hashed += values.tobytes()
        need(xxhash.xxh3_64_intdigest(hashed) == data["checksums"][row], f"row {row} is damaged")
        if dtype == "bfloat16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        found.append({**entry, "values": values})
    return found


def read_lists(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the manifest's lines and the quarantine list."""
    manifest = load(folder / "manifest.json")
    need((manifest["format"], manifest["fingerprint"]) == (1, folder.name), "another manifest")
    if "checksum" in manifest:
        rest = {key: value for key, value in manifest.items() if key != "checksum"}
        digest = xxhash.xxh3_128_hexdigest(canonical(rest))
        need(digest == manifest["checksum"], "the manifest was changed")
    names = [line["name"] for line in manifest["shards"]]
    need(len(set(names)) == len(names), "a shard is listed twice")
    need((folder / "quarantine.json").exists() or not manifest["quarantine"], "no quarantine list")
    quarantine = {}
    if (folder / "quarantine.json").exists():
        quarantine = load(folder / "quarantine.json")
    for key, entry in quarantine.items():
        text = json.dumps([key, entry["reason"], entry["source_digest"]])
        digest = xxhash.xxh3_64_hexdigest(text.encode())
        need(entry.get("checksum", digest) == digest, f"the entry of {key} was changed")
    return manifest["shards"], quarantine


def read_folder(folder: Path) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Return key to row of a folder's live rows, and every row in the order of the shards."""
    spec = load(folder / "spec.json")["spec"]
    fingerprint = hashlib.blake2b(canonical(spec), digest_size=16).hexdigest()
    need(fingerprint == folder.name, "the spec is another folder's")
    need((spec["format"], spec["kind"]) == (1, folder.parent.name), "another format or kind")
    lines, quarantine = read_lists(folder)
    name = re.compile(r"shard-([0-9]{5}|[1-9][0-9]{5,8})\.h5")
    shards = [entry for entry in os.listdir(folder) if name.fullmatch(entry)]
    for line in lines:
        need(line["name"] in shards, f"{line['name']} is missing")
        content = (folder / line["name"]).read_bytes()
        need(len(content) == line["bytes"], f"{line['name']} has another size")
        need(xxhash.xxh3_128_hexdigest(content) == line["digest"], f"{line['name']} was changed")
    every = []
    for entry in sorted(shards, key=lambda shard: int(shard[6:-3])):
        every += read_shard(folder / entry, spec["kind"], folder.name, spec["dtype"])
    live = {row["key"]: row for row in every}
    for key, entry in quarantine.items():
        if entry["source_digest"] is not None:
            live.pop(key, None)
    return live, every


# --- what it reads ----------------------------------------------------------------------


@pytest.fixture(scope="module", params=["float32", "float16", "bfloat16"])
def written(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_vit: Path,
    tiny_text: Path,
) -> dict[str, Path]:
    """Folders that the product wrote: rows superseded, a photo that changed and then failed."""
    folder = tmp_path_factory.mktemp("written")
    config = tiny_config(folder, tiny_vit, tiny_text)
    store = dataclasses.replace(config.store, dtype=request.param)
    config = dataclasses.replace(config, store=store)
    extracted(config)
    images = folder / "images"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
    Image.fromarray(pixels).save(images / "photo004.png")
    (images / "photo009.png").write_bytes(b"no photo")
    extracted(config)
    halves = (SENTENCES[:3], SENTENCES)
    plans = [extract(text_job(config.encoders, store, part, 2))[0] for part in halves]
    (vit,) = (folder / "cache" / "vit").iterdir()
    return {"vit": vit, "text": plans[0].folder}


def check_same(folder: Path) -> None:
    """Compare the page's reader with the product's, value by value."""
    live, every = read_folder(folder)
    store = open_folder(folder)
    assert [row["key"] for row in every] == store.keys_of(np.arange(store.rows))
    assert sorted(live) == sorted(store.keys())
    for key, row in live.items():
        position = store.lookup([key])
        if isinstance(store, VisionStore):
            found = store.gather(position)[0]
            assert store.source_digests(position).tolist() == [row["source"]]
            values = row["values"][0]
        else:
            hidden, mask = store.gather(position, 24)
            found, values = hidden[0][mask[0]], row["values"]
            assert len(row["ids"]) == len(found)
        assert np.array_equal(found.astype(np.float32), values.astype(np.float32))


@pytest.mark.parametrize("kind", ["vit", "text"])
def test_a_reader_made_from_the_page_reads_what_the_product_wrote(
    written: dict[str, Path], kind: str
) -> None:
    folder = written[kind]
    check_same(folder)
    live, every = read_folder(folder)
    if kind == "vit":
        assert len(every) == len(live) + 2  # one superseded, one stale
        assert "photo009" in read_quarantine(folder)
        assert "photo009" not in live
    else:
        assert sorted(live) == sorted(SENTENCES)


@pytest.mark.parametrize("kind", ["vit", "text"])
def test_a_reader_made_from_the_page_reads_the_golden_store(kind: str) -> None:
    check_same(golden_folder(kind))
    expected = json.loads((GOLDEN / "expected.json").read_text())[kind]
    _, every = read_folder(golden_folder(kind))
    with np.load(GOLDEN / "expected.npz", allow_pickle=False) as file:
        for position, row in enumerate(every):
            values = file[f"{kind}/{position}"]
            assert row["values"].reshape(values.shape).astype("f4").tobytes() == values.tobytes()
            if kind == "text":
                assert row["ids"].tolist() == expected["token_ids"][position]


def test_canonical_json_of_the_page() -> None:
    from featstore.encoders.spec import canonical_json

    value = {"é": [1, 1.0, -0.5, 1e-05, 1e16, 123456789.25], "a": {"z": None, "b": [True, False]}}
    value['\x01"\\\n\r\t\b\f\x7f图😀'] = "\x00\x1f\u2028"
    assert canonical(value) == canonical_json(value).encode()


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "spec": lambda folder: flipped(folder / "spec.json"),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "manifest": lambda folder: flipped(folder / "manifest.json"),
    "quarantine": lambda folder: flipped(folder / "quarantine.json"),
    "no quarantine": lambda folder: (folder / "quarantine.json").unlink(),
    "shard": lambda folder: flipped(folder / "shard-00001.h5"),
    "no shard": lambda folder: (folder / "shard-00001.h5").unlink(),
    "a copy": lambda folder: shutil.copy(folder / "shard-00001.h5", folder / "shard-00007.h5"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_the_reader_of_the_page_refuses_damage(
    tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    golden = golden_folder("vit")
    folder = Path(shutil.copytree(golden, tmp_path / "vit" / golden.name))
    read_folder(folder)
    damage(folder)
    with pytest.raises((RefusedError, OSError, KeyError, ValueError)):
        read_folder(folder)
