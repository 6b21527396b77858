"""Features on the device: the same run as from the host, and only where there is room."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from on_jax import run_on_jax
from PIL import Image, ImageOps
from test_fit import assert_same_run
from tiny_runs import tiny_config, with_train

from featstore.errors import RunError
from featstore.progress import SILENT
from featstore.project import Project
from featstore.store.store import VisionStore
from trainer import resident
from trainer.batches import NoPhotos
from trainer.config import Config, render_config
from trainer.features import cached_rows, prepare
from trainer.resident import OnDevice
from trainer.run.fit import fit
from trainer.run.folder import Run
from trainer.run.training import Training


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_vit: Path, tiny_text: Path) -> Config:
    folder = tmp_path_factory.mktemp("resident")
    config = tiny_config(folder / "data", tiny_vit, tiny_text, views=2, keep_state=True)
    for dtype in ("float16", "int8", "bfloat16"):
        own = with_store(config, dtype)
        Project(own).extract("vit", views=2, show=SILENT)
    return with_store(config, "float16")


def with_store(config: Config, dtype: str) -> Config:
    return dataclasses.replace(config, store=dataclasses.replace(config.store, dtype=dtype))


def run(config: Config, project: Project, folder: Path, **settings: Any) -> Run:
    train = with_train(config, **settings).train
    prepare(project, train.k_txt, views=train.views)
    training = Training(Run(folder), project, train)
    fit(training)
    return training.run


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        ("float16", {}),
        ("float16", {"views": 1, "k_txt": 1, "k_vit": 0}),
        ("int8", {}),
        ("bfloat16", {"control": "shuffled-images"}),
        ("int8", {"control": "hypothesis-only"}),
    ],
)
def test_a_run_is_the_same_wherever_its_features_are(
    config: Config,
    tmp_path: Path,
    dtype: str,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Some chunks, of which the last overlaps.
    monkeypatch.setattr(resident, "CHUNK_BYTES", 5 * 16 * 16 * 2)
    config = with_store(config, dtype)
    project = Project(config)
    host = run(config, project, tmp_path / "host", features_on="host", **settings)
    device = run(config, project, tmp_path / "device", features_on="device", **settings)
    assert [r.manifest["features_on"] for r in (host, device)] == ["host", "device"]
    assert_same_run(host, device)


def test_runs_of_a_process_share_what_is_on_the_device(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Project(config)
    run(config, project, tmp_path / "first", features_on="device", epochs=1)
    there = project.once("features on the device", dict)
    first = dict(there)
    assert len(first) == 2
    # What is there already is used wherever features are to be, unless it is the host.
    run(config, project, tmp_path / "second", features_on="auto", epochs=1)
    assert there == first
    run(config, project, tmp_path / "plain", features_on="device", views=1, epochs=1)
    assert len(there) == 2
    assert not {*there} & {*first}
    monkeypatch.setattr(OnDevice, "has", lambda self, vision, positions: False)
    last = dict(there)
    run(config, project, tmp_path / "fewer", features_on="device", views=1, epochs=1)
    assert there.keys() == last.keys()
    assert there != last


def test_features_that_were_extracted_anew_are_put_there_anew(
    config: Config, tmp_path: Path
) -> None:
    images = shutil.copytree(config.data.images, tmp_path / "images")
    data = dataclasses.replace(config.data, images=str(images))
    store = dataclasses.replace(config.store, root=str(tmp_path / "cache"))
    project = Project(dataclasses.replace(config, data=data, store=store))
    project.extract("vit", show=SILENT)
    settings = {"epochs": 1, "views": 1}
    run(project.config, project, tmp_path / "before", features_on="device", **settings)
    for photo in images.iterdir():
        ImageOps.invert(Image.open(photo)).save(photo)
    shutil.rmtree(project.images().folder)
    project.forget_photos()
    project.extract("vit", show=SILENT)
    host = run(project.config, project, tmp_path / "host", features_on="host", **settings)
    device = run(project.config, project, tmp_path / "device", features_on="device", **settings)
    assert_same_run(host, device)


def test_auto_asks_for_twice_the_room(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    project = Project(config)
    prepare(project, 0)
    rows = cached_rows(project, config.train, "val")
    need = 12 * 16 * 16 * 2
    assert resident.device_bytes(rows.vision, rows.image_positions) == need
    for free, expected in ((None, "host"), (2 * need - 1, "host"), (2 * need, "device")):
        monkeypatch.setattr(resident, "free_bytes", lambda free=free: free)
        rows = cached_rows(project, config.train, "val")
        assert resident.put_features(project, "auto", {"val": rows}) == expected
        assert isinstance(rows.vision, OnDevice if expected == "device" else VisionStore)


def test_a_tensorflow_device_is_not_asked_for_its_memory() -> None:
    assert resident.free_bytes() is None


def test_features_that_do_not_fit_are_one_line(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> Any:
        raise tf.errors.ResourceExhaustedError(None, None, "failed to allocate memory")

    monkeypatch.setattr(resident, "_tensorflow_tables", full)
    with pytest.raises(RunError, match=r"64 images do not fit .* set \[train\] features_on ="):
        run(config, Project(config), tmp_path / "big", features_on="device")
    # What nobody asked for ends no run: another process may have taken the memory meanwhile.
    monkeypatch.setattr(resident, "free_bytes", lambda: 1 << 40)
    done = run(config, Project(config), tmp_path / "auto", features_on="auto", epochs=1)
    assert done.manifest["features_on"] == "host"


def test_without_the_picture_one_row_of_zeros_is_enough(config: Config) -> None:
    project = Project(config)
    prepare(project, 0)
    rows = cached_rows(project, config.train, "val", "hypothesis-only")
    assert isinstance(rows.vision, NoPhotos)
    assert resident.device_bytes(rows.vision, rows.image_positions) == 16 * 16 * 2
    found = OnDevice(rows.vision, rows.image_positions).gather_stored(rows.image_positions[:7])
    assert found.shape == (7, 16, 16)
    assert not np.asarray(found.values).any()


JAX = """
import sys
from pathlib import Path
import numpy as np
from featstore.project import Project
from test_fit import history
from test_resident import run
from trainer import resident
from trainer.config import load_config

config = load_config(sys.argv[1])
project, folder = Project(config), Path(sys.argv[2])
assert resident.free_bytes() is None
places = ("host", "device")
runs = {where: run(config, project, folder / where, features_on=where) for where in places}
assert history(runs["host"]) == history(runs["device"])
with np.load(runs["host"].checkpoint_path) as a, np.load(runs["device"].checkpoint_path) as b:
    assert all(a[name].tobytes() == b[name].tobytes() for name in a.files if name != "progress")
print(runs["device"].manifest["features_on"])
"""


@pytest.mark.slow
def test_a_run_on_jax_is_the_same_wherever_its_features_are(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "featstore.toml"
    path.write_text(render_config(with_store(config, "int8")))
    assert run_on_jax("-c", JAX, str(path), str(tmp_path)).endswith("device\n")
