"""Photometric views: what they change, where they are kept, which one a training row is shown."""

from __future__ import annotations

import dataclasses
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import xxhash
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from test_fit import stop_after
from test_resume import Place, assert_same
from tiny_runs import tiny_config, with_train

import trainer
from benchmarks.views import measure, report
from featstore import api
from featstore.data.views import View
from featstore.encoders.pixels import QuickConverter, compile_converter
from featstore.encoders.presets import resolve_preset
from featstore.encoders.tower import VisionEncoder
from featstore.errors import (
    FeatstoreError,
    MissingFeaturesError,
    StoppedError,
    StoreError,
    UsageError,
)
from featstore.extract import encode
from featstore.extract.actor import _spec_here
from featstore.progress import SILENT
from featstore.project import Project
from featstore.quantities import size
from featstore.store.folder import read_quarantine, shard_paths, write_quarantine
from featstore.store.store import VisionStore
from featstore.store.views import ViewedImages
from trainer.batches import drawn_views
from trainer.commands.main import cli
from trainer.config import Config, render_config
from trainer.features import cached_rows, prepare
from trainer.results.parity import check_parity
from trainer.run.fit import train_together
from trainer.run.folder import Run
from trainer.run.training import Reporter, Training
from trainer.tuning.search_file import jobs_of
from trainer.tuning.space_file import read_space

VIEWS = 3
LEVELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.float32)
CLEAN = dataclasses.replace(View(1), noise=0.0)


@pytest.mark.parametrize("image_id", ["3488087117", "a/photo é", ""])
def test_a_view_changes_a_photo_as_tf_image_does(image_id: str) -> None:
    by, _ = CLEAN.drawn(image_id)
    pixels = tf.image.adjust_brightness(tf.constant(LEVELS / 255), by["brightness"])
    pixels = tf.clip_by_value(tf.image.adjust_contrast(pixels, by["contrast"]), 0, 1)
    pixels = tf.image.adjust_saturation(pixels, by["saturation"])
    pixels = tf.image.adjust_hue(pixels, by["hue"])
    found = CLEAN.changed(LEVELS, image_id)
    np.testing.assert_allclose(found / 255, pixels.numpy(), atol=2e-6)
    assert np.abs(found - LEVELS).max() > 5


def test_what_is_drawn_fills_its_range() -> None:
    view = View(2, seed=7)
    drawn = [view.drawn(str(i))[0] for i in range(400)]
    for name, (low, high) in {
        "brightness": (-0.12, 0.12),
        "contrast": (0.88, 1.12),
        "saturation": (0.85, 1.15),
        "hue": (-0.05, 0.05),
    }.items():
        values = np.array([one[name] for one in drawn])
        assert low <= values.min() < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.1 * (high - low)
    # Each of the four by its own word.
    numbers = np.array([list(one.values()) for one in drawn])
    assert np.abs(np.corrcoef(numbers.T) - np.eye(4)).max() < 0.2


def test_the_noise_is_normal_and_each_number_has_its_own() -> None:
    grey = np.full((64, 64, 3), 128, np.float32)
    noise = (View(1).changed(grey, "a") - CLEAN.changed(grey, "a")) / 255
    assert noise.std() == pytest.approx(0.02, rel=0.02)
    assert abs(noise.mean()) < 0.001
    # Of a normal distribution, within one deviation and within two.
    for deviations, share in ((1, 0.6827), (2, 0.9545)):
        assert (np.abs(noise) < deviations * 0.02).mean() == pytest.approx(share, abs=0.02)
    channels = noise.reshape(-1, 3)
    assert np.abs(np.corrcoef(channels.T) - np.eye(3)).max() < 0.06


def test_a_view_is_never_geometric() -> None:
    order = np.random.default_rng(1).permutation(LEVELS.shape[0] * LEVELS.shape[1])
    moved = LEVELS.reshape(-1, 3)[order].reshape(LEVELS.shape)
    found = CLEAN.changed(LEVELS, "a").reshape(-1, 3)[order].reshape(LEVELS.shape)
    assert np.array_equal(CLEAN.changed(moved, "a"), found)


@given(st.integers(0, 255), st.text(st.characters(codec="utf-8"), max_size=5))
def test_levels_stay_levels_and_grey_stays_grey(level: int, image_id: str) -> None:
    grey = np.full((3, 2, 3), level, np.float32)
    found = View(3).changed(grey, image_id)
    assert found.dtype == np.float32
    assert found.min() >= 0
    assert found.max() <= 255
    clean = CLEAN.changed(grey, image_id)
    assert np.ptp(clean, axis=-1).max() <= 1e-4


