"""The store in `golden/` opens, is sound, and gives these exact values, for ever.

It was made by

    PYTHONPATH=.:tests python -c "import test_golden; test_golden.make_golden()"

and is never made again: a change that this test cannot read needs a new format.
`text/` and the first shard of `vit/` are of the first version, whose shards do
not state their number and whose lists have no checksums. The expected values
(`expected.json`, `expected.npz`) come from `numbers` below and from xxhash, not
from a reader.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import pytest
import xxhash

from featstore.care.info import open_folder
from featstore.care.verify import verify_folder
from featstore.encoders.spec import FeatureSpec, TextSpec, VisionSpec
from featstore.store.folder import read_quarantine, write_manifest, write_quarantine
from featstore.store.numbers import Numbers
from featstore.store.shard import shard_name
from featstore.store.write import ShardRows, write_shard

GOLDEN = Path(__file__).resolve().parent / "golden"
TOKENS, WIDTH = 3, 5
VERSIONS = {"featstore": "0.1.0", "python": "3.11"}

VISION = VisionSpec(
    encoder="ViTBackbone",
    weights="xxh3-128:00112233445566778899aabbccddeeff",
    architecture={"num_layers": 2, "image_shape": [32, 32, 3], "dropout_rate": 0.1},
    boundary=2,
    dtype="float16",
    precision="float32",
    final_norm=True,
    converter={"scale": 1 / 255, "offset": [-1.0, 0.0, 1e-05], "interpolation": "bicubic"},
    decoder='golden "rules"/é\\v1',
    tokens="patches",
)
TEXT = TextSpec(
    encoder="DistilBertBackbone",
    weights="xxh3-128:ffeeddccbbaa99887766554433221100",
    architecture={"num_layers": 6, "hidden_dim": WIDTH},
    boundary=3,
    dtype="bfloat16",
    precision="float32",
    tokenizer="golden",
    sequence_length=24,
)
# Key and generation of each shard's rows; "dog" and "the cat" stand twice.
VISION_SHARDS = (
    (("cat", 0), ("sub/é 图", 0), ("dog", 0), ("stale", 0)),
    (("dog", 1), ("lost", 0), ("owl.png", 0)),
)
TEXT_SHARDS = (
    (("", 0), ("the cat", 0), ("a dog runs .", 0)),
    (("the cat", 1), ("ein Mädchen läuft", 0)),
)
QUARANTINE = {
    "vit": {
        "broken": {"reason": "broken.jpg: damaged or cut short", "source_digest": [17, 2**64 - 1]},
        "away": {"reason": "away.jpg: cannot be read", "source_digest": None},
        "stale": {"reason": "stale.jpg: the file is empty", "source_digest": [1, 2]},
        "lost": {"reason": "its newest features were damaged", "source_digest": [0, 0]},
    },
    "text": {"too large": {"reason": "features do not fit bfloat16", "source_digest": None}},
}
SPECS: dict[str, FeatureSpec] = {"vit": VISION, "text": TEXT}


def numbers(key: str, generation: int, rows: int) -> np.ndarray:
    """Return float32 values that float16 and bfloat16 hold exactly; the first six are special."""
    start = sum(key.encode()) + 31 * generation
    values = ((start + 7 * np.arange(rows * WIDTH)) % 255 - 127) / 16
    values[:6] = [-0.0, 2.0**-14, -(2.0**-24), 57344.0, -1.0, 0.0]
    return values.astype(np.float32).reshape(rows, WIDTH)


def source_bytes(key: str, generation: int) -> bytes:
    return f"{key}#{generation}".encode()


def length(key: str) -> int:
    return 2 + len(key.split())


def token_ids(key: str) -> list[int]:
    return [101, *(len(word) for word in key.split()), 102]


def halves(digest: int) -> tuple[int, int]:
    return digest >> 64, digest % 2**64


def vision_rows(rows: tuple[tuple[str, int], ...]) -> ShardRows:
    features = np.stack([numbers(*row, TOKENS) for row in rows])[:, None]
    digests = [halves(xxhash.xxh3_128_intdigest(source_bytes(*row))) for row in rows]
    return ShardRows([key for key, _ in rows], Numbers(features.astype(np.float16)), digests)


def text_rows(rows: tuple[tuple[str, int], ...]) -> ShardRows:
    features = np.concatenate([numbers(*row, length(row[0])) for row in rows])
    ids = [token for key, _ in rows for token in token_ids(key)]
    ends = np.cumsum([0, *(length(key) for key, _ in rows)])
    return ShardRows(
        [key for key, _ in rows],
        Numbers(features.astype(ml_dtypes.bfloat16)),
        offsets=ends.astype(np.int64),
        token_ids=np.array(ids, np.int32),
    )


def write_first_version(path: Path, spec: FeatureSpec, rows: ShardRows) -> dict[str, Any]:
    """Write a shard that does not state its number."""
    line = write_shard(
        path.with_name("one"), spec.kind, spec.fingerprint, spec.dtype, rows, VERSIONS
    )
    path.with_name("one").rename(path)
    return {**line, "name": path.name}


def write_folders(root: Path) -> None:
    for spec, shards, rows_of in (
        (VISION, VISION_SHARDS, vision_rows),
        (TEXT, TEXT_SHARDS, text_rows),
    ):
        folder = spec.folder(root)
        folder.mkdir(parents=True)
        content = {"spec": spec.to_dict(), "names": {"preset": "golden"}, "command": "golden"}
        (folder / "spec.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        one, two = (folder / shard_name(number) for number in (0, 1))
        lines = [write_first_version(one, spec, rows_of(shards[0]))]
        if spec is TEXT:
            lines.append(write_first_version(two, spec, rows_of(shards[1])))
            manifest = {"format": 1, "fingerprint": spec.fingerprint, "quarantine": True}
            text = json.dumps({**manifest, "shards": lines}, indent=1)
            (folder / "manifest.json").write_text(text)
            (folder / "quarantine.json").write_text(json.dumps(QUARANTINE["text"], indent=1))
        else:
            rows = rows_of(shards[1])
            lines.append(write_shard(two, "vit", spec.fingerprint, spec.dtype, rows, VERSIONS))
            write_quarantine(folder, QUARANTINE["vit"])
            write_manifest(folder, spec.fingerprint, lines)


def write_expected(folder: Path) -> None:
    arrays, expected = {}, {}
    for kind, shards in (("vit", VISION_SHARDS), ("text", TEXT_SHARDS)):
        order = [row for rows in shards for row in rows]
        newest = {key: position for position, (key, _) in enumerate(order)}
        hidden = {key for key, entry in QUARANTINE[kind].items() if entry["source_digest"]}
        expected[kind] = {
            "fingerprint": SPECS[kind].fingerprint,
            "keys": [key for key, _ in order],
            "lookup": {key: -1 if key in hidden else at for key, at in newest.items()},
            "quarantine": QUARANTINE[kind],
            "source_digests": [
                list(halves(xxhash.xxh3_128_intdigest(source_bytes(*row)))) for row in order
            ],
            "token_ids": [token_ids(key) for key, _ in order],
        }
        for position, (key, generation) in enumerate(order):
            count = TOKENS if kind == "vit" else length(key)
            arrays[f"{kind}/{position}"] = numbers(key, generation, count)
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    np.savez_compressed(folder / "expected.npz", **arrays)


def make_golden(folder: Path = GOLDEN) -> None:
    folder.mkdir()
    write_folders(folder / "store")
    write_expected(folder)


@pytest.fixture(scope="module")
def expected() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    with np.load(GOLDEN / "expected.npz", allow_pickle=False) as file:
        return json.loads((GOLDEN / "expected.json").read_text()), dict(file)


def golden_folder(kind: str) -> Path:
    (folder,) = (GOLDEN / "store" / kind).iterdir()
    return folder


@pytest.mark.parametrize("kind", ["vit", "text"])
def test_the_golden_store_is_sound(kind: str) -> None:
    report = verify_folder(golden_folder(kind))
    assert report.problems == []
    assert (report.shards, report.checked_rows) == (2, report.rows)


@pytest.mark.parametrize("kind", ["vit", "text"])
def test_the_golden_store_gives_its_values(
    expected: tuple[dict[str, Any], dict[str, np.ndarray]], kind: str
) -> None:
    wanted, arrays = expected[0][kind], expected[1]
    folder = golden_folder(kind)
    assert folder.name == wanted["fingerprint"] == SPECS[kind].fingerprint
    store = open_folder(folder)
    assert store.keys_of(np.arange(store.rows)) == wanted["keys"]
    lookup = wanted["lookup"]
    assert store.lookup(list(lookup)).tolist() == list(lookup.values())
    assert store.lookup(["nobody", "broken"]).tolist() == [-1, -1]
    assert store.live().tolist() == sorted(at for at in lookup.values() if at >= 0)
    assert store.keys() == sorted((k for k in lookup if lookup[k] >= 0), key=lookup.__getitem__)
    assert len(store) == len(store.live())
    assert read_quarantine(folder, with_lost=True) == wanted["quarantine"]
    for position in range(store.rows):
        found = store.gather(np.array([position]), *(() if kind == "vit" else (24,)))
        row = found[0] if kind == "vit" else found[0][found[1]]
        values = arrays[f"{kind}/{position}"]
        assert row.reshape(values.shape).astype(np.float32).tobytes() == values.tobytes()
        if kind == "vit":
            digests = store.source_digests(np.array([position]))
            assert digests.tolist() == [wanted["source_digests"][position]]
        else:
            shard, at = (int(part[0]) for part in store.locate(np.array([position])))
            ids, ends = (store.shards[shard].index[name] for name in ("token_ids", "offsets"))
            assert ids[ends[at] : ends[at + 1]].tolist() == wanted["token_ids"][position]
    for key, at in lookup.items():
        if at >= 0:
            found = store[key].astype(np.float32)
            assert found.tobytes() == arrays[f"{kind}/{at}"].tobytes()
            if kind == "text":
                assert store.token_ids(key).tolist() == wanted["token_ids"][at]


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) < 350_000


def test_what_is_written_today_has_the_golden_content(tmp_path: Path) -> None:
    make_golden(tmp_path / "again")
    for kind in SPECS:
        folder = golden_folder(kind)
        again = tmp_path / "again" / "store" / kind / folder.name
        for number in (0, 1):
            with (
                h5py.File(folder / shard_name(number)) as old,
                h5py.File(again / shard_name(number)) as new,
            ):
                assert set(old) == set(new)
                assert dict(old.attrs) == dict(new.attrs)
                for name in old:
                    assert old[name].dtype == new[name].dtype
                    assert np.array_equal(old[name][...], new[name][...])


def test_a_copy_of_a_first_version_shard_is_named_by_verify(tmp_path: Path) -> None:
    """Without a number only the manifest can tell: readers take the copy for a newer shard."""
    folder = Path(shutil.copytree(golden_folder("vit"), tmp_path / "vit" / VISION.fingerprint))
    shutil.copy(folder / shard_name(0), folder / shard_name(7))
    (problem,) = verify_folder(folder).problems
    assert problem.what == "unlisted shard"
    assert "a copy of shard-00000.h5" in problem.detail
