"""A configuration opened: what it offers, and that nothing is read or made twice."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_runs import IMAGES_OF_SPLIT, SENTENCES, write_data

import featstore.configured
import featstore.project
from featstore.api import Project
from featstore.config import FeatureConfig
from featstore.errors import ConfigError, MissingFeaturesError, UsageError
from featstore.progress import SILENT

PHOTOS = sum(IMAGES_OF_SPLIT.values())
READERS = ["load_dataset", "vision_spec", "text_spec", "load_encoder", "open_features_of"]


@pytest.fixture
def settings(tmp_path: Path, tiny_vit: Path, tiny_text: Path) -> dict[str, Any]:
    """The settings of a small data set of the test's own, by their names alone."""
    return {
        **write_data(tmp_path / "data"),
        "vit": str(tiny_vit),
        "text": str(tiny_text),
        "root": str(tmp_path / "cache"),
        "shard_rows": 20,
        "encode_batch_size": 8,
        "dtype": "float32",
    }


def write_file(folder: Path, settings: dict[str, Any], more: str = "") -> Path:
    """Write the settings as a file, its paths relative to its folder where they can be."""
    sections = {
        "data": ("rows", "images", "split_file"),
        "encoders": ("vit", "text"),
        "store": ("root", "shard_rows", "encode_batch_size", "dtype"),
    }
    lines = []
    for section, keys in sections.items():
        lines.append(f"[{section}]")
        for key in keys:
            value = settings[key]
            if isinstance(value, str):
                value = value.removeprefix(f"{folder}/")
            lines.append(f"{key} = {json.dumps(value)}")
    path = folder / "featstore.toml"
    path.write_text("\n".join([*lines, more]))
    return path


def test_settings_by_name_are_those_of_a_file(settings: dict[str, Any], tmp_path: Path) -> None:
    by_name = Project(**settings)
    file = write_file(tmp_path, settings, "[train]\nk_txt = 1\n")
    of_file = Project.load(file)
    assert by_name.config == of_file.config
    assert by_name.asked["vit"] == of_file.asked["vit"]
    # The layers that train stand in the file alone.
    assert (by_name.k_txt, of_file.k_txt) == (3, 1)
    assert of_file.text_spec() == by_name.text_spec(1)
    other = Project.load(file, dtype="int8")
    assert other.config.store == dataclasses.replace(of_file.config.store, dtype="int8")
    assert Project(by_name.config).config is by_name.config
    with pytest.raises(TypeError, match="a configuration or settings, not both"):
        Project(by_name.config, dtype="int8")


def test_a_project_says_what_it_is(settings: dict[str, Any], tmp_path: Path) -> None:
    assert repr(Project(**settings)) == (
        f"<Project rows={settings['rows']!r} images={settings['images']!r}"
        f" vit={settings['vit']!r} text={settings['text']!r} dtype='float32'"
        f" root={settings['root']!r}>"
    )
    assert "rows='built-in demo'" in repr(Project(root=str(tmp_path)))
    assert list(tmp_path.iterdir()) == [tmp_path / "data"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"dtyp": "int8"}, r"unknown setting 'dtyp' \(did you mean 'dtype'\?\)"),
        ({"dtype": "int4"}, "dtype"),
        ({"shard_rows": 0}, "shard_rows"),
    ],
)
def test_a_wrong_setting_is_named(
    settings: dict[str, Any], tmp_path: Path, wrong: dict[str, Any], words: str
) -> None:
    file = write_file(tmp_path, settings)
    with pytest.raises(ConfigError, match=words):
        Project(**wrong)
    with pytest.raises(ConfigError, match=words):
        Project.load(file, **wrong)