def test_a_view_follows_from_seed_image_and_number_alone() -> None:
    """On every machine, with every version: this is what a fingerprint promises."""
    expected = View(1).changed(LEVELS, "a")
    assert xxhash.xxh3_64_hexdigest(expected.tobytes()) == "80e04a1264062bb8"
    before = LEVELS.copy()
    with ThreadPoolExecutor(8) as pool:
        ids = [*map(str, range(20)), *["a"] * 20]
        found = list(pool.map(lambda image_id: View(1).changed(LEVELS, image_id), ids))
    assert all(one.tobytes() == expected.tobytes() for one in found[20:])
    assert np.array_equal(LEVELS, before)
    others = [View(2).changed(LEVELS, "a"), View(1, seed=1).changed(LEVELS, "a"), *found[:20]]
    assert len({one.tobytes() for one in [expected, *others]}) == 23


def test_rules_of_another_version_are_refused() -> None:
    fields = json.loads(json.dumps(View(4, seed=2).to_dict()))
    assert View.of(fields) == View(4, seed=2)
    for wrong in ({**fields, "rule": "v9"}, {**fields, "blur": 1}, {"number": 1}):
        with pytest.raises(StoreError, match="made by another version"):
            View.of(wrong)


def test_pixels_of_a_view_have_the_presets_scale(tiny_vit: Path) -> None:
    converter = VisionEncoder(resolve_preset(str(tiny_vit)), "patches").converter
    photo = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
    quick, chosen = QuickConverter(converter), compile_converter(converter)
    assert isinstance(chosen, QuickConverter)

    def same(levels: np.ndarray) -> np.ndarray:
        assert np.array_equal(levels, np.rint(levels))
        return levels

    assert quick(photo, same).tobytes() == quick(photo).tobytes()
    turned = quick(photo, lambda levels: 255 - levels)
    np.testing.assert_allclose(turned, quick(255 - photo), atol=0.01)
    with pytest.MonkeyPatch.context() as patch:
        # Where the quick way does not have the bits of the plain one.
        patch.setattr(QuickConverter, "_resized", lambda self, photo: np.zeros((32, 96)))
        plain = compile_converter(converter)
    change = View(1).changed
    for given_photo in (photo, photo[:10, :12]):
        expected = quick(given_photo, lambda levels: change(levels, "a"))
        found = plain(given_photo, lambda levels: change(levels, "a"))
        assert found.tobytes() == expected.tobytes()


