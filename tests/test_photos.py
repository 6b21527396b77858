"""What is known of photos' bytes is what reading them gives, whatever becomes of the files."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_extract import pixel_job, write_photos

from featstore.config import StoreConfig
from featstore.data.images import index_images
from featstore.errors import StaleFeaturesError, UsageError
from featstore.extract import photos
from featstore.extract.extract import extract
from featstore.extract.photos import PhotoDigests, photo_digests
from featstore.extract.plan import make_plan, refuse_replaced
from featstore.store.store import VisionStore, open_store

THREADS = 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve photos."""
    write_photos(tmp_path / "photos", 12)
    return tmp_path / "photos"


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading happens an hour after the last change, as far as the list can tell."""
    now = time.time_ns
    monkeypatch.setattr(photos.time, "time_ns", lambda: now() + 3600 * 10**9)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The photos that are read."""
    found: list[Path] = []
    read = photos.read_photo

    def counted(path: Path) -> Any:
        found.append(path)
        return read(path)

    monkeypatch.setattr(photos, "read_photo", counted)
    return found


def root_of(folder: Path) -> Path:
    """Return a store's root beside the photos."""
    return folder.parent / "cache"


def known(folder: Path, root: Path) -> PhotoDigests:
    """Learn every photo of a folder and keep the list."""
    digests = PhotoDigests(root, folder)
    digests.of(sorted(folder.iterdir()), THREADS)
    digests.save()
    return digests


def set_again(path: Path, change: Callable[[], None]) -> None:
    """Change a file and give it back its time of modification, as `exiftool -P` does."""
    status = path.stat()
    change()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def flip(path: Path, seed: int = 0) -> None:
    """Change one byte in place: the size stays."""
    data = bytearray(path.read_bytes())
    data[seed % len(data)] ^= 255
    with path.open("r+b") as file:
        file.write(data)


@pytest.mark.usefixtures("later")
def test_a_photo_is_read_once_for_each_state_of_its_file(folder: Path, reads: list[Path]) -> None:
    paths = sorted(folder.iterdir())
    known(folder, root_of(folder))
    assert sorted(reads) == paths
    reads.clear()
    assert None not in PhotoDigests(root_of(folder), folder).of(paths, THREADS)
    assert reads == []
    time.sleep(0.02)
    os.utime(paths[3])
    os.chmod(paths[5], 0o600)
    set_again(paths[7], lambda: flip(paths[7]))
    PhotoDigests(root_of(folder), folder).of(paths, THREADS)
    assert sorted(reads) == [paths[3], paths[5], paths[7]]
    reads.clear()
    PhotoDigests(root_of(folder), folder).of(paths, THREADS, every=True)
    assert sorted(reads) == paths


@pytest.mark.usefixtures("later")
def test_whatever_becomes_of_the_files_the_digests_are_those_of_their_bytes(folder: Path) -> None:
    rng = np.random.default_rng(0)
    paths = sorted(folder.iterdir())

    def exchange(a: Path, b: Path) -> None:
        a.rename(folder / "third")
        b.rename(a)
        (folder / "third").rename(b)

    def copy(a: Path, b: Path) -> None:
        shutil.copy2(b, a)

    def link(a: Path, b: Path) -> None:
        a.unlink()
        os.link(b, a)

    edits = (
        lambda a, b: flip(a, int(rng.integers(1 << 30))),
        lambda a, b: set_again(a, lambda: flip(a, int(rng.integers(1 << 30)))),
        lambda a, b: os.utime(a),
        exchange,
        copy,
        link,
        lambda a, b: a.with_suffix(".gone").touch() or a.unlink(),
    )
    for _ in range(60):
        a, b = rng.choice(len(paths), 2, replace=False)
        # The system's clock of files may stand still for some milliseconds.
        time.sleep(0.012)
        if paths[a].exists() and paths[b].exists():
            edits[rng.integers(len(edits))](paths[a], paths[b])
        digests = PhotoDigests(root_of(folder), folder)
        assert digests.of(paths, THREADS) == photo_digests(paths, THREADS)
        digests.save()
    assert len(PhotoDigests(root_of(folder), folder)._entries) == len(paths)


def test_a_photo_that_changed_a_moment_ago_is_read_again(folder: Path, reads: list[Path]) -> None:
    paths = sorted(folder.iterdir())
    for path in paths:
        os.utime(path, ns=(0, 0))  # the time of change is still now
    digests = known(folder, root_of(folder))
    assert not digests.path.exists()
    reads.clear()
    PhotoDigests(root_of(folder), folder).of(paths, THREADS)
    assert sorted(reads) == paths


