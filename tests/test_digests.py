"""Digests of weights are kept: read once, noticed when replaced, never trusted when in doubt."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import xxhash

from featstore.config import EncodersConfig, FeatureConfig, StoreConfig
from featstore.encoders import presets
from featstore.encoders.presets import DIGESTS_FILE, Digests, resolve_preset
from featstore.errors import PresetError
from featstore.project import Project
from featstore.publish import checksum, read_checked, write_checked

WEIGHTS = "model.weights.h5"


class Reads:
    """The files whose digests were computed, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths: list[Path] = []
        read = presets._digest_files

        def counted(files: Any) -> str:
            self.paths += files
            return read(files)

        monkeypatch.setattr(presets, "_digest_files", counted)

    def __len__(self) -> int:
        return len(self.paths)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    # Copies are younger than the two seconds after which a file is trusted.
    monkeypatch.setattr(presets, "_RACY_SECONDS", 0.0)
    forget(monkeypatch)
    return Reads(monkeypatch)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do as a new process does."""
    monkeypatch.setattr(Digests, "_of_process", {})


@pytest.fixture
def preset(tiny_vit: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(tiny_vit, tmp_path / "preset"))
    settle(folder / WEIGHTS)
    return folder


def settle(path: Path) -> None:
    """Wait until the file system's clock has left the tick of a file's last change."""
    while time.time_ns() <= path.stat().st_ctime_ns + 20_000_000:
        time.sleep(0.001)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def digest_of(preset: Path, root: Path | None) -> str:
    return resolve_preset(preset, Digests(root)).weights_digest


def content_digest(preset: Path) -> str:
    return str(xxhash.xxh3_128_hexdigest((preset / WEIGHTS).read_bytes()))


def flip_byte(path: Path, inode: bool = False) -> None:
    """Change one byte of a file, and neither its size nor its time of modification."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    if inode:
        path.with_name("new").write_bytes(content)
        path.with_name("new").replace(path)
    else:
        path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_weights_are_read_only_for_their_digest(preset: Path, reads: Reads) -> None:
    resolved = resolve_preset(preset)
    assert len(reads) == 0
    assert resolved.weights_digest == content_digest(preset)
    assert reads.paths == [preset / WEIGHTS]


