"""`parity` agrees where both paths are one model, and finds whatever makes them two."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image
from tiny_runs import IMAGES_OF_SPLIT, SENTENCES, prepared, tiny_config

import trainer.results.models
from featstore.errors import RunError
from featstore.quantities import share
from featstore.store.folder import read_spec, reconcile_manifest, shard_paths, write_manifest
from featstore.store.numbers import Numbers, feature_dtype
from featstore.store.shard import open_shard
from featstore.store.write import ShardRows, write_shard
from trainer.commands.main import cli
from trainer.logits import sigmoid
from trainer.model.weights import trained_weights, transfer_weights
from trainer.results.parity import check_parity
from trainer.results.score import project_of
from trainer.results.tolerance import feature_tolerance
from trainer.run.fit import fit
from trainer.run.folder import Run
from trainer.run.training import Training

ROWS = IMAGES_OF_SPLIT["test"] * len(SENTENCES)


def make_run(folder: Path, vit: Path, text: Path, store: dict[str, Any], **train: Any) -> Run:
    config = tiny_config(folder / "data", vit, text, **{"epochs": 1, **train})
    config = dataclasses.replace(config, store=dataclasses.replace(config.store, **store))
    fit(Training(Run(folder / "runs" / "first"), prepared(config), config.train))
    return Run(folder / "runs" / "first")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_vit: Path, tiny_text: Path) -> Path:
    """Folder of a run, its data and its store, which no test changes."""
    folder = tmp_path_factory.mktemp("parity") / "whole"
    make_run(folder, tiny_vit, tiny_text, {}, k_txt=1)
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Run:
    """A copy of it that a test may damage."""
    folder = shutil.copytree(whole, tmp_path / "copy")
    copy = Run(folder / "runs" / "first")
    settings = copy.config_path.read_text()
    copy.config_path.write_text(settings.replace(str(whole), str(folder)))
    return copy


def measure(run: Run, split: str, count: int, seed: int = 0) -> dict[str, Any]:
    result, failure = check_parity(run, split, count, seed)
    assert result["failure"] == (None if failure is None else str(failure))
    return result


def photo(run: Run, image_id: str) -> Path:
    return Path(run.config.data.images) / f"{image_id}.png"


def drawn_ids(count: int, seed: int, first: int = 44) -> list[str]:
    """Image ids of the test split of `tiny_runs`, in the order in which rows are drawn."""
    picks = np.random.default_rng(seed).permutation(ROWS)[:count]
    return [f"photo{first + pick // len(SENTENCES):03d}" for pick in picks]


def rewrite(run: Run, kind: str, change: Callable[[ShardRows], None]) -> None:
    """Write the shards of a kind again with other content, every checksum valid."""
    folders = list((Path(run.config.store.root) / kind).iterdir())
    assert len(folders) == 1
    for path in shard_paths(folders[0]):
        spec = read_spec(folders[0])
        shard = open_shard(path, kind, folders[0].name, spec["dtype"])
        rows = ShardRows(shard.keys(), shard.features.copy())
        if kind == "vit":
            rows.source_digests = [tuple(pair) for pair in shard.index["source_digests"].tolist()]
        else:
            rows.offsets, rows.token_ids = shard.index["offsets"], shard.index["token_ids"]
        change(rows)
        path.unlink()
        write_shard(path, kind, folders[0].name, spec["dtype"], rows, shard.versions)
    write_manifest(folders[0], folders[0].name, reconcile_manifest(folders[0]))


def assert_sound_by_its_checksums(run: Run) -> None:
    project = project_of(run)
    for store in (project.images(), project.sentences()):
        assert all(shard.row_is_intact(row) for shard in store.shards for row in range(len(shard)))


@pytest.mark.slow
def test_a_run_equals_the_end_to_end_model(run: Run) -> None:
    done = CliRunner().invoke(cli, ["parity", str(run.folder), "--rows", "1000"])
    assert done.exit_code == 0, (done.stderr, done.exception)
    result = json.loads((run.folder / "parity-test.json").read_text())
    assert result["command"]
    assert result["versions"]
    assert result["failure"] is None
    assert result["rows"] == result["rows_of_split"] == ROWS
    quantities = result["quantities"]
    assert quantities.keys() == {"vision_features", "text_hidden_states", "logits"}
    assert all(figures["met"] for figures in quantities.values())
    assert 0 < quantities["logits"]["largest"] < 1e-5
    assert result["predictions"] == []
    assert result["metrics"]["cached"] == result["metrics"]["end_to_end"]
    assert result["recorded_loss"]["found"] == pytest.approx(run.metrics["loss"], abs=1e-5)
    assert result["photos"] == {"changed": [], "unreadable": {}}
    accuracy = f"accuracy {share(result['metrics']['cached']['accuracy'], 2)}"
    for words in (f"test: {ROWS} of {ROWS} rows", "vision features", "0 differ", accuracy):
        assert words in done.stdout
    assert "NO" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("store", "train", "notes"),
    [
        ({"dtype": "float16", "tokens": "all"}, {"k_txt": 0}, 0),
        ({"dtype": "bfloat16"}, {"k_txt": 4, "dtype_policy": "mixed_bfloat16"}, 1),
        ({"dtype": "float16", "precision": "bfloat16"}, {"k_txt": 2}, 1),
    ],
)
def test_other_number_formats_agree_within_their_rounding(
    tmp_path: Path,
    tiny_vit: Path,
    tiny_text: Path,
    store: dict[str, Any],
    train: dict[str, Any],
    notes: int,
) -> None:
    result = measure(make_run(tmp_path, tiny_vit, tiny_text, store, **train), "val", 20)
    assert result["failure"] is None
    assert result["rows"] == 20
    # The rounding is seen, and is all that there is.
    assert result["quantities"]["vision_features"]["largest"] > 1e-4
    assert len(result["notes"]) == notes


def test_the_seed_decides_the_rows_and_every_changed_photo_is_named(run: Run) -> None:
    for number in range(44, 56):
        path = photo(run, f"photo{number:03d}")
        path.write_bytes(path.read_bytes() + b" ")
    result = measure(run, "test", 6, seed=1)
    drawn = set(drawn_ids(6, seed=1))
    assert drawn != set(drawn_ids(6, seed=0))
    assert result["photos"]["changed"] == sorted(drawn)
    # Other bytes, the same picture: what is stored is still right, but is not of this file.
    assert result["quantities"]["vision_features"]["met"]
    assert f"{len(drawn)} of the photos drawn changed" in result["failure"]


def shift(rows: ShardRows) -> None:
    rows.features = Numbers(np.roll(rows.features.values, 1, axis=0))


def test_features_stored_under_the_next_key_are_found(run: Run) -> None:
    rewrite(run, "vit", shift)
    assert_sound_by_its_checksums(run)
    done = CliRunner().invoke(cli, ["parity", str(run.folder), "--rows", "16", "--json"])
    assert done.exit_code == 1
    result = json.loads(done.stdout)
    figures = result["quantities"]["vision_features"]
    assert not figures["met"]
    assert figures["rows_beyond"] == 16
    assert not result["quantities"]["logits"]["met"]
    assert result["quantities"]["text_hidden_states"]["met"]
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: ")
    for words in (
        "vision features",
        "16 of 16 rows",
        repr(figures["worst"]["image_id"]),
        repr(figures["worst"]["hypothesis"]),
        f"expected {figures['worst']['expected']:.6g}",
        f"found {figures['worst']['found']:.6g}",
        "store verify",
        "extract-vit --split test",
    ):
        assert words in error


def test_sentences_stored_under_the_next_key_are_found(run: Run) -> None:
    def shift_sentences(rows: ShardRows) -> None:
        rows.keys = [*rows.keys[1:], rows.keys[0]]

    rewrite(run, "text", shift_sentences)
    assert_sound_by_its_checksums(run)
    result = measure(run, "test", 16)
    assert result["quantities"]["vision_features"]["met"]
    assert result["quantities"]["text_hidden_states"]["rows_beyond"] == 16
    assert "text hidden states" in result["failure"]
    assert "extract-text --split test --k-txt 1" in result["failure"]


def test_numbers_that_no_encoder_gives_are_found(run: Run) -> None:
    values = itertools.cycle([np.nan, np.inf, 1e30])

    def spoil(rows: ShardRows) -> None:
        for row in range(len(rows.keys)):
            rows.features.values[row, 0, 3, 5] = next(values)

    rewrite(run, "vit", spoil)
    result = measure(run, "test", 1000)
    assert result["quantities"]["vision_features"]["rows_beyond"] == ROWS
    assert "vision features" in result["failure"]
    assert result["metrics"]["cached"] is None
    assert json.dumps(result, allow_nan=False)


def test_a_photo_edited_after_extraction_is_named(run: Run) -> None:
    pixels = np.asarray(Image.open(photo(run, "photo047")))
    Image.fromarray(pixels[::-1]).save(photo(run, "photo047"))
    result = measure(run, "test", 1000)
    assert result["photos"]["changed"] == ["photo047"]
    assert result["quantities"]["vision_features"]["rows_beyond"] == len(SENTENCES)
    assert "1 of the photos drawn changed" in result["failure"]
    assert "'photo047'" in result["failure"]
    assert "extract-vit --split test" in result["failure"]


def test_a_photo_that_cannot_be_read_any_more_is_named_and_left_out(run: Run) -> None:
    photo(run, "photo047").write_bytes(b"no photo")
    result = measure(run, "test", 1000)
    assert result["photos"]["unreadable"].keys() == {"photo047"}
    assert result["rows"] == ROWS - len(SENTENCES)
    assert all(figures["met"] for figures in result["quantities"].values())
    assert "'photo047'" in result["failure"]
    for number in range(44, 56):
        photo(run, f"photo{number:03d}").write_bytes(b"no photo")
    with pytest.raises(RunError, match=r"none of the photos drawn .*'photo0"):
        measure(run, "test", 8)


def test_a_photo_that_is_gone_is_named(run: Run) -> None:
    photo(run, "photo047").unlink()
    photo(run, "photo003").unlink()
    with pytest.raises(RunError, match=r"2 photos gone .*'photo003', 'photo047'.* put them"):
        measure(run, "test", 4)


def test_rows_that_changed_are_still_refused(run: Run) -> None:
    path = Path(str(run.config.data.rows))
    path.write_text(path.read_text() + path.read_text().splitlines()[0].replace("dog", "cat"))
    with pytest.raises(RunError, match="the rows changed"):
        measure(run, "test", 4)


@pytest.mark.slow
def test_the_weights_of_another_run_are_found(
    run: Run, tmp_path: Path, tiny_vit: Path, tiny_text: Path
) -> None:
    other = make_run(tmp_path / "other", tiny_vit, tiny_text, {}, k_txt=1, seed=7)
    shutil.copyfile(other.weights_path, run.weights_path)
    result = measure(run, "test", 16)
    assert all(figures["met"] for figures in result["quantities"].values())
    assert not result["recorded_loss"]["met"]
    assert "weights of another run" in result["failure"]


def test_val_features_that_changed_are_found_from_any_split(run: Run) -> None:
    def blank(rows: ShardRows) -> None:
        for row, key in enumerate(rows.keys):
            if "photo032" <= key < "photo044":
                rows.features.values[row] = 0

    rewrite(run, "vit", blank)
    result = measure(run, "test", 16)
    assert all(figures["met"] for figures in result["quantities"].values())
    assert "val features changed" in result["failure"]


def test_models_that_differ_are_found(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy of the weights is made wrong: no damage to files sets the two models apart."""

    def transfer(source: Any, target: Any) -> None:
        transfer_weights(source, target)
        bias = trained_weights(target)["logit/bias"]
        bias.assign(np.asarray(bias) + 3e-4)

    monkeypatch.setattr(trainer.results.models, "transfer_weights", transfer)
    result = measure(run, "test", 16)
    assert result["quantities"]["vision_features"]["met"]
    assert result["quantities"]["logits"]["largest"] == pytest.approx(3e-4, rel=0.1)
    assert "logits of the cached and the end-to-end model differ in 16 of 16" in result["failure"]


