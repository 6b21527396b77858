"""Care of the store: damage is found, named and mended; only what is said is deleted."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from jobs import text_job
from PIL import Image
from tiny_runs import IMAGES_OF_SPLIT, SENTENCES, extracted, tiny_config, with_train
from unprivileged import forbidden

from featstore.care import runs as care_runs
from featstore.care.dump import dump_features
from featstore.care.gc import compact, delete, find_garbage
from featstore.care.info import describe_store, open_folder
from featstore.care.repair import RepairReport, repair_folder
from featstore.care.report import FolderReport
from featstore.care.verify import sample_folder, verify_folder, verify_store
from featstore.config import EncodersConfig, FeatureConfig
from featstore.encoders import tower as encoders
from featstore.errors import CorruptShardError, RunError, StoreError, UsageError, shown
from featstore.extract import encode
from featstore.extract.claims import writing
from featstore.extract.extract import extract
from featstore.progress import SILENT
from featstore.project import Project
from featstore.publish import read_json
from featstore.store.folder import LOST, read_manifest, read_quarantine, shard_paths
from featstore.store.users import record_use, user_of
from trainer.commands.main import cli
from trainer.config import Config, render_config

PHOTOS = sum(IMAGES_OF_SPLIT.values())
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def shared_encoders() -> Iterator[None]:
    """Load and compile each encoder once: that takes most of such a small extraction's time."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("VisionEncoder", "TextEncoder"):
            patch.setattr(encode, name, functools.cache(getattr(encoders, name)))
        yield


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, tiny_vit: Path, tiny_text: Path
) -> tuple[Path, Config]:
    """A data set with its features: 3 shards of images, 2 of sentences."""
    folder = tmp_path_factory.mktemp("care")
    config = tiny_config(folder, tiny_vit, tiny_text)
    # On some machines a row's last digits depend on its place in a batch.
    store = dataclasses.replace(config.store, encode_batch_size=1)
    config = dataclasses.replace(config, store=store)
    extracted(config)
    store = dataclasses.replace(config.store, shard_rows=2)
    extract(text_job(config.encoders, store, SENTENCES, config.train.k_txt))
    return folder, config


@dataclasses.dataclass
class Own:
    """A copy that a test may damage."""

    folder: Path
    config: Config

    @property
    def project(self) -> Project:
        return Project(self.config)

    def features(self, kind: str = "vit") -> Path:
        return self.project.spec(kind).folder(self.project.root)

    def shard(self, number: int, kind: str = "vit") -> Path:
        return shard_paths(self.features(kind))[number]

    def gathered(self, kind: str = "vit") -> Any:
        project = self.project
        opened = project.images() if kind == "vit" else project.sentences()
        positions = opened.lookup(project.keys(kind))
        assert (positions >= 0).all()
        return opened.gather(positions) if kind == "vit" else opened.gather(positions, 24)[0]

    def photo(self, image_id: str, seed: int = 9) -> Path:
        """Put other pixels into a photo."""
        path = self.folder / "images" / f"{image_id}.png"
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), np.uint8)
        Image.fromarray(pixels).save(path)
        return path

    def extract(self) -> None:
        self.project.extract("vit", show=SILENT)

    def file(self) -> str:
        path = self.folder / "featstore.toml"
        path.write_text(render_config(self.config))
        return str(path)


@pytest.fixture
def own(made: tuple[Path, Config], tmp_path: Path) -> Own:
    folder, config = made
    copy = Path(shutil.copytree(folder, tmp_path / "own"))
    data = {key: value.replace(str(folder), str(copy)) for key, value in vars(config.data).items()
            if isinstance(value, str)}  # fmt: skip
    store = dataclasses.replace(config.store, root=str(copy / "cache"))
    return Own(
        copy,
        dataclasses.replace(config, data=dataclasses.replace(config.data, **data), store=store),
    )


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        value = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([value ^ 0x10]))


def offset_of(path: Path, dataset: str) -> int:
    with h5py.File(path, "r") as file:
        return int(file[dataset].id.get_offset())


def flip_row(path: Path, row: int) -> None:
    with h5py.File(path, "r") as file:
        stored = file["features"]
        step = stored.id.get_storage_size() // stored.shape[0]
        if "offsets" in file:
            row = int(file["offsets"][row])
        offset = stored.id.get_offset() + row * step + 5
    flip(path, offset)