@pytest.fixture(scope="module")
def place(tiny_vit: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Rows whose photos have three views, those of train and val alone."""
    folder = tmp_path_factory.mktemp("views")
    config = tiny_config(folder / "data", tiny_vit, tiny_text, views=VIEWS, keep_state=True)
    project = Project(config)
    project.extract("vit", "train", show=SILENT)
    project.extract("vit", ("val", "test"), views=1, show=SILENT)
    return Place(config, project, folder / "runs")


def copied(place: Place, folder: Path, **train: Any) -> Config:
    """Return the settings of a project with a copy of the store."""
    shutil.copytree(place.config.store.root, folder / "cache")
    store = dataclasses.replace(place.config.store, root=str(folder / "cache"))
    return with_train(dataclasses.replace(place.config, store=store), **train)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in shard_paths(folder)}


def folder_of(project: Project, view: int) -> Path:
    return project.view_spec(view).folder(project.root)


def test_view_0_is_what_it_was_and_views_are_added(place: Place, tmp_path: Path) -> None:
    store = dataclasses.replace(place.config.store, root=str(tmp_path / "cache"), view_seed=5)
    config = with_train(dataclasses.replace(place.config, store=store), views=1)
    fresh = place.project.with_config(config)
    assert fresh.vision_spec == place.project.vision_spec
    assert "view" not in fresh.vision_spec.to_dict()
    fresh.extract("vit", "train", show=SILENT)
    plain = bytes_of(folder_of(place.project, 0))
    # The other store has shards of val and test beside.
    assert plain.items() >= bytes_of(folder_of(fresh, 0)).items()
    seen = bytes_of(folder_of(fresh, 0))
    plan, summary = fresh.extract("vit", "train", views=2, show=SILENT)
    assert (plan.keys, [len(one.keys) for one, _ in summary.views]) == ([], [0, 32])
    one = bytes_of(folder_of(fresh, 1))
    _, summary = fresh.extract("vit", "train", views=4, show=SILENT)
    assert [done.extracted for _, done in summary.views] == [0, 0, 32, 32]
    assert summary.extracted == 64
    assert bytes_of(folder_of(fresh, 0)) == seen
    assert bytes_of(folder_of(fresh, 1)) == one
    # Another seed is another view.
    assert fresh.view_spec(1).fingerprint != place.project.view_spec(1).fingerprint
    with pytest.raises(UsageError, match="views = 0: expected at least 1"):
        fresh.extract("vit", views=0)


def test_the_features_are_of_the_views_pixels(place: Place) -> None:
    project = place.project
    encoder = project.encoder(project.vision_spec)
    assert project.encoder(project.view_spec(2)) is encoder
    key = project.keys("vit", "train")[7]
    (path,) = project.job("vit", "train").paths_of([key])
    photo = encode.decode_image(path.read_bytes(), path.name)
    for view in range(VIEWS):
        change = (lambda levels, v=view: View(v).changed(levels, key)) if view else None
        expected = encoder.encode(encoder.to_pixels(photo, change)[None])[0]
        np.testing.assert_allclose(project.images(view)[key], expected, atol=1e-5)


def test_a_kill_in_the_middle_of_a_view_costs_nothing(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = dataclasses.replace(place.config.store, root=str(tmp_path / "cache"), shard_rows=8)
    config = with_train(dataclasses.replace(place.config, store=store), views=2)
    # Of the same encoder, loaded and compiled.
    project = place.project.with_config(config)
    last, changed = project.keys("vit", "train")[-1], View.changed

    def killed(self: View, levels: np.ndarray, image_id: str) -> np.ndarray:
        if image_id == last:
            raise KeyboardInterrupt
        return changed(self, levels, image_id)

    monkeypatch.setattr(View, "changed", killed)
    with pytest.raises(KeyboardInterrupt):
        project.extract("vit", "train", show=SILENT)
    monkeypatch.undo()
    begun = bytes_of(folder_of(project, 1))
    assert 0 < len(begun) < 4
    _, summary = project.extract("vit", "train", show=SILENT)
    assert [one.extracted for _, one in summary.views] == [0, 32 - 8 * len(begun)]
    other = dataclasses.replace(store, root=str(tmp_path / "other"))
    whole = project.with_config(dataclasses.replace(config, store=other))
    whole.extract("vit", "train", show=SILENT)
    for view in range(2):
        assert bytes_of(folder_of(project, view)) == bytes_of(folder_of(whole, view))


@given(st.integers(1, 60), st.integers(1, 8), st.integers(0, 2**32), st.integers(0, 99))
def test_the_pick_is_a_pure_function(rows: int, views: int, seed: int, epoch: int) -> None:
    found = drawn_views(rows, views, seed, epoch)
    assert np.array_equal(found, drawn_views(rows, views, seed, epoch))
    assert found.shape == (rows,)
    assert set(found.tolist()) <= set(range(views))


def test_each_epoch_shows_each_row_under_one_of_its_views(place: Place) -> None:
    prepare(place.project, 0, views=VIEWS)
    train = place.config.train
    rows = cached_rows(place.project, train, "train", trained_on=True)
    assert isinstance(rows.vision, ViewedImages)
    stores = [place.project.images(view) for view in range(VIEWS)]
    usable, _ = place.project.usable("train")
    ids = place.project.dataset.examples.image_ids[usable]
    seen = []
    for epoch in range(3):
        picked = drawn_views(len(rows), VIEWS, train.seed, epoch)
        seen.append(picked)
        shown: dict[int, int] = {}
        for step in rows.epoch(16, train.seed, epoch):
            batch = rows.batch(step, 20)
            own = step % len(rows)
            assert np.array_equal(batch.rows, own)
            assert np.array_equal(batch.labels[: len(own)], rows.labels[own])
            rows.will_need(step)
            for i, row in enumerate(own.tolist()):
                expected = stores[picked[row]][ids[row]]
                assert batch.features.values[i].tobytes() == expected.tobytes()
                shown[row] = shown.get(row, 0) + 1
        assert shown == dict.fromkeys(range(len(rows)), 1)
    assert not np.array_equal(seen[0], seen[1])
    counts = np.bincount(np.concatenate(seen), minlength=VIEWS)
    assert counts.min() > 0.25 * counts.sum()
    # All else reads the plain photos.
    for split, options in (("val", {}), ("train", {})):
        plain = cached_rows(place.project, train, split, **options)
        assert isinstance(plain.vision, VisionStore)
        assert plain.vision.folder == folder_of(place.project, 0)


def test_the_control_shows_another_photo_whatever_its_view(place: Place) -> None:
    shuffled = cached_rows(
        place.project, place.config.train, "train", "shuffled-images", trained_on=True
    )
    own = cached_rows(place.project, place.config.train, "train", trained_on=True)
    images = own.image_positions.reshape(VIEWS, -1)
    other = shuffled.image_positions.reshape(VIEWS, -1)
    key_of = {position: i for i, position in enumerate(images[0].tolist())}
    for view in range(VIEWS):
        partner = dict(zip(images[view].tolist(), images[0].tolist(), strict=True))
        assert [partner[p] for p in other[view].tolist()] == other[0].tolist()
    assert not (other[0] == images[0]).any()
    assert set(other[0].tolist()) == set(key_of)


@pytest.fixture(scope="module")
def viewed(place: Place) -> Run:
    return place.train("viewed", epochs=3)


def test_a_run_says_its_views_and_one_view_is_what_it_was(place: Place, viewed: Run) -> None:
    vision = viewed.manifest["features"]["vision"]
    assert vision["views"] == [place.project.view_spec(v).fingerprint for v in range(VIEWS)]
    assert vision["fingerprint"] == vision["views"][0]
    alone = trainer.train(
        place.project.with_config(with_train(place.config, views=1)),
        name="alone",
        runs=place.runs,
        show=SILENT,
        reporter=Reporter(),
        epochs=3,
    )
    assert "views" not in alone.manifest["features"]["vision"]
    losses = [run.history["loss"].tolist() for run in (alone, viewed)]
    assert losses[0] != losses[1]


def test_a_stopped_run_goes_on_to_the_same_numbers(place: Place, viewed: Run) -> None:
    with pytest.raises(StoppedError):
        place.train("stopped", epochs=3, reporter=stop_after(11))
    assert_same(viewed, place.train("stopped", own=True))


@pytest.mark.slow
def test_evaluation_and_parity_need_no_view(place: Place, viewed: Run, tmp_path: Path) -> None:
    measured = viewed.evaluate("val", show=SILENT)
    shutil.copytree(viewed.folder, tmp_path / "runs" / "viewed")
    config = copied(place, tmp_path)
    for view in range(1, VIEWS):
        shutil.rmtree(folder_of(Project(config), view))
    moved = trainer.load_run("viewed", tmp_path / "runs", root=config.store.root)
    assert moved.evaluate("val", show=SILENT)["loss"] == measured["loss"]
    assert check_parity(moved, "val", 4, 0, SILENT)[0]["failure"] is None
    photo = Path(config.data.images) / "photo000.png"
    assert moved.predict_pair(photo, "a dog", SILENT)["label"] in ("entailment", "contradiction")
    # Of features that are not there a run cannot go on.
    with pytest.raises(MissingFeaturesError, match="view 1 of the photos was never extracted"):
        trainer.train(moved, epochs=4, show=SILENT, reporter=Reporter())


def invoke(*args: object) -> Any:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def answered(*args: object) -> dict[str, Any]:
    return dict(json.loads(invoke(*args, "--json").stdout.splitlines()[-1]))


@pytest.mark.slow
def test_the_commands(place: Place, tmp_path: Path) -> None:
    store = dataclasses.replace(place.config.store, root=str(tmp_path / "cache"))
    config = with_train(dataclasses.replace(place.config, store=store), views=1, epochs=1)
    file = tmp_path / "featstore.toml"
    file.write_text(render_config(config))
    at = ("--config", file)
    planned = answered("extract-vit", "--views", 3, "--dry-run", *at)
    photos = 56
    row_bytes = 16 * 16 * 4
    assert (planned["todo"], planned["todo_bytes"]) == (3 * photos, 3 * photos * row_bytes)
    assert [one["todo_bytes"] for one in planned["views"]] == [photos * row_bytes] * 3
    assert [one["view"] for one in planned["views"]] == [0, 1, 2]
    shown = invoke("extract-vit", "--views", 3, "--dry-run", *at).stdout
    assert f"3 views: 168 rows to do, {size(168 * row_bytes)} of" in shown
    assert not (tmp_path / "cache" / "vit").exists()
    assert "views" not in answered("extract-vit", *at)
    # What is missing is said with the command that brings it.
    failed = answered("train", "--views", 3, "--name", "a", "--runs", tmp_path / "runs", *at)
    assert "view 1 of the photos was never extracted" in failed["error"]["message"]
    (line,) = failed["error"]["commands"]
    assert "extract-vit --views 3 --split train" in line
    done = answered("extract-vit", "--views", 3, "--split", "train", *at)
    assert [one["extracted"] for one in done["views"]] == [0, 32, 32]
    assert done["extracted"] == 64
    extracted = answered(
        "train", "--views", 4, "--extract", "--name", "b", "--runs", tmp_path / "runs", *at
    )
    assert extracted["ok"], extracted
    project = Project(config)
    assert len(project.images(3)) == 32
    info = answered("store", "info", "--views", 4, *at)
    under = [info["coverage"][split]["images_under_all_views"] for split in ("train", "val")]
    assert under == [32, 0]
    found = info["features"]
    views = {f["view"] and f["view"]["number"]: f["asked_for"] for f in found if f["kind"] == "vit"}
    assert views == {None: True, 1: True, 2: True, 3: True}
    assert "photometric view 3 of seed 0" in invoke("store", "info", *at).stdout


def test_the_care_of_a_view(place: Place, viewed: Run, tmp_path: Path) -> None:
    config = copied(place, tmp_path, views=1)
    project = api.Project(config)
    folder = folder_of(project, 2)
    path = shard_paths(folder)[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert [r.folder for r in project.verify(show=SILENT) if r.problems] == [folder]
    assert not any(report.problems for report in project.verify(mine=True, show=SILENT))
    (mended,) = [r for r in project.repair(show=SILENT) if r.actions]
    assert (mended.folder, mended.restored, mended.left) == (folder, 1, [])
    keys = project.keys("vit", "train")
    before = place.project.images(2).gather(keys)
    np.testing.assert_allclose(project.images(2).gather(keys), before, atol=1e-5)
    # A run's views are needed, whatever the configuration asks for; others are not.
    runs = tmp_path / "runs"
    shutil.copytree(viewed.folder, runs / "viewed")
    everyone = {"unrecorded": True, "forget": users_of(project)}
    viewing = api.Project(with_train(config, views=VIEWS))
    views = {folder_of(project, view) for view in (1, 2)}
    for asking, place_of_runs, expected in (
        (project, runs, set()),
        (viewing, tmp_path / "none", set()),
        (project, tmp_path / "none", views),
    ):
        found = asking.garbage(place_of_runs, **everyone)
        assert {i.path for i in found.garbage if i.what == "features"} & views == expected


def users_of(project: api.Project) -> list[str]:
    return [user["path"] for user in project.garbage("nowhere").users]


def test_a_photo_that_changed_is_refused_under_each_view(place: Place, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(place.config.data.images, images)
    config = copied(place, tmp_path)
    data = dataclasses.replace(config.data, images=str(images))
    project = api.Project(dataclasses.replace(config, data=data))
    photo = images / "photo001.png"
    shutil.copy(images / "photo000.png", photo)
    project.extract("vit", "train", views=1, show=SILENT)
    with pytest.raises(FeatstoreError, match=f"{folder_of(project, 1)}: 1 photo of split 'train'"):
        prepare(project, 0, views=VIEWS)
    (report,) = [
        r for r in project.verify(photos=True, show=SILENT) if r.folder == folder_of(project, 2)
    ]
    assert "featstore extract-vit" in str(report.problems[0].mend)
    project.extract("vit", "train", show=SILENT)
    prepare(project, 0, views=VIEWS)


def test_a_row_that_one_view_lacks_is_left_out(place: Place, tmp_path: Path) -> None:
    project = Project(copied(place, tmp_path))
    folder = folder_of(project, 1)
    key = project.keys("vit", "train")[3]
    position = project.images(1).lookup([key])
    digest = project.images(1).source_digests(position)[0].tolist()
    entry = {"reason": "features do not fit", "source_digest": digest}
    write_quarantine(folder, {**read_quarantine(folder), key: entry})
    project = Project(project.config)
    rows, reasons = project.usable("train", VIEWS)
    assert (len(rows), reasons) == (31 * 4, {key: "features do not fit"})
    assert len(project.usable("train")[0]) == 32 * 4
    prepare(project, 0, views=VIEWS)
    training = Training(Run(tmp_path / "run"), project, project.config.train)
    assert training.manifest["data"]["counts"]["train"]["rows"] == 31 * 4


@pytest.mark.slow
def test_other_number_formats_and_blocks(place: Place, tmp_path: Path) -> None:
    store = dataclasses.replace(place.config.store, root=str(tmp_path / "cache"), dtype="int8")
    config = with_train(dataclasses.replace(place.config, store=store), views=2, k_vit=1, epochs=1)
    run = trainer.train(
        Project(config),
        extract=True,
        name="run",
        runs=tmp_path / "runs",
        show=SILENT,
        reporter=Reporter(),
    )
    project = Project(config)
    spec = project.view_spec(1)
    assert (spec.boundary, spec.tokens, spec.dtype) == (1, "all", "int8")
    assert run.manifest["features"]["vision"]["views"][1] == spec.fingerprint
    keys = project.keys("vit", "train")
    viewed = ViewedImages([project.images(view) for view in range(2)])
    positions = viewed.lookup(keys)
    mixed = positions.reshape(2, -1).T.reshape(-1)[::-1].copy()
    found = viewed.gather_stored(mixed).plain()
    for i, (key, view) in enumerate((key, view) for key in keys[::-1] for view in (1, 0)):
        assert found[i].tobytes() == project.images(view)[key].tobytes()


def test_a_node_of_a_cluster_makes_the_same_view(place: Place) -> None:
    job = place.project.job("vit", "train", view=2)
    assert _spec_here(job) == job.spec


def test_runs_of_other_views_are_not_trained_together(place: Place) -> None:
    prepare(place.project, 0, views=VIEWS)
    trainings = [
        Training(Run(place.runs / f"t{v}"), place.project, with_train(place.config, views=v).train)
        for v in (VIEWS, 1)
    ]
    with pytest.raises(UsageError, match=r"\[train\] views is 1 and 3"):
        train_together(trainings)


def test_a_search_may_vary_the_views(place: Place) -> None:
    space = read_space(
        {"train": {"views": {"choice": [1, VIEWS]}, "lr": {"uniform": [1e-4, 1e-3]}}}, {}, {}, False
    )
    base = space.base(place.config)
    jobs = jobs_of(place.project, space.feature_configs(base))
    views = [job.spec.view.get("number", 0) for job in jobs if job.spec.kind == "vit"]
    assert views == list(range(VIEWS))
    assert {len(job.keys) for job in jobs if job.spec.kind == "vit" and job.spec.view} == {32}


@pytest.mark.slow
def test_the_comparison_measures_what_it_says(place: Place, tmp_path: Path) -> None:
    project = place.project.with_config(with_train(place.config, views=1))
    settings = vars(dataclasses.replace(place.config.train, epochs=2))
    del settings["views"], settings["seed"]
    found = measure(project, tmp_path, (1, 2), (0,), **settings)
    (one,), (two,) = (found["views"][number]["runs"] for number in ("1", "2"))
    assert (one["epochs"], two["epochs"]) == (2, 2)
    figures = found["views"]["2"]
    assert figures["gap"]["mean"] == pytest.approx(two["val_loss"] - two["train_loss"])
    change = figures["gap"]["mean"] - found["views"]["1"]["gap"]["mean"]
    assert figures["gap_change"]["mean"] == pytest.approx(change)
    metrics = trainer.load_run("v2-s0", tmp_path).metrics
    assert two["val_loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    assert two["macro_f1"] == pytest.approx(metrics["at_threshold"]["macro_f1"])
    interval = figures["macro_f1"]["interval"]
    assert interval["low"] <= two["macro_f1"] <= interval["high"]
    assert found["photos"] == {"train": 32, "val": 12}
    text = report({"rows.jsonl": json.loads(json.dumps(found))})
    assert text.startswith("rows.jsonl: train 128 rows, 32 photos, val 48 rows, 12 photos; seeds 0")
    assert len(text.splitlines()) == 6
    # What is there already is only measured.
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("best.weights.h5")}
    assert measure(project, tmp_path, (1, 2), (0,), **settings)["views"] == found["views"]
    assert {path: path.stat().st_mtime_ns for path in times} == times