@pytest.mark.slow
def test_a_prediction_on_the_threshold_is_listed_and_is_no_failure(run: Run) -> None:
    worst = measure(run, "test", 1000)["quantities"]["logits"]["worst"]
    between = (worst["expected"] + worst["found"]) / 2
    metrics = {**run.metrics, "threshold": float(sigmoid(between))}
    run.metrics_path.write_text(json.dumps(metrics))
    result = measure(run, "test", 1000)
    assert result["failure"] is None
    listed = {(row["image_id"], row["hypothesis"]): row for row in result["predictions"]}
    row = listed[worst["image_id"], worst["hypothesis"]]
    assert row["within_tolerance"]
    assert row["threshold_logit"] == pytest.approx(between, abs=1e-6)
    assert result["metrics"]["cached"] != result["metrics"]["end_to_end"]


def test_a_control_is_refused(run: Run) -> None:
    config = run.config
    blind = dataclasses.replace(config.train, control="hypothesis-only")
    run.write_config(dataclasses.replace(config, train=blind))
    with pytest.raises(RunError, match="control hypothesis-only"):
        measure(run, "test", 4)


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["absent"], 1, "no such run"),
        (["absent", "--rows", "0"], 2, "--rows"),
        (["absent", "--seed", "-1"], 2, "--seed"),
    ],
)
def test_usage(args: list[str], code: int, words: str) -> None:
    done = CliRunner().invoke(cli, ["parity", *args])
    assert done.exit_code == code
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_tolerance_is_the_rounding_and_a_little(dtype: str) -> None:
    rng = np.random.default_rng(0)
    # Every binade that float16 has, its subnormal numbers and zero among them.
    fresh: NDArray[np.float64] = rng.uniform(-1, 1, (40, 50, 20))
    fresh *= np.exp2(rng.integers(-26, 15, (40, 1, 1)))
    fresh[0] = 0
    stored = fresh.astype(feature_dtype(dtype))
    error = np.abs(stored.astype(np.float64) - fresh)
    tolerance = feature_tolerance(Numbers(stored), np.zeros_like(fresh), "float32")
    assert (error <= tolerance).all()
    spacing = np.spacing(np.abs(stored)).astype(np.float64)
    np.testing.assert_array_equal(tolerance, spacing / 2)
    noisy = feature_tolerance(Numbers(stored), fresh, "float32") - tolerance
    assert (noisy <= 1.01e-4 * np.abs(fresh).max(axis=(1, 2), keepdims=True)).all()