def tree(folder: Path) -> dict[str, bytes]:
    """Return every file but the manifest, which names the command that wrote it."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        path.name: path.read_bytes() for path in files if path.name[-5:] not in (".json", "lock")
    }


def whats(report: FolderReport) -> list[str]:
    return [problem.what for problem in report.problems]


def sound(own: Own, kind: str = "vit") -> None:
    report = verify_folder(own.features(kind))
    assert report.problems == []
    assert report.checked_rows == report.rows > 0


def mend(own: Own, kind: str = "vit") -> RepairReport:
    report = repair_folder(own.features(kind), own.project)
    assert report.left == []
    sound(own, kind)
    return report


# --- verify -----------------------------------------------------------------------------


def test_a_store_that_was_just_made_is_sound(own: Own) -> None:
    reports = verify_store(own.project)
    assert [whats(report) for report in reports] == [[], []]
    assert [(r.shards, r.rows, r.checked_rows) for r in reports] == [(3, 56, 56), (2, 4, 4)]


@pytest.mark.parametrize("kind", ["vit", "text"])
def test_no_byte_of_a_shard_can_change_unseen(own: Own, kind: str) -> None:
    path = own.shard(1, kind)
    size = path.stat().st_size
    for offset in np.random.default_rng(0).integers(0, size, 60).tolist():
        flip(path, offset)
        report = verify_folder(own.features(kind))
        assert {problem.path.name for problem in report.problems} == {path.name}, offset
        flip(path, offset)
    sound(own, kind)


@pytest.mark.parametrize("kind", ["vit", "text"])
def test_damaged_rows_are_named(own: Own, kind: str) -> None:
    keys = open_folder(own.features(kind)).shards[1].keys()
    for row in (0, 1):
        flip_row(own.shard(1, kind), row)
    (problem,) = verify_folder(own.features(kind)).problems
    assert (problem.what, problem.path) == ("damaged rows", own.shard(1, kind))
    assert problem.rows == (0, 1)
    assert list(problem.keys) == keys[:2]


VISION_PARTS = ["keys", "key_offsets", "key_digests", "source_digests", "checksums"]
TEXT_PARTS = ["keys", "key_offsets", "key_digests", "offsets", "token_ids", "checksums"]


@pytest.mark.parametrize(
    ("kind", "part"),
    [*(("vit", part) for part in VISION_PARTS), *(("text", part) for part in TEXT_PARTS)],
)
def test_a_damaged_index_is_found_with_the_keys_that_can_be_told(
    own: Own, kind: str, part: str
) -> None:
    path = own.shard(0, kind)
    keys = open_folder(own.features(kind)).shards[0].keys()
    flip(path, offset_of(path, part) + 3)
    (problem,) = verify_folder(own.features(kind)).problems
    assert (problem.what, problem.path) == ("unreadable shard", path)
    assert set(problem.keys) <= set(keys)
    assert len(problem.keys) >= len(keys) - 2
    with pytest.raises(CorruptShardError, match=r"store verify"):
        open_folder(own.features(kind))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"garbage")


@pytest.mark.parametrize(
    ("name", "damage", "what"),
    [
        ("shard-00001.h5", truncate, "unreadable shard"),
        ("shard-00001.h5", lengthen, "damaged bytes"),
        ("shard-00001.h5", Path.unlink, "missing shard"),
        ("shard-00001.h5", lambda path: path.write_bytes(b"x" * 5000), "unreadable shard"),
        ("manifest.json", Path.unlink, "manifest"),
        ("manifest.json", truncate, "manifest"),
        ("spec.json", Path.unlink, "spec"),
        ("spec.json", lambda path: path.write_text(path.read_text().replace("8", "9")), "spec"),
        ("quarantine.json", lambda path: path.write_bytes(b"{"), "quarantine"),
    ],
)
def test_other_damage_is_found_and_mended(
    own: Own, name: str, damage: Callable[[Path], Any], what: str
) -> None:
    before, rows = tree(own.features()), own.gathered()
    damage(own.features() / name)
    report = verify_folder(own.features())
    assert whats(report) == [what]
    assert report.problems[0].path.name == name
    mend(own)
    assert np.array_equal(own.gathered(), rows)
    if what not in ("missing shard", "unreadable shard"):
        assert tree(own.features()) == before


def test_a_manifest_that_disagrees_is_found_and_mended(own: Own) -> None:
    path = own.features() / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][1]["rows"] += 1
    path.write_text(json.dumps(manifest))
    assert whats(verify_folder(own.features())) == ["manifest"]
    mend(own)
    assert [line["rows"] for line in read_manifest(own.features())] == [20, 20, 16]


def test_a_damaged_row_is_found_without_manifest_and_spec(own: Own) -> None:
    for name in ("manifest.json", "spec.json"):
        (own.features() / name).unlink()
    flip_row(own.shard(2), 3)
    report = verify_folder(own.features())
    assert whats(report) == ["spec", "manifest", "damaged rows"]
    assert report.problems[-1].keys == ("photo043",)
    assert mend(own).identical == 1


def test_a_copy_of_a_shard_under_another_number_is_refused(own: Own) -> None:
    before = own.gathered()
    shutil.copy(own.shard(0), own.features() / "shard-00007.h5")
    (problem,) = verify_folder(own.features()).problems
    assert problem.what == "unreadable shard"
    assert "number is 0, expected 7" in problem.detail
    with pytest.raises(CorruptShardError, match=r"shard-00007\.h5: number is 0, expected 7"):
        open_folder(own.features())
    mend(own)
    assert describe_store(own.project)["features"][0]["superseded_rows"] == 0
    assert np.array_equal(own.gathered(), before)


def test_a_newest_shard_that_is_lost_with_the_manifest_brings_no_stale_row_back(own: Own) -> None:
    own.photo("photo003")
    own.extract()
    rows = own.gathered()
    own.shard(3).unlink()
    (own.features() / "manifest.json").unlink()
    with pytest.raises(CorruptShardError, match=r"manifest\.json: is missing; run .*store repair"):
        open_folder(own.features())
    (problem,) = verify_folder(own.features()).problems
    assert "nobody can tell whether the newest shards are lost" in problem.detail
    mend(own)
    assert lookup(own, "photo003") == -1
    own.extract()
    assert np.array_equal(own.gathered(), rows)


def test_a_lost_manifest_is_rebuilt_without_encoders_and_photos(own: Own) -> None:
    rows = own.gathered()
    (own.features() / "manifest.json").write_text("{}")
    encoders = EncodersConfig("absent", "absent")
    other = Project(FeatureConfig(encoders=encoders, store=own.config.store))
    assert repair_folder(own.features(), other).left == []
    sound(own)
    assert np.array_equal(own.gathered(), rows)


def test_shards_that_nobody_can_read_are_named_though_the_spec_is_lost(own: Own) -> None:
    rows = own.gathered()
    (own.features() / "spec.json").unlink()
    for number in range(3):
        os.truncate(own.shard(number), 400)
    assert whats(verify_folder(own.features())) == ["spec", *3 * ["unreadable shard"]]
    mend(own)
    assert np.array_equal(own.gathered(), rows)


def test_a_stray_copy_is_no_shard(own: Own) -> None:
    """A file that a person put there must not bring old rows back as the newest."""
    rows = own.gathered()
    shutil.copy(own.shard(0), own.features() / "shard-00000 (copy).h5")
    own.extract()
    assert len(open_folder(own.features())) == PHOTOS
    assert np.array_equal(own.gathered(), rows)


def test_a_sample_is_quick_and_finds_what_it_meets(own: Own) -> None:
    assert sample_folder(own.features(), 10).checked_rows == 10
    assert sample_folder(own.features(), 1000).checked_rows == PHOTOS
    flip_row(own.shard(2), 3)
    (problem,) = sample_folder(own.features(), 1000).problems
    assert (problem.rows, problem.keys) == ((3,), ("photo043",))
    truncate(own.shard(0))
    own.shard(1).unlink()
    found = whats(sample_folder(own.features(), 5))
    assert found[:2] == ["unreadable shard", "missing shard"]


def test_photos_that_changed_or_vanished_are_listed(own: Own) -> None:
    own.photo("photo003")
    (own.folder / "images" / "photo050.png").unlink()
    report = verify_store(own.project, photos=True)[0]
    assert [(p.what, p.keys) for p in report.problems] == [
        ("changed photos", ("photo003",)),
        ("vanished photos", ("photo050",)),
    ]
    assert shown(report.problems[0].mend) == "featstore extract-vit"
    own.extract()
    assert [p.keys for p in verify_store(own.project, photos=True)[0].problems] == [("photo050",)]


def test_photos_beside_damage_are_not_said_to_be_compared(own: Own) -> None:
    flip_row(own.shard(0), 7)
    report = verify_store(own.project, photos=True)[0]
    assert whats(report) == ["damaged rows"]
    assert "the photos were not compared" in str(report.notes[0])


# --- what may not be read ---------------------------------------------------------------

FORBIDDEN = {
    "all images": lambda own: own.features().parent,
    "folder": Own.features,
    "shard": lambda own: own.shard(1),
    "spec": lambda own: own.features() / "spec.json",
    "manifest": lambda own: own.features() / "manifest.json",
    "quarantine": lambda own: own.features() / "quarantine.json",
}


@pytest.mark.parametrize("place", FORBIDDEN.values(), ids=FORBIDDEN.keys())
def test_what_may_not_be_read_is_no_damage(own: Own, place: Callable[[Own], Path]) -> None:
    """It may be whole: nothing of it is replaced, and nobody takes it for absent."""
    (own.features() / "quarantine.json").write_text("{}")
    before, path = tree(own.features()), place(own)
    with forbidden(path):
        for args in (["verify"], ["verify", "--sample", "3"], ["repair"], ["repair", "--dry-run"]):
            result = invoke(own, *args)
            assert result.exit_code == 1, (args, result.output)
            assert str(path) in result.output
            assert "Permission denied" in result.output
            assert "make it readable" in result.output
            assert "Traceback" not in result.output
        with pytest.raises(StoreError, match="Permission denied"):
            own.gathered()
        with pytest.raises((StoreError, PermissionError), match="Permission denied"):
            own.extract()
    assert tree(own.features()) == before
    sound(own)


# --- the quarantine list ----------------------------------------------------------------


def quarantined(own: Own, image_id: str = "photo005") -> None:
    """Change a photo into one that cannot be decoded, and extract."""
    (own.folder / "images" / f"{image_id}.png").write_bytes(b"no photo")
    own.extract()


def lookup(own: Own, key: str) -> int:
    return int(open_folder(own.features()).lookup([key])[0])


@pytest.mark.parametrize("field", ["photo005", "source_digest", "checksum"])
def test_a_changed_quarantine_entry_never_brings_stale_features_back(own: Own, field: str) -> None:
    quarantined(own)
    assert lookup(own, "photo005") == -1
    path = own.features() / "quarantine.json"
    text = path.read_text()
    at = text.index(field) + len(field) - 1
    path.write_text(text[:at] + chr(ord(text[at]) ^ 1) + text[at + 1 :])
    with pytest.raises(CorruptShardError, match="quarantine"):
        open_folder(own.features())
    assert whats(verify_folder(own.features())) == ["quarantine"]
    mend(own)
    assert lookup(own, "photo005") == -1
    own.extract()
    assert lookup(own, "photo005") == -1
    assert list(read_quarantine(own.features())) == ["photo005"]


def test_a_lost_quarantine_list_is_missed(own: Own) -> None:
    quarantined(own)
    (own.features() / "quarantine.json").unlink()
    with pytest.raises(CorruptShardError, match=r"quarantine.json: is missing"):
        open_folder(own.features())
    mend(own)
    assert lookup(own, "photo005") == -1
    # To training it is a photo without features, not one that cannot be read.
    assert read_quarantine(own.features()) == {}
    own.extract()
    assert list(read_quarantine(own.features())) == ["photo005"]


# --- repair -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit", "text"])
def test_damaged_rows_come_back_bit_for_bit(own: Own, kind: str) -> None:
    before, rows = tree(own.features(kind)), own.gathered(kind)
    shard, found = own.shard(1, kind), (0, 1) if kind == "text" else (0, 7, 19)
    for row in found:
        flip_row(shard, row)
    with pytest.raises(CorruptShardError, match=r"store repair"):
        own.gathered(kind)
    planned = repair_folder(own.features(kind), own.project, dry_run=True)
    assert planned.actions
    assert whats(verify_folder(own.features(kind))) == ["damaged rows"]
    report = mend(own, kind)
    assert (report.restored, report.identical, report.dropped) == (len(found), len(found), [])
    assert np.array_equal(own.gathered(kind), rows)
    assert tree(own.features(kind)) == before


@pytest.mark.parametrize("kind", ["vit", "text"])
@pytest.mark.parametrize("damage", [truncate, Path.unlink])
def test_a_lost_shard_is_extracted_again(
    own: Own, kind: str, damage: Callable[[Path], None]
) -> None:
    rows = own.gathered(kind)
    damage(own.shard(0, kind))
    report = mend(own, kind)
    assert report.extracted == (20 if kind == "vit" else 2)
    assert np.array_equal(own.gathered(kind), rows)


def test_a_photo_that_changed_is_not_restored_but_extracted(own: Own) -> None:
    rows = own.gathered()
    own.photo("photo007")
    flip_row(own.shard(0), 7)
    report = mend(own)
    assert (report.restored, report.dropped, report.extracted) == (0, ["photo007"], 1)
    now = own.gathered()
    assert not np.array_equal(now[7], rows[7])
    assert np.array_equal(np.delete(now, 7, 0), np.delete(rows, 7, 0))


@pytest.mark.parametrize("damage", [truncate, Path.unlink, lambda path: flip_row(path, 0)])
def test_an_older_row_never_comes_back_when_the_newer_is_lost(
    own: Own, damage: Callable[[Path], None]
) -> None:
    path = own.photo("photo007")
    own.extract()
    newest = own.shard(3)
    path.write_bytes(b"no photo")
    damage(newest)
    report = repair_folder(own.features(), own.project)
    assert report.failed.keys() == {"photo007"}
    sound(own)
    assert lookup(own, "photo007") == -1


def test_what_a_stopped_repair_marked_as_lost_is_missing_and_not_quarantined(own: Own) -> None:
    path = own.features() / "quarantine.json"
    path.write_text(json.dumps({"photo003": {"reason": "lost", "source_digest": LOST}}))
    assert lookup(own, "photo003") == -1
    assert read_quarantine(own.features()) == {}
    own.extract()
    assert lookup(own, "photo003") == PHOTOS
    assert json.loads(path.read_text()) == {}


def test_features_of_other_presets_are_left_with_one_line(own: Own, tiny_vit: Path) -> None:
    other = Path(shutil.copytree(tiny_vit, own.folder / "vit"))
    converter = json.loads((other / "image_converter.json").read_text())
    converter["config"]["interpolation"] = "nearest"
    (other / "image_converter.json").write_text(json.dumps(converter))
    flip_row(own.shard(0), 7)
    folder, before = own.features(), tree(own.features())
    encoders = dataclasses.replace(own.config.encoders, vit=str(other))
    project = Project(dataclasses.replace(own.config, encoders=encoders))
    report = repair_folder(folder, project)
    (error,) = report.left
    assert "interpolation" in str(error)
    assert "--vit" in str(error)
    assert (report.actions, tree(folder)) == ([], before)


def test_another_dtype_of_the_same_encoder_is_mended(own: Own) -> None:
    flip_row(own.shard(0), 7)
    folder = own.features()
    store = dataclasses.replace(own.config.store, dtype="float16", tokens="all")
    project = Project(with_train(dataclasses.replace(own.config, store=store), k_txt=2))
    report = repair_folder(folder, project)
    assert (report.restored, report.identical) == (1, 1)


@pytest.mark.parametrize("kind", ["vit", "text"])
def test_a_lost_spec_needs_the_settings_that_the_features_were_made_with(
    own: Own, kind: str
) -> None:
    folder, before = own.features(kind), tree(own.features(kind))
    (folder / "spec.json").unlink()
    store = dataclasses.replace(own.config.store, dtype="float16")
    report = repair_folder(folder, Project(dataclasses.replace(own.config, store=store)))
    (error,) = report.left
    assert "the configuration's encoder cannot make these features again" in str(error)
    assert f"give the --{kind} and --config that they were extracted with" in str(error)
    assert not (folder / "spec.json").exists()
    mend(own, kind)
    assert tree(folder) == before


# Each repair is a fork of a process that has imported everything, which takes longer than it.
REPAIRS = """
import os, sys
import campaign
from featstore.care.repair import repair_store
from featstore.project import Project
from trainer.config import load_config

