"""Files made to mislead: refused with one line by the readers, and named by a full check.

Most of them carry checksums that fit: whoever can write to a store's folder can
make those. What is then left to promise is that nothing hangs, that no file
outside is read or deleted, and that no error is a traceback.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from test_fit import Workspace
from test_golden import SPECS, golden_folder
from tiny_runs import prepared, tiny_config

import trainer
from featstore.care.info import describe_folder, open_folder
from featstore.care.repair import repair_folder
from featstore.care.verify import sample_folder, verify_folder
from featstore.encoders.spec import canonical_json
from featstore.errors import ConfigError, FeatstoreError, RunError, StoreError
from featstore.project import Project
from featstore.publish import checksum
from featstore.store.folder import (
    quarantine_checksum,
    read_manifest,
    read_quarantine,
    salvage_quarantine,
    write_manifest,
)
from featstore.store.shard import INDEX_DATASETS, index_checksum, shard_name
from trainer.config import load_config
from trainer.results.score import Scorer
from trainer.run.checkpoint import load_best, load_state
from trainer.run.folder import Run, find_run

SHARD = shard_name(1)


@pytest.fixture(params=["vit", "text"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(tmp_path: Path, kind: str) -> Path:
    """A copy of a golden folder, with a file beside the store that nobody may touch."""
    golden = golden_folder(kind)
    (tmp_path / "precious").write_text("precious")
    return Path(shutil.copytree(golden, tmp_path / "store" / kind / golden.name))


def without_encoders(folder: Path) -> Project:
    """Return the store of a folder, asked for with presets that are nowhere."""
    return Project(vit="no", text="no", root=str(folder.parent.parent))


def read_everything(folder: Path) -> int:
    """Read every live row as a training does; return their number."""
    store = open_folder(folder)
    live = store.lookup(store.keys())
    store.gather(live) if folder.parent.name == "vit" else store.gather(live, 24)
    return len(live)


def check_refused(folder: Path, name: str, *, by_readers: bool = True) -> None:
    """Check that readers refuse the folder in one line, and a full check names the file."""
    if by_readers:
        with pytest.raises(StoreError) as caught:
            read_everything(folder)
        assert "\n" not in str(caught.value)
        assert str(folder) in str(caught.value)
    assert name in {problem.path.name for problem in verify_folder(folder).problems}
    sample_folder(folder, 3)
    json.dumps(describe_folder(folder, []))


def seal(path: Path) -> None:
    """Give a changed shard an index checksum and a line of the manifest that fit."""
    folder = path.parent
    with h5py.File(path, "r+") as file:
        index = {name: file[name][...] for name in INDEX_DATASETS[folder.parent.name]}
        header = {
            name: value.item() if isinstance(value, np.generic) else value
            for name, value in file.attrs.items()
            if name != "index_checksum"
        }
        header["shape"] = list(file["features"].shape)
        file.attrs["index_checksum"] = index_checksum(index, header)
    lines = {line["name"]: line for line in read_manifest(folder)}
    lines[path.name] |= {"bytes": path.stat().st_size, "digest": "0" * 32}
    write_manifest(folder, folder.name, list(lines.values()))


def put(name: str, change: Callable[[np.ndarray], Any]) -> Callable[[h5py.File], None]:
    def apply(file: h5py.File) -> None:
        data = change(file[name][...])
        del file[name]
        file.create_dataset(name, data=data)

    return apply


def at(index: Any, value: Any) -> Callable[[np.ndarray], np.ndarray]:
    def change(data: np.ndarray) -> np.ndarray:
        data[index] = value
        return data

    return change


SEALED: dict[str, tuple[str, Callable[[h5py.File], None]]] = {
    "no views": ("vit", put("features", lambda data: data[:, :0])),
    "no tokens": ("vit", put("features", lambda data: data[:, :, :0])),
    "no width": ("text", put("features", lambda data: data[:, :0])),
    "other tokens": ("vit", put("features", lambda data: data[:, :, :2])),
    "other width": ("text", put("features", lambda data: data[:, :2])),
    "keys that are not UTF-8": ("vit", put("keys", at(0, 0xFF))),
    "a negative offset": ("text", put("offsets", at(1, -4))),
    "overlapping offsets": ("text", put("offsets", at(1, 2**62))),
    "a negative key offset": ("vit", put("key_offsets", at(1, -(2**63)))),
    "a compound index": (
        "vit",
        put("checksums", lambda data: data.astype([("a", "<u4"), ("b", "<u4")])),
    ),
    "signed checksums": ("vit", put("checksums", lambda data: data.astype("<i8"))),
    "big-endian offsets": ("text", put("offsets", lambda data: data.astype(">i8"))),
    "big-endian features": ("vit", put("features", lambda data: data.astype(">f2"))),
}


@pytest.mark.parametrize(("kind", "change"), SEALED.values(), ids=SEALED.keys())
def test_contents_that_are_no_shard_are_refused_though_their_checksums_fit(
    folder: Path, change: Callable[[h5py.File], None]
) -> None:
    with h5py.File(folder / SHARD, "r+") as file:
        change(file)
    seal(folder / SHARD)
    check_refused(folder, SHARD)


@pytest.mark.parametrize("kind", ["vit"])
def test_keys_that_do_not_have_their_digests_are_named(folder: Path) -> None:
    with h5py.File(folder / SHARD, "r+") as file:
        put("key_digests", lambda data: data[::-1].copy())(file)
    seal(folder / SHARD)
    check_refused(folder, SHARD, by_readers=False)


ATTRIBUTES: dict[str, Any] = {
    "a list": [1, 2],
    "a float": 1.0,
    "bytes": np.bytes_(b"vit"),
    "empty": h5py.Empty("S10"),
    "an object": np.array(["vit"], dtype=h5py.string_dtype()),
    "a compound": np.array((1, 2.0), dtype=[("a", "<i4"), ("b", "<f8")]),
    "a huge integer": np.uint64(2**64 - 1),
    "a negative one": -1,
    "no Unicode": np.array(b"\xff\xfe", dtype=h5py.string_dtype("utf-8")),
    "long": "x" * 60_000,
    "JSON that is too deep": "[" * 60_000,
}


@pytest.mark.parametrize("value", ATTRIBUTES.values(), ids=ATTRIBUTES.keys())
@pytest.mark.parametrize("name", ["format", "kind", "fingerprint", "dtype", "number", "versions"])
def test_attributes_of_another_type_are_refused(folder: Path, name: str, value: Any) -> None:
    with h5py.File(folder / SHARD, "r+") as file:
        file.attrs[name] = value
    check_refused(folder, SHARD)


@pytest.mark.parametrize("kind", ["vit"])
def test_references_and_strings_in_place_of_a_dataset_are_refused(folder: Path) -> None:
    for dtype, value in ((h5py.ref_dtype, "/keys"), (h5py.string_dtype(), "text")):
        with h5py.File(folder / SHARD, "r+") as file:
            del file["checksums"]
            dataset = file.create_dataset("checksums", (3,), dtype)
            dataset[0] = file["keys"].ref if dtype is h5py.ref_dtype else value
        check_refused(folder, SHARD)


def test_a_file_that_lies_about_its_own_end_is_refused(folder: Path) -> None:
    content = bytearray((folder / SHARD).read_bytes())
    end = content.index(len(content).to_bytes(8, "little"))
    for claimed in (2**63, 2**64 - 1, 2**40, 100):
        content[end : end + 8] = claimed.to_bytes(8, "little")
        (folder / SHARD).write_bytes(content)
        check_refused(folder, SHARD)


def test_a_sparse_file_of_a_terabyte_is_refused_without_reading_it(folder: Path) -> None:
    os.truncate(folder / SHARD, 1 << 40)
    with pytest.raises(StoreError, match=f"{1 << 40} bytes, expected"):
        open_folder(folder)
    os.truncate(folder / SHARD, 100)


# --- what is not a file -----------------------------------------------------------------

PLACES: dict[str, Callable[[Path], Any]] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to a folder": lambda path: path.symlink_to(path.parent),
    "a link to an endless device": lambda path: path.symlink_to("/dev/zero"),
    "an empty file": Path.touch,
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
@pytest.mark.parametrize("name", [SHARD, "spec.json", "manifest.json", "quarantine.json"])
def test_what_stands_in_a_files_place_is_refused_and_not_waited_for(
    folder: Path, name: str, place: Callable[[Path], Any]
) -> None:
    (folder / name).unlink()
    place(folder / name)
    check_refused(folder, name)


def test_a_link_to_the_very_file_is_read(folder: Path, tmp_path: Path) -> None:
    """A store that was fetched by a tool that keeps contents elsewhere is all links."""
    expected = read_everything(folder)
    for path in list(folder.iterdir()):
        moved = tmp_path / f"kept-{path.name}"
        path.rename(moved)
        path.symlink_to(moved)
    assert read_everything(folder) == expected
    assert verify_folder(folder).problems == []


@pytest.mark.parametrize("kind", ["vit"])
def test_numbers_without_bound_in_names_cost_nothing(folder: Path) -> None:
    for name in ("shard-999999999.h5", f"shard-{'9' * 200}.h5", "shard-000001.h5", "shard-1.h5"):
        shutil.copy(folder / SHARD, folder / name)
    (folder / "manifest.json").unlink()
    check_refused(folder, "shard-999999999.h5")
    named = {problem.path.name for problem in verify_folder(folder).problems}
    assert not named & {f"shard-{'9' * 200}.h5", "shard-000001.h5", "shard-1.h5"}


# --- the lists --------------------------------------------------------------------------

DEEP = "[" * 100_000
HUGE = "9" * 5000
BODIES = [
    "", "null", "3", "[]", "{}", '"x"', "NaN", DEEP, '{"a":' * 50_000, HUGE, "\ufeff{}", "{} {}",
    f'{{"spec": {DEEP}', '{"shards": {}}', '{"shards": [3]}', '{"shards": [[["a", 1]]]}',
    '{"shards": [{"name": 3, "bytes": 1}]}', '{"spec": [1]}', '{"spec": {"format": 1}}',
    '{"shards": [{"name": "shard-00000.h5", "bytes": NaN}]}',
    '{"shards": [{"name": "shard-00000.h5", "bytes": true}]}',
    f'{{"shards": [{{"name": "shard-00000.h5", "bytes": {HUGE}}}]}}',
    f'{{"shards": [{{"name": "shard-00000.h5", "bytes": 1{"0" * 300}}}]}}',
    '{"a": 1}', '{"a": {"reason": 1, "source_digest": null}}',
    '{"a": {"reason": "", "source_digest": "no"}}', '{"a": {"reason": "", "source_digest": [1]}}',
    '{"a": {"reason": "", "source_digest": [1.5, 2]}}',
    '{"a": {"reason": "", "source_digest": [true, 2]}}',
    '{"a": {"reason": "", "source_digest": [-1, 2]}}',
    f'{{"a": {{"reason": "", "source_digest": [1{"0" * 40}, 2]}}}}',
    '{"a": {"reason": "", "source_digest": {"0": 1}}}',
    '{"\\ud800": {"reason": "", "source_digest": [1, 2]}}',
    '{"a": {"reason": "\\udfff", "source_digest": [1, NaN]}}',
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
@pytest.mark.parametrize("name", ["spec.json", "manifest.json", "quarantine.json"])
def test_lists_of_any_content_are_read_or_refused(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(body, encoding="utf-8")
    if (name, body) == ("quarantine.json", "{}"):
        read_everything(folder)
        assert read_quarantine(folder) == {}
        return
    check_refused(folder, name)
    with pytest.raises(StoreError) as caught:
        read_everything(folder)
    assert len(str(caught.value)) < 1000
    salvage_quarantine(folder)
    json.dumps([verify_folder(folder).to_dict(), describe_folder(folder, [])])


def hostile_spec(**fields: Any) -> dict[str, Any]:
    return {**SPECS["vit"].to_dict(), **fields}


@pytest.mark.parametrize(
    "spec",
    [
        hostile_spec(dtype="O"),
        hostile_spec(dtype="no such"),
        hostile_spec(dtype=3),
        hostile_spec(dtype="float16,float16"),
        hostile_spec(kind="text"),
        hostile_spec(kind="../.."),
        hostile_spec(kind=None),
        hostile_spec(boundary="two"),
        hostile_spec(architecture=[]),
        hostile_spec(format=2),
        hostile_spec(format=True),
        {"format": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["vit"])
def test_a_spec_that_has_its_own_fingerprint_and_no_sense_is_refused(
    folder: Path, spec: dict[str, Any]
) -> None:
    import hashlib

    text = canonical_json(spec).encode()
    renamed = folder.rename(folder.with_name(hashlib.blake2b(text, digest_size=16).hexdigest()))
    (renamed / "spec.json").write_text(json.dumps({"spec": spec}))
    manifest = json.loads((renamed / "manifest.json").read_text())
    manifest["fingerprint"] = renamed.name
    manifest["checksum"] = checksum(manifest)
    (renamed / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError) as caught:
        read_everything(renamed)
    assert "\n" not in str(caught.value)
    report = verify_folder(renamed)
    assert report.problems
    json.dumps([report.to_dict(), describe_folder(renamed, [])])


OUTSIDE = ["../../../precious", "/precious", "shard-00000.h5/../../../../precious", "", ".", ".."]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_that_names_a_file_elsewhere_deletes_nothing(
    folder: Path, tmp_path: Path, name: str
) -> None:
    precious = tmp_path / "precious"
    if name.startswith("/"):
        name = str(precious)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"].append({"name": name, "rows": 1, "bytes": 8, "digest": "0" * 32})
    manifest["checksum"] = checksum(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    check_refused(folder, "manifest.json")
    assert repair_folder(folder, without_encoders(folder)).left == []
    assert precious.read_text() == "precious"
    assert verify_folder(folder).problems == []


@pytest.mark.parametrize("kind", ["vit"])
def test_a_folder_in_a_shards_place_is_not_deleted(folder: Path) -> None:
    (folder / SHARD).unlink()
    (folder / SHARD).mkdir()
    (folder / SHARD / "notes").write_text("mine")
    with pytest.raises(FeatstoreError):
        repair_folder(folder, without_encoders(folder))
    assert (folder / SHARD / "notes").read_text() == "mine"


@pytest.mark.parametrize("kind", ["vit"])
def test_an_entry_of_the_quarantine_list_cannot_hide_behind_its_checksum(folder: Path) -> None:
    entry = {"reason": "x", "source_digest": [1, 2, 3]}
    entry["checksum"] = quarantine_checksum("dog", entry)
    (folder / "quarantine.json").write_text(json.dumps({"dog": entry}))
    check_refused(folder, "quarantine.json")


# --- runs -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_vit: Path, tiny_text: Path) -> Any:
    """A workspace and a run of one epoch."""
    made = tmp_path_factory.mktemp("hostile")
    config = tiny_config(made / "data", tiny_vit, tiny_text, keep_state=True)
    work = Workspace(config, prepared(config), made / "runs")
    return work, work.fit(epochs=1)


@pytest.fixture
def run(finished: Any, tmp_path: Path) -> Run:
    _, training = finished
    return Run(Path(shutil.copytree(training.run.folder, tmp_path / "run")))


class Bomb:
    """Says that it was unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("unpickled",))