def test_once_in_a_process(preset: Path, reads: Reads, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(preset)
    for path in (preset, preset, link):
        assert digest_of(path, None) == content_digest(preset)
    assert len(reads) == 1


def test_once_for_a_store(
    preset: Path, root: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = content_digest(preset)
    for _ in range(3):
        forget(monkeypatch)
        assert digest_of(preset, root) == expected
    assert len(reads) == 1
    (line,) = read_checked(root / DIGESTS_FILE)["weights"]
    assert line["digest"] == expected
    assert line["files"][0][0] == str(preset.resolve() / WEIGHTS)


def test_specs_keep_digests_beside_their_store(
    preset: Path, tiny_text: Path, root: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders = EncodersConfig(vit=str(preset), text=str(tiny_text))
    config = FeatureConfig(encoders=encoders, store=StoreConfig(root=str(root)))
    found = []
    for project in (Project(config, dry_run=True), Project(config), Project(config)):
        forget(monkeypatch)
        assert (root / DIGESTS_FILE).exists() == bool(found[1:])
        found.append((project.vision_spec, project.text_spec(1)))
    assert found[0] == found[1] == found[2]
    assert len(reads) == 4
    assert len(read_checked(root / DIGESTS_FILE)["weights"]) == 2


def test_what_a_process_knows_is_kept_too(
    preset: Path, root: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest_of(preset, None)
    digest_of(preset, root)
    forget(monkeypatch)
    digest_of(preset, root)
    assert len(reads) == 1


@pytest.mark.parametrize("inode", [False, True])
@pytest.mark.parametrize("new_process", [False, True])
def test_a_file_of_the_same_size_and_time_is_noticed(
    preset: Path,
    root: Path,
    reads: Reads,
    monkeypatch: pytest.MonkeyPatch,
    new_process: bool,
    inode: bool,
) -> None:
    before, status = digest_of(preset, root), (preset / WEIGHTS).stat()
    flip_byte(preset / WEIGHTS, inode)
    after = (preset / WEIGHTS).stat()
    assert (after.st_size, after.st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    if new_process:
        forget(monkeypatch)
    assert digest_of(preset, root) == content_digest(preset) != before
    (line,) = read_checked(root / DIGESTS_FILE)["weights"]
    assert line["digest"] == content_digest(preset)


def test_a_file_that_just_changed_is_not_trusted(
    preset: Path, root: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presets, "_RACY_SECONDS", 3600.0)
    for _ in range(2):
        assert digest_of(preset, root) == content_digest(preset)
    assert len(reads) == 2
    assert not (root / DIGESTS_FILE).exists()


def test_a_time_of_the_future_is_not_trusted(preset: Path, root: Path, reads: Reads) -> None:
    later = time.time() + 3600
    os.utime(preset / WEIGHTS, (later, later))
    for _ in range(2):
        digest_of(preset, root)
    assert len(reads) == 2


def test_a_file_that_changes_while_it_is_read_is_not_trusted(
    preset: Path, root: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = presets._digest_files

    def overtaken(files: Any) -> str:
        found = read(files)
        flip_byte(files[0])
        return found

    monkeypatch.setattr(presets, "_digest_files", overtaken)
    digest_of(preset, root)
    assert not (root / DIGESTS_FILE).exists()
    monkeypatch.setattr(presets, "_digest_files", read)
    settle(preset / WEIGHTS)
    assert digest_of(preset, root) == content_digest(preset)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: "[]",
        lambda text: text[:-20],
        lambda text: "[" * 100_000,
        lambda text: json.dumps({**json.loads(text), "checksum": "00"}),
        lambda text: text.replace('"digest": "', '"digest": "0'),
        lambda text: resealed({"weights": "x"}),
        lambda text: resealed({"weights": 3}),
        lambda text: resealed({"weights": [{"files": [3], "digest": "x"}]}),
        lambda text: resealed({"weights": [{"files": [[]], "digest": "x"}]}),
        lambda text: resealed({"other": []}),
    ],
)
def test_a_damaged_list_is_passed_over(
    preset: Path, root: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch, damage: Any
) -> None:
    expected = digest_of(preset, root)
    path = root / DIGESTS_FILE
    path.write_text(damage(path.read_text()))
    forget(monkeypatch)
    assert digest_of(preset, root) == expected
    assert len(reads) == 2
    # It is mended on the way.
    forget(monkeypatch)
    assert digest_of(preset, root) == expected
    assert len(reads) == 2


def resealed(content: dict[str, Any]) -> str:
    return json.dumps({**content, "checksum": checksum(content)})


def test_a_root_that_cannot_be_written(
    preset: Path, tmp_path: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presets, "write_checked", refuse)
    folder = tmp_path / "read-only"
    folder.mkdir()
    assert digest_of(preset, folder) == content_digest(preset)
    # A root that is not there yet is not made for this.
    assert digest_of(preset, tmp_path / "absent") == content_digest(preset)
    assert not (tmp_path / "absent").exists()


def refuse(path: Path, content: dict[str, Any]) -> None:
    from featstore.errors import FeatstoreError

    raise FeatstoreError(f"{path}: cannot be written (Read-only file system)")


def test_weights_that_are_gone(preset: Path, root: Path, reads: Reads) -> None:
    resolved = resolve_preset(preset, Digests(root))
    (preset / WEIGHTS).unlink()
    with pytest.raises(PresetError, match="cannot be read"):
        _ = resolved.weights_digest


def test_checked_json_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_checked(path, {"b": [1, "ä", None], "a": {"c": 0.5}})
    assert read_checked(path) == {"a": {"c": 0.5}, "b": [1, "ä", None]}
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    assert read_checked(path)["b"] == [1, "ä", None]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"a": 1}', '{"a": 1, "checksum": null}', '{"a": NaN}', '{"a": "\\ud800"}'],
)
def test_changed_json_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"changed|object|JSON|spec|Expecting"):
        read_checked(path)