campaign.import_framework()
config = load_config(sys.argv[1])

def repair():
    left, replace = int(at), os.replace
    def dying(source, target):
        nonlocal left
        left -= 1
        if left < 0:
            os._exit(9)
        replace(source, target)
    os.replace = dying
    repair_store(Project(config), ("vit",))

for at in sys.stdin:
    print(campaign.start(repair).wait().code, flush=True)
"""


@contextlib.contextmanager
def repairs(own: Own) -> Iterator[Callable[[int], int]]:
    """Yield what repairs in a process that ends without notice before its `at`-th publication."""
    tests = Path(__file__).parent
    with subprocess.Popen(
        [sys.executable, "-c", REPAIRS, own.file()],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{tests}:{ROOT}", "OPENBLAS_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        asked, said = process.stdin, process.stdout
        assert asked is not None
        assert said is not None

        def killed(at: int) -> int:
            print(at, file=asked, flush=True)
            return int(said.readline())

        yield killed
        asked.close()


@pytest.mark.slow
def test_a_repair_killed_at_any_publication_goes_on(own: Own) -> None:
    rows = own.gathered()
    at, code = 0, 9
    backup = shutil.copytree(own.features(), own.folder / "backup")
    with repairs(own) as killed:
        while code == 9:
            shutil.rmtree(own.features())
            shutil.copytree(backup, own.features())
            flip_row(own.shard(0), 7)
            truncate(own.shard(1))
            (own.features() / "spec.json").unlink()
            code = killed(at)
            assert code in (0, 9)
            mend(own)
            # A kill after the lost shard was dropped leaves its rows missing, as never extracted.
            own.extract()
            sound(own)
            assert np.array_equal(own.gathered(), rows), at
            at += 1
    assert at > 6


# --- gc ---------------------------------------------------------------------------------


def other_features(own: Own) -> Path:
    """Extract sentences for another boundary; return their folder."""
    plan, _ = own.project.extract("text", k_txt=2, show=SILENT)
    return plan.folder


def collected(own: Own) -> list[str]:
    return [item.what for item in find_garbage(own.project, own.folder / "runs").garbage]


def test_nothing_can_go_of_a_store_that_is_all_needed(own: Own) -> None:
    found = find_garbage(own.project, own.folder / "runs")
    assert (found.garbage, found.unknown, found.notes) == ([], [], [])


def test_gc_deletes_what_nothing_refers_to(own: Own) -> None:
    other = other_features(own)
    before = tree(own.features())
    found = find_garbage(own.project, own.folder / "runs")
    assert [(item.what, item.path) for item in found.garbage] == [("features", other)]
    assert other.exists()
    delete(found)
    assert found.deleted == found.garbage
    assert not other.exists()
    assert tree(own.features()) == before
    assert collected(own) == []


def test_gc_keeps_what_was_asked_for_since_it_looked(own: Own, tmp_path: Path) -> None:
    other, root = other_features(own), own.project.root
    report, split = root / "reports" / f"rows-{'0' * 16}.csv", root / "splits" / f"{'1' * 32}.json"
    (root / "reports").mkdir(exist_ok=True)
    for path in (report, split):
        path.write_text("x")
    found = find_garbage(own.project, own.folder / "runs")
    record_use(root, user_of(tmp_path / "featstore.toml"), [other.name, "0" * 32, "1" * 32])
    delete(found)
    assert found.deleted == []
    assert all("by a command that began meanwhile" in line for line in found.kept)
    assert len(found.kept) == 3
    assert all(path.exists() for path in (other, report, split))


def test_gc_keeps_what_a_run_refers_to(own: Own) -> None:
    other = other_features(own)
    run = own.folder / "runs" / "nested" / "one"
    run.mkdir(parents=True)
    (run / "manifest.json").write_text(
        json.dumps({"features": {"text": {"fingerprint": other.name}}})
    )
    assert collected(own) == []
    # Nor is a record that says nothing one of a run that needs nothing.
    for damaged in ("{", "{}", "[1]", '["' + other.name + '"]'):
        (run / "manifest.json").write_text(damaged)
        with pytest.raises(RunError, match=r"manifest.json: cannot be read"):
            collected(own)


def test_gc_keeps_what_a_search_refers_to(own: Own) -> None:
    """Also before it has a trial, and where its folder is a link."""
    other = other_features(own)
    search = own.folder / "elsewhere"
    search.mkdir()
    (own.folder / "runs").mkdir()
    (own.folder / "runs" / "phase3").symlink_to(search)
    # A circle must not be walked for ever.
    (search / "back").symlink_to(own.folder / "runs")
    assert collected(own) == ["features"]
    (search / "search.json").write_text(json.dumps({"features": [other.name]}))
    assert collected(own) == []


def test_gc_reads_each_run_once(own: Own, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the runs are recorded as a user of the store."""
    runs = own.folder / "runs"
    record = {"status": "finished", "features": own.features().name}
    for name in ("one", "two"):
        (runs / name).mkdir(parents=True)
        (runs / name / "manifest.json").write_text(json.dumps(record))
        (runs / name / "last.npz").write_text("state")
    record_use(own.project.root, user_of(runs / "one" / "config.toml"), [])
    read: list[str] = []
    monkeypatch.setattr(
        care_runs, "read_json", lambda path: read.append(path.parent.name) or read_json(path)
    )
    assert collected(own) == ["state", "state"]
    assert sorted(read) == ["one", "two"]