def set_array(name: str, value: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        arrays[name] = value
        with path.open("wb") as file:
            np.savez(file, **arrays)

    return change


def huge_claim(path: Path) -> None:
    """Claim an array of an exabyte."""
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1152921504606846976,), }"
    npy = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + header.ljust(117) + b"\n"
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("model/99.npy", npy)


def progress(**fields: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with np.load(path, allow_pickle=False) as file:
            said = json.loads(str(file["progress"]))
        set_array("progress", np.array(json.dumps({**said, **fields})))(path)

    return change


CHECKPOINTS: dict[str, Callable[[Path], None]] = {
    "a pickle": set_array("model/0", np.array([Bomb()], dtype=object)),
    "a pickle alone": lambda path: path.write_bytes(b"\x80\x04\x95."),
    "an exabyte": huge_claim,
    "text in place of numbers": set_array("model/0", np.array("text")),
    "dates in place of numbers": set_array("optimizer/1", np.array("2020", "M8[D]")),
    "no progress": set_array("progress", np.array("")),
    "deep progress": set_array("progress", np.array("[" * 100_000)),
    "a list as progress": set_array("progress", np.array("[]")),
    "an unknown field": progress(no_such=1),
    "an epoch that is text": progress(epoch="one"),
    "a negative epoch": progress(epoch=-3),
    "a history that is a number": progress(history=3),
    "a generator of another shape": set_array("random/seed_generator_0", np.zeros(7)),
    "a generator more": set_array("random/none", np.zeros(2)),
    "a folder": lambda path: (path.unlink(), path.mkdir())[0],
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path))[0],
}