def test_features_of_both_kinds(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    project = Project(**settings)
    with pytest.raises(MissingFeaturesError):
        project.images()
    plan = project.plan("text", k_txt=2)
    assert plan.keys == project.keys("text") == list(SENTENCES)
    assert not project.root.exists()
    plan, rate = project.estimate("text", k_txt=2)
    assert plan.todo_bytes > 0
    assert rate > 0
    assert not project.root.exists()
    plan, summary = project.extract("text", k_txt=2)
    assert (plan.keys, summary.extracted) == (list(SENTENCES), 4)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "sentences: 4 of 4" in shown.err
    assert "sentences/s" in shown.err
    assert project.dataset.splits_path.exists()
    assert project.sentences(2).keys() == list(SENTENCES)
    with pytest.raises(MissingFeaturesError):
        project.images()

    plan, summary = project.extract("vit", "val", show=SILENT)
    assert (plan.requested, summary.extracted) == (12, 12)
    plan, summary = project.extract("vit", shards=range(1), show=SILENT)
    assert (len(plan.keys), summary.extracted) == (PHOTOS - 12, 20)
    # A plan that is open goes on.
    assert project.extract("vit", show=SILENT)[1].extracted == PHOTOS - 32
    assert project.plan("vit").to_dict()["cached"] == PHOTOS
    assert project.estimate("vit")[1] == 0
    assert (project.images().lookup(project.keys("vit")) >= 0).all()
    rows, unread = project.usable("train")
    assert np.array_equal(rows, project.dataset.rows("train"))
    assert unread == {}
    assert capsys.readouterr() == ("", "")
    for use in (project.spec, project.extract, project.plan):
        with pytest.raises(UsageError, match="kind 'audio': expected one of vit, text"):
            use("audio")


def test_the_care_of_the_store(settings: dict[str, Any], tmp_path: Path) -> None:
    project = Project(**settings)
    for k_txt in (3, 1):
        project.extract("text", k_txt=k_txt, show=SILENT)
    project.extract(show=SILENT)
    info = project.info()
    assert [(f["kind"], f["asked_for"], f["rows"]) for f in info["features"]] in (
        [("vit", True, PHOTOS), ("text", True, 4), ("text", False, 4)],
        [("vit", True, PHOTOS), ("text", False, 4), ("text", True, 4)],
    )
    assert info["problems"] == []
    assert info["coverage"]["val"]["images_with_features"] == IMAGES_OF_SPLIT["val"]

    assert [report.problems for report in project.verify()] == [[], [], []]
    before = project.images().gather(np.arange(PHOTOS))
    path = project.vision_spec.folder(project.root) / "shard-00001.h5"
    content = bytearray(path.read_bytes())
    at = bytes(content).index(before[25].tobytes())
    content[at] ^= 1
    path.write_bytes(content)
    (report,) = project.verify(kinds=("vit",))
    assert [problem.rows for problem in report.problems] == [(5,)]
    (planned,) = project.repair(kinds=("vit",), dry_run=True)
    assert (len(planned.actions), planned.restored) == (1, 0)
    (mended,) = project.repair(kinds=("vit",))
    assert (mended.restored, mended.identical, mended.left) == (1, 1, [])
    assert project.verify(kinds=("vit",), mine=True)[0].problems == []
    assert np.array_equal(Project(**settings).images().gather(np.arange(PHOTOS)), before)

    found = project.garbage(tmp_path / "runs")
    assert [item.path for item in found.garbage] == [project.text_spec(1).folder(project.root)]
    assert found.garbage[0].path.exists()
    found = project.garbage(tmp_path / "runs", delete=True)
    assert (len(found.deleted), found.kept) == (1, [])
    assert not found.garbage[0].path.exists()

    dumped = project.dump(tmp_path / "test.npy", split="test")
    assert dumped["rows"] == IMAGES_OF_SPLIT["test"]
    values = np.load(tmp_path / "test.npy")
    assert np.array_equal(values, before[project.images().lookup(project.keys("vit", "test"))])
    assert project.dump(tmp_path / "text.npy", "text")["rows"] == 4


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a project read or made, by the name of what does it."""
    found: list[str] = []

    def counted(module: Any, name: str) -> Any:
        own = getattr(module, name)
        return lambda *args, **named: (found.append(name), own(*args, **named))[1]

    for name in READERS:
        module = featstore.configured if hasattr(featstore.configured, name) else featstore.project
        monkeypatch.setattr(module, name, counted(module, name))
    return found


def test_nothing_is_read_before_it_is_needed_or_twice(
    settings: dict[str, Any], calls: list[str]
) -> None:
    one = Project(**settings)
    two = one.with_config(dataclasses.replace(one.config))
    repr(two)
    assert calls == []
    assert one.dataset is two.dataset
    assert one.vision_spec is two.vision_spec
    assert one.text_spec(2) is two.text_spec(2)
    assert one.encoder(one.text_spec(2)) is two.encoder(two.text_spec(2))
    for project in (one, two):
        project.extract("text", k_txt=2, show=SILENT)
    assert one.sentences(2) is two.sentences(2)
    assert calls == READERS
    # Other boundaries and number formats take the same encoder, other rows none of it again.
    calls.clear()
    store = dataclasses.replace(one.config.store, dtype="float16")
    other = one.with_config(dataclasses.replace(one.config, store=store))
    assert other.dataset is one.dataset
    assert other.encoder(other.text_spec(1)) is one.encoder(one.text_spec(2))
    assert calls == ["text_spec"]
    data = dataclasses.replace(one.config.data, split_file="")
    assert one.with_config(dataclasses.replace(one.config, data=data)).dataset is not one.dataset
    assert calls == ["text_spec", "load_dataset"]
    # Encoders are forgotten, and nothing else.
    calls.clear()
    other.forget_encoders()
    one.encoder(one.text_spec(2))
    two.sentences(2)
    assert calls == ["load_encoder"]


def test_a_store_that_grew_is_opened_again(
    settings: dict[str, Any], calls: list[str], tmp_path: Path
) -> None:
    project = Project(**settings)
    project.extract(split="val", show=SILENT)
    first = project.images()
    assert len(first) == IMAGES_OF_SPLIT["val"]
    assert project.images() is first
    # By another process, say.
    Project(**settings).extract(show=SILENT)
    second = project.images()
    assert len(second) == PHOTOS
    assert project.images() is second
    # A photo that can no longer be read leaves the shards as they are.
    (tmp_path / "data" / "images" / "photo003.png").write_bytes(b"no photo")
    project.extract(show=SILENT)
    assert project.images().lookup(["photo003"]).tolist() == [-1]
    assert project.usable("train")[1].keys() == {"photo003"}
    assert calls.count("open_features_of") == 3


def test_a_changed_photo_is_extracted_again_by_the_same_project(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    project = Project(**settings)
    project.extract(show=SILENT)
    Image.new("RGB", (9, 9), (1, 2, 3)).save(tmp_path / "data" / "images" / "photo003.png")
    plan, summary = project.extract(show=SILENT)
    assert (plan.keys, plan.changed, summary.extracted) == (["photo003"], 1, 1)


def test_the_configuration_of_a_project_may_be_the_trainers(settings: dict[str, Any]) -> None:
    from trainer.config import Config, TrainConfig

    config = Project(**settings).config
    own = Config(config.data, config.encoders, config.store, TrainConfig(k_txt=0))
    project = Project(own)
    assert project.k_txt == 0
    assert project.text_spec() == Project(config).text_spec(0)
    assert isinstance(Project(config).config, FeatureConfig)