def test_gc_refuses_runs_that_may_not_be_listed(own: Own) -> None:
    run = own.folder / "runs" / "one"
    run.mkdir(parents=True)
    other = other_features(own)
    (run / "manifest.json").write_text(json.dumps({"features": other.name}))
    with forbidden(run), pytest.raises(RunError, match=r"one: cannot be listed \(Permission"):
        collected(own)


def test_gc_leaves_a_folder_whose_lock_is_held(own: Own) -> None:
    other = other_features(own)
    found = find_garbage(own.project, own.folder / "runs")
    with writing(other):
        delete(found)
    assert found.deleted == []
    assert "holds the lock" in found.kept[0]
    assert shard_paths(other)


def test_gc_never_deletes_what_it_does_not_know(own: Own) -> None:
    other = other_features(own)
    strange = [
        own.project.root / "notes.txt",
        own.project.root / "vit" / "mine",
        other / "shard-00000.h5.bak",
        own.project.root / "splits" / "my.json",
    ]
    for path in strange:
        path.write_text("mine")
    found = find_garbage(own.project, own.folder / "runs")
    assert sorted(found.unknown) == sorted(strange)
    delete(found)
    assert all(path.read_text() == "mine" for path in strange)
    assert [path.name for path in other.iterdir()] == ["shard-00000.h5.bak"]