@pytest.mark.parametrize("change", CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
def test_a_hostile_checkpoint_is_refused(
    finished: Any,
    run: Run,
    change: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    _, training = finished
    load_state(run.checkpoint_path, training.model, training.optimizer)
    change(run.checkpoint_path)
    with pytest.raises(RunError) as caught:
        load_state(run.checkpoint_path, training.model, training.optimizer)
    assert "\n" not in str(caught.value)
    assert str(run.checkpoint_path) in str(caught.value)
    assert not Path("unpickled").exists()


def weights_change(change: Callable[[h5py.File, Path], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            change(file, path.parent)

    return apply


def first_dataset(file: h5py.File) -> str:
    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if hasattr(item, "shape") else None)
    return names[0]


def link_away(file: h5py.File, folder: Path) -> None:
    name = first_dataset(file)
    shape = file[name].shape
    with h5py.File(folder / "elsewhere.h5", "w") as other:
        other["x"] = np.ones(shape, np.float32)
    del file[name]
    file[name] = h5py.ExternalLink("elsewhere.h5", "/x")


def raw_elsewhere(file: h5py.File, folder: Path) -> None:
    name = first_dataset(file)
    shape = file[name].shape
    (folder / "raw").write_bytes(b"\0" * file[name].nbytes)
    del file[name]
    file.create_dataset(name, shape, "float32", external=[(str(folder / "raw"), 0, 1 << 20)])


def other_type(dtype: Any, value: Any) -> Callable[[h5py.File, Path], None]:
    def change(file: h5py.File, folder: Path) -> None:
        name = first_dataset(file)
        shape = file[name].shape
        del file[name]
        file.create_dataset(name, shape, dtype, data=np.full(shape, value, dtype=dtype))

    return change


WEIGHTS: dict[str, Callable[[Path], None]] = {
    "nothing": lambda path: path.write_bytes(b""),
    "a pickle": lambda path: path.write_bytes(b"\x80\x04\x95."),
    "half of it": lambda path: os.truncate(path, path.stat().st_size // 2),
    "a folder": lambda path: (path.unlink(), path.mkdir())[0],
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path))[0],
    "no layers": weights_change(lambda file, _: file.clear()),
    "a link to elsewhere": weights_change(link_away),
    "data elsewhere": weights_change(raw_elsewhere),
    "text": weights_change(other_type(h5py.string_dtype(), "x")),
    "a layer less": weights_change(
        lambda file, _: file.__delitem__(first_dataset(file).partition("/vars")[0])
    ),
    "a dataset less": weights_change(lambda file, _: file.__delitem__(first_dataset(file))),
}


@pytest.mark.filterwarnings("ignore:Skipping nested container:UserWarning")
@pytest.mark.parametrize("change", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_hostile_weights_are_refused(run: Run, change: Callable[[Path], None]) -> None:
    load_best(run)
    change(run.weights_path)
    with pytest.raises(RunError) as caught:
        load_best(run)
    assert "\n" not in str(caught.value)
    assert str(run.weights_path) in str(caught.value)


MANIFESTS = [
    "", "null", "[]", "{}", DEEP, HUGE, "NaN", '{"features": 3}', '{"features": {"vision": {}}}',
    '{"status": 3, "features": {"vision": {"row_shape": "ab"}}}',
    '{"features": {"vision": {"row_shape": [1e400, 3]}}}',
    '{"features": {"vision": {"row_shape": [16]}}}',
    '{"features": {"vision": {"row_shape": [-1, -1]}}}',
]  # fmt: skip


@pytest.mark.parametrize("body", MANIFESTS, ids=range(len(MANIFESTS)))
def test_a_hostile_manifest_of_a_run_is_refused(finished: Any, run: Run, body: str) -> None:
    work, _ = finished
    run.manifest_path.write_text(body)
    for use in (lambda: load_best(run), lambda: run.check_free_or_same(work.config)):
        with pytest.raises(FeatstoreError) as caught:
            use()
        assert "\n" not in str(caught.value)
    assert find_run(run.folder.parent, run.name).folder == run.folder


def changed_json(path: Path, *keys: str, value: Any = None) -> None:
    """Give a field of a JSON file another value, or take it away."""
    content = json.loads(path.read_text())
    *above, last = keys
    inner = content
    for key in above:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    path.write_text(json.dumps(content))


METRICS: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_text(""),
    "half of it": lambda path: os.truncate(path, path.stat().st_size // 2),
    "nothing in it": lambda path: path.write_text("{}"),
    "a list": lambda path: path.write_text("[1]"),
    "no threshold": lambda path: changed_json(path, "threshold"),
    "a threshold of text": lambda path: changed_json(path, "threshold", value="0.5"),
    "no loss": lambda path: changed_json(path, "loss"),
    "no epoch": lambda path: changed_json(path, "epoch"),
    "no figures at the threshold": lambda path: changed_json(path, "at_threshold"),
    "no accuracy": lambda path: changed_json(path, "at_threshold", "accuracy"),
}
HISTORIES: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_text(""),
    "a line cut off": lambda path: path.write_text(path.read_text().rstrip()[:-1]),
    "a line less": lambda path: path.write_text(
        "".join(line for line in path.read_text().splitlines(True) if line[:2] != "1,")
        + "2,1,0.1\n"
    ),
    "text for a number": lambda path: path.write_text(path.read_text().replace("\n1,", "\n1,x")),
    "another column for the epoch": lambda path: path.write_text("x" + path.read_text()),
    "no text": lambda path: path.write_bytes(b"\x00\xff\n"),
}


@pytest.mark.parametrize(
    ("name", "change"),
    [("metrics", change) for change in METRICS.values()]
    + [("history", change) for change in HISTORIES.values()],
    ids=[*METRICS, *HISTORIES],
)
def test_damaged_figures_of_a_run_are_refused(
    run: Run, name: str, change: Callable[[Path], Any]
) -> None:
    path = getattr(run, f"{name}_path")
    assert len(getattr(run, name))
    change(path)
    with pytest.raises(RunError) as caught:
        getattr(run, name)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    # What to type next trains the same run.
    assert f"`featstore train --config {run.config_path} --name run-again`" in str(caught.value)


def test_a_damaged_run_that_was_imported_cannot_be_trained_again(run: Run) -> None:
    changed_json(run.manifest_path, "imported", value={"file": "x"})
    run.metrics_path.write_text("")
    with pytest.raises(RunError, match="or import the run again"):
        _ = run.metrics


def test_figures_that_are_damaged_are_found_before_the_work(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would be computed is not thrown away at the end."""
    opened = trainer.load_run(run.folder)
    other = trainer.load_run(shutil.copytree(run.folder, run.folder.with_name("other")))
    config = opened.config.data

    def never(*args: Any, **options: Any) -> Any:
        raise AssertionError("rows were scored")

    monkeypatch.setattr(Scorer, "predictor", property(never))
    run.metrics_path.write_text("{}")
    for use in (
        lambda: opened.predict(config.rows, config.images),
        lambda: opened.predict_pair(next(Path(config.images).iterdir()), "a dog"),
        lambda: opened.explain(rows=2),
        lambda: opened.evaluate("val"),
        lambda: opened.compare(other),
    ):
        with pytest.raises(RunError, match=r"metrics\.json: no epoch"):
            use()
    assert "run': damaged: " in repr(opened)


@pytest.mark.parametrize(
    "text",
    [
        "x = " + "[" * 100_000,
        "[train]\nlr = " + "9" * 5000,
        "[train]\nepochs = " + "9" * 5000,
        "[train]\nlr = nan",
        "[train]\nlr = inf",
        "\0",
        "[" + ".".join("a" * 20_000) + "]",
        "[data]\nrows = '\\u0000'\n" * 2,
        "[store]\nroot = 1979-05-27",
    ],
    ids=range(9),
)
def test_hostile_settings_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
def test_settings_of_a_run_that_are_no_file_are_refused(
    run: Run, place: Callable[[Path], Any]
) -> None:
    run.config_path.unlink()
    place(run.config_path)
    # One that is empty would be all defaults: another run's.
    with pytest.raises(RunError, match=r"config\.toml"):
        _ = run.config


def test_the_readers_never_unpickle() -> None:
    """The only loaders of NumPy and Keras files in the product say so themselves."""
    root = Path(__file__).resolve().parent.parent
    for path in [*root.glob("featstore/**/*.py"), *root.glob("trainer/**/*.py"), root / "cli.py"]:
        text = path.read_text()
        assert "import pickle" not in text, path
        assert text.count("np.load(") == text.count("allow_pickle=False"), path