@pytest.mark.usefixtures("later")
def test_a_damaged_list_is_made_anew(folder: Path) -> None:
    paths = sorted(folder.iterdir())
    digests, expected = known(folder, root_of(folder)), photo_digests(paths, THREADS)
    whole = digests.path.read_bytes()
    rng = np.random.default_rng(0)
    damaged = [b"", whole[:100], whole[:-30], b"\x93NUMPY", b"PK\x03\x04"]
    for at in rng.integers(len(whole), size=150):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << rng.integers(8)
        damaged.append(bytes(flipped))
    for data in damaged:
        digests.path.write_bytes(data)
        assert PhotoDigests(root_of(folder), folder).of(paths, THREADS) == expected
    known(folder, root_of(folder))
    assert len(PhotoDigests(root_of(folder), folder)._entries) == len(paths)


@pytest.mark.usefixtures("later")
def test_each_folder_has_a_list_of_its_own_and_what_others_learnt_stays(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    flip(tmp_path / "copy" / "p00.jpg")
    assert known(folder, root_of(folder)).path != known(tmp_path / "copy", root_of(folder)).path
    paths = sorted(folder.iterdir())
    one, other = PhotoDigests(tmp_path / "new", folder), PhotoDigests(tmp_path / "new", folder)
    one.of(paths[:6], THREADS)
    other.of(paths[6:], THREADS)
    one.save()
    other.save()
    assert len(PhotoDigests(tmp_path / "new", folder)._entries) == len(paths)


@pytest.mark.usefixtures("later")
def test_a_store_that_cannot_be_written_is_no_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "root").write_text("not a folder")
    assert not known(folder, tmp_path / "root").path.exists()


@pytest.mark.usefixtures("later")
def test_extraction_learns_what_it_reads_and_reads_no_photo_again(
    folder: Path, tmp_path: Path, reads: list[Path]
) -> None:
    store = StoreConfig(root=str(tmp_path / "cache"), shard_rows=5, encode_batch_size=4)
    index, ids = index_images(folder), [path.stem for path in sorted(folder.iterdir())]
    extract(pixel_job(store, ids, index))
    assert len(reads) == len(ids)
    reads.clear()
    assert extract(pixel_job(store, ids, index))[0].keys == []
    assert reads == []
    job = pixel_job(store, ids, index)
    opened = open_store(job.folder)
    assert isinstance(opened, VisionStore)
    refuse_replaced(job, opened, "train")
    assert reads == []
    time.sleep(0.02)
    os.utime(folder / "p01.png")
    shutil.copy(folder / "p04.png", folder / "p07.png")
    with pytest.raises(StaleFeaturesError, match=r"1 photo of split 'train' .*'p07'") as caught:
        refuse_replaced(pixel_job(store, ids, index), opened, "train")
    assert "extract-vit --split train" in str(caught.value)
    # One that is gone, or cannot be read, tells nothing.
    (folder / "p02.png").unlink()
    plan, _ = extract(pixel_job(store, [key for key in ids if key != "p02"], index))
    assert (plan.keys, plan.changed) == (["p07"], 1)
    job = pixel_job(store, ids, index)
    refuse_replaced(job, open_store(job.folder), "train")  # type: ignore[arg-type]


@pytest.mark.usefixtures("later")
def test_comparing_bytes_finds_what_no_time_tells(folder: Path, tmp_path: Path) -> None:
    store = StoreConfig(root=str(tmp_path / "cache"), shard_rows=5, encode_batch_size=4)
    index, ids = index_images(folder), [path.stem for path in sorted(folder.iterdir())]
    job = pixel_job(store, ids, index)
    extract(job)
    assert job.photos is not None
    entries = job.photos._entries
    flip(folder / "p03.jpg")
    # A file system without times: the list says of the new bytes what it said of the old.
    state = photos._state(folder / "p03.jpg")
    name = job.photos._name(folder / "p03.jpg")
    assert state is not None
    entries[name] = state, entries[name][1]
    job.photos._learnt = True
    job.photos.save()
    assert make_plan(pixel_job(store, ids, index)).keys == []
    assert make_plan(dataclasses.replace(job, source="bytes")).keys == ["p03"]
    with pytest.raises(UsageError, match="expected one of times, bytes"):
        dataclasses.replace(job, source="hashes")