def test_gc_finds_leftovers_splits_and_reports(own: Own) -> None:
    root = own.project.root
    leftover = own.features() / ".tmp-1-2-shard-00009.h5"
    leftover.write_bytes(b"x" * 7)
    young, old = root / "splits" / ".tmp-1-a.json", root / "splits" / ".tmp-2-b.json"
    report, split = root / "reports" / f"rows-{'0' * 16}.csv", root / "splits" / f"{'0' * 32}.json"
    (root / "reports").mkdir(exist_ok=True)
    for path in (young, old, report, split):
        path.write_text("x")
    os.utime(old, (0, 0))
    found = find_garbage(own.project, own.folder / "runs")
    assert {item.path for item in found.garbage} == {leftover, old, report, split}
    delete(found)
    assert not any(path.exists() for path in (leftover, old, report, split))
    assert young.exists()
    assert own.project.dataset.splits_path.exists()
    sound(own)


def test_superseded_rows_are_compacted_and_a_mapped_file_stays_readable(own: Own) -> None:
    for number in range(20):
        own.photo(f"photo{number:03d}", seed=number)
    own.photo("photo045")
    own.extract()
    rows = own.gathered()
    reader = open_folder(own.features())
    old = reader.shards[0].features.values[3].copy()
    assert [len(shard) for shard in reader.shards] == [20, 20, 16, 20, 1]
    found = find_garbage(own.project, own.folder / "runs")
    assert [(item.what, item.path.name) for item in found.garbage] == [
        ("superseded rows", "shard-00000.h5"),
        ("superseded rows", "shard-00002.h5"),
    ]
    size = sum(path.stat().st_size for path in shard_paths(own.features()))
    delete(found)
    assert [len(shard) for shard in open_folder(own.features()).shards] == [20, 15, 20, 1]
    assert sum(path.stat().st_size for path in shard_paths(own.features())) < size
    assert np.array_equal(own.gathered(), rows)
    assert np.array_equal(reader.shards[0].features.values[3], old)
    sound(own)
    assert collected(own) == []


def test_compaction_gives_no_damaged_row_a_new_checksum(own: Own) -> None:
    own.photo("photo045")
    own.extract()
    flip_row(own.shard(2), 0)
    with pytest.raises(CorruptShardError, match=r"row 0 \('photo040'\)"):
        compact(own.features())
    assert whats(verify_folder(own.features())) == ["damaged rows"]


# --- export -----------------------------------------------------------------------------


def read_keys(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_images_as_npy(own: Own, tmp_path: Path) -> None:
    out = tmp_path / "out" / "images.npy"
    found = dump_features(own.project, "vit", out)
    assert (found["rows"], found["shape"], found["dtype"]) == (PHOTOS, [PHOTOS, 16, 16], "float32")
    assert np.array_equal(np.load(out, mmap_mode="r"), own.gathered())
    keys = read_keys(out.with_suffix(".keys.csv"))
    assert [line["key"] for line in keys] == own.project.keys("vit")
    assert json.loads(out.with_suffix(".json").read_text())["fingerprint"] == own.features().name
    assert len(found["files"]) == len(list(out.parent.iterdir())) == 3


def test_text_as_npy_with_offsets(own: Own, tmp_path: Path) -> None:
    out = tmp_path / "text.npy"
    dump_features(own.project, "text", out)
    values, offsets = np.load(out), np.load(out.with_suffix(".offsets.npy"))
    padded = own.gathered("text")
    for row, line in enumerate(read_keys(out.with_suffix(".keys.csv"))):
        part = values[offsets[row] : offsets[row + 1]]
        assert (line["key"], int(line["length"])) == (SENTENCES[row], len(part))
        assert np.array_equal(part, padded[row, : len(part)])


@pytest.mark.parametrize("kind", ["vit", "text"])
def test_parquet(own: Own, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featstore.care.dump.GROUP_BYTES", 3000)
    out = tmp_path / "rows.parquet"
    found = dump_features(own.project, kind, out)
    table = pq.read_table(out)
    assert pq.ParquetFile(out).num_row_groups > 1
    assert table["key"].to_pylist() == own.project.keys(kind)
    wanted = own.gathered(kind)
    for row, (length, values) in enumerate(
        zip(table["length"].to_pylist(), table["features"].to_pylist(), strict=True)
    ):
        part = np.array(values, np.float32).reshape(length, 16)
        assert np.array_equal(part, wanted[row, :length])
    about = json.loads(table.schema.metadata[b"featstore"])
    assert (about["fingerprint"], about["shape"]) == (own.features(kind).name, found["shape"])


@pytest.mark.parametrize(("dtype", "exported"), [("float16", "float16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_short_floats_are_exported_exactly(
    own: Own, tmp_path: Path, dtype: str, exported: str, suffix: str
) -> None:
    own.config = dataclasses.replace(
        own.config, store=dataclasses.replace(own.config.store, dtype=dtype)
    )
    own.extract()
    out = tmp_path / f"x{suffix}"
    assert dump_features(own.project, "vit", out)["dtype"] == exported
    if suffix == ".npy":
        values = np.load(out)
    else:
        column = pq.read_table(out)["features"].combine_chunks()
        values = column.values.to_numpy(zero_copy_only=False).reshape(-1, 16, 16)
    assert values.dtype == exported
    assert np.array_equal(values, own.gathered().astype(exported))


def test_a_split_is_exported_in_the_order_of_its_rows(own: Own, tmp_path: Path) -> None:
    found = dump_features(own.project, "vit", tmp_path / "val.npy", "val")
    assert found["rows"] == IMAGES_OF_SPLIT["val"]
    assert read_keys(tmp_path / "val.keys.csv")[0]["key"] == "photo032"


def test_damage_leaves_no_export(own: Own, tmp_path: Path) -> None:
    flip_row(own.shard(2), 3)
    for suffix in (".npy", ".parquet"):
        out = tmp_path / "out" / f"x{suffix}"
        with pytest.raises(CorruptShardError, match="photo043"):
            dump_features(own.project, "vit", out)
        assert list(out.parent.iterdir()) == []
    with pytest.raises(UsageError, match=r"\.npy or \.parquet"):
        dump_features(own.project, "vit", tmp_path / "x.csv")


# --- the commands -----------------------------------------------------------------------


def invoke(own: Own, *args: str) -> Result:
    return CliRunner().invoke(
        cli, ["store", *args, "--config", own.file()], prog_name="python cli.py"
    )


def test_info_counts(own: Own) -> None:
    quarantined(own)
    own.photo("photo007")
    own.extract()
    (own.project.root / "text" / ("0" * 32)).mkdir()
    found = json.loads(invoke(own, "info", "--json").stdout)
    vit, empty, text = found["features"]
    assert vit["asked_for"]
    assert text["asked_for"]
    assert not empty["asked_for"]
    assert vit["names"] == [own.config.encoders.vit]
    assert (vit["tokens"], vit["width"], vit["dtype"], vit["boundary"]) == (16, 16, "float32", 2)
    assert (vit["rows"], vit["superseded_rows"], vit["stale_rows"], vit["quarantined"]) == (
        PHOTOS - 1, 1, 1, 1,
    )  # fmt: skip
    assert vit["shards"] == 4
    assert vit["bytes"] >= sum(path.stat().st_size for path in shard_paths(own.features()))
    assert (text["rows"], text["boundary"], text["layers"]) == (4, 4, 4)
    assert found["coverage"]["train"] == {
        "images": 32,
        "images_with_features": 31,
        "sentences": 4,
        "sentences_with_features": 4,
    }
    assert found["splits"]["files"] == 1
    text_form = invoke(own, "info").stdout
    assert "train with features: 31 of 32 images, 4 of 4 sentences" in text_form
    assert "16 tokens a row × 16 float32" in text_form


@pytest.mark.slow
@pytest.mark.parametrize("command", ["info", "verify", "gc"])
def test_looking_needs_no_tensorflow(own: Own, command: str) -> None:
    program = (
        "import sys\n"
        "from trainer.commands import main as cli\n"
        "try: cli.main()\n"
        "except SystemExit as end: print(end.code, 'keras' in sys.modules,"
        " 'tensorflow' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "store", command, "--config", own.file()],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "0 False False", done.stderr


def test_the_commands_find_and_mend(own: Own) -> None:
    result = invoke(own, "verify", "--source")
    assert (result.exit_code, result.stdout.count("sound")) == (0, 2), result.output
    flip_row(own.shard(0), 7)
    result = invoke(own, "verify", "--kind", "vit", "--mine")
    assert result.exit_code == 1
    assert "damaged rows: 1 of 20 rows" in result.stdout
    assert "'photo007'" in result.stdout
    # With the settings that it was found with: others are of another store.
    assert f"mend: python cli.py store repair --config {own.file()}\n" in result.stdout
    found = json.loads(invoke(own, "verify", "--json").stdout)
    assert not found["sound"]
    (problem,) = found["folders"][0]["problems"]
    assert problem["keys"] == ["photo007"]
    assert problem["mend"] == f"python cli.py store repair --config {own.file()}"
    assert "a sample" in invoke(own, "verify", "--sample", "3").stdout
    result = invoke(own, "repair", "--dry-run")
    assert "compute the damaged rows again" in result.stdout
    assert invoke(own, "verify").exit_code == 1
    result = invoke(own, "repair")
    assert result.exit_code == 0, result.output
    assert "1 row computed again, 1 with the bits that they had" in result.stdout
    assert invoke(own, "verify").exit_code == 0
    assert invoke(own, "repair").stdout == "nothing to mend\n"


def test_gc_shows_first(own: Own) -> None:
    other = other_features(own)
    runs = ("--runs", str(own.folder / "runs"))
    result = invoke(own, "gc", *runs)
    # Extracted by this process, with settings that no file has.
    assert result.stdout == "0 B can go; --yes deletes it\n"
    assert f"kept: text/{other.name}: used by settings without a file" in result.stderr
    runs = (*runs, "--forget", own.project.user.path)
    result = invoke(own, "gc", *runs)
    assert f"features: {other}" in result.stdout
    assert "--yes deletes it" in result.stdout
    assert other.exists()
    found = json.loads(invoke(own, "gc", "--yes", "--json", *runs).stdout)
    assert [item["path"] for item in found["deleted"]] == [str(other)]
    assert not other.exists()


def test_export_prints_what_was_written(own: Own, tmp_path: Path) -> None:
    result = invoke(own, "export", "--out", str(tmp_path / "x.npy"), "--split", "test")
    assert result.exit_code == 0, result.output
    assert "12 rows, 12 × 16 × 16 float32" in result.stdout
    found = json.loads(
        invoke(own, "export", "--out", str(tmp_path / "t.npy"), "--kind", "text", "--json").stdout
    )
    assert found["rows"] == 4


def test_errors_are_one_line(
    own: Own, tmp_path: Path, tiny_vit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip_row(own.shard(0), 7)
    other = Path(shutil.copytree(tiny_vit, own.folder / "vit"))
    converter = (other / "image_converter.json").read_text()
    (other / "image_converter.json").write_text(converter.replace("bicubic", "nearest"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    cases = [
        (1, ["info", "--root", str(tmp_path / "none")], "no store there"),
        (1, ["verify", "--root", str(tmp_path / "none")], "no store there"),
        (1, ["repair", "--vit", str(other)], "interpolation"),
        (2, ["export", "--out", "x.csv"], "expected a name that ends in .npy or .parquet"),
        (1, ["export", "--out", str(tmp_path / "x.parquet")], "pip install pyarrow"),
        (1, ["export", "--out", str(tmp_path / "x.npy")], "python cli.py store repair"),
        (1, ["export", "--out", str(tmp_path / "x.npy"), "--dtype", "float16"], "extract-vit"),
        (2, ["gc", "--config", "none.toml"], "cannot be read"),
        (2, ["verify", "--sample", "0"], "range"),
    ]
    for code, args, expected in cases:
        result = invoke(own, *args) if "--config" not in args else CliRunner().invoke(
            cli, ["store", *args], prog_name="python cli.py"
        )  # fmt: skip
        assert result.exit_code == code, (args, result.output)
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, (args, result.stderr)
        assert expected in errors[0]
        assert "Traceback" not in result.output


def test_a_full_disk_is_said_before_the_export(
    own: Own, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featstore.care.dump.free_space", lambda folder: 10)
    with pytest.raises(StoreError, match="more than is free"):
        dump_features(own.project, "vit", tmp_path / "x.npy")
