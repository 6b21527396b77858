"""Runs of version 0.1.0 open for ever: settings, metrics, logits, going on, and training again.

`golden/README.md` says what is kept and how it was made. Training and
extraction must give the old numbers digit for digit with the versions and the
processor they were made with, and closely with others.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_runs import write_data

from featstore.publish import package_versions
from featstore.store.store import TextStore, VisionStore, open_store
from trainer.commands.main import cli
from trainer.run.checkpoint import load_best
from trainer.run.folder import Run

ARCHIVE = Path(__file__).resolve().parent / "golden" / "run.tar.xz"
RUNS = ("finished", "stopped")
# What decides the last digits of a number; the others decide none.
ARITHMETIC = ("tensorflow", "keras", "keras-hub", "numpy")
# Another rounding of every step (`--no-fast-path`) moves the final loss by 6e-6 of itself,
# a dropout of 0.14 instead of 0.15 by 1e-2.
OTHER_ROUNDING = 1e-4
TIMES = {"seconds", "val_seconds", "wait_share"}


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden tree, with photos and with its paths made those of this copy."""
    folder = tmp_path_factory.mktemp("golden")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    tree = folder / "golden"
    write_data(folder / "again")
    (folder / "again" / "images").rename(tree / "images")
    for name in RUNS:
        path = tree / "runs" / name / "config.toml"
        path.write_text(path.read_text().replace('"/golden/', f'"{tree.as_posix()}/'))
    return tree


@pytest.fixture(scope="module")
def finished(golden: Path) -> Run:
    return Run(golden / "runs" / "finished")


@pytest.fixture(scope="module")
def tolerance(golden: Path, finished: Run) -> float:
    """0 with the versions and the processor that made the golden run."""
    versions = finished.manifest["versions"]
    same = all(package_versions()[name] == versions[name] for name in ARITHMETIC)
    recorded = json.loads((golden / "instructions.json").read_text())
    same &= vector_instructions() == recorded and os.environ["TF_ENABLE_ONEDNN_OPTS"] == "0"
    return 0.0 if same else OTHER_ROUNDING


def vector_instructions() -> list[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    flags = text.partition("flags")[2].partition("\n")[0].split()
    return sorted(flag for flag in flags if flag.startswith(("avx", "fma", "amx")))


def command(*args: str | Path) -> dict[str, Any]:
    """Run a command in this process and return the JSON object that it prints."""
    result = CliRunner().invoke(cli, [*map(str, args), "--json"], prog_name="featstore")
    assert result.exit_code == 0, (result.stderr, result.exception)
    return json.loads(result.stdout)


def assert_same_values(found: Any, expected: Any, tolerance: float) -> None:
    """Compare JSON values: all but floats are equal, floats within a relative tolerance."""
    if isinstance(expected, dict):
        assert found.keys() >= expected.keys()
        for key, value in expected.items():
            assert_same_values(found[key], value, tolerance)
    elif isinstance(expected, float) and tolerance:
        assert found == pytest.approx(expected, rel=tolerance)
    else:
        assert found == expected


def history(run: Run) -> list[dict[str, float]]:
    """Return the epochs; columns that there were not yet when a run began are empty."""
    with run.history_path.open(newline="") as file:
        return [
            {key: float(value) for key, value in record.items() if value and key not in TIMES}
            for record in csv.DictReader(file)
        ]


def store_files(golden: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes()
        for path in sorted((golden / "cache").glob("*/*/*"))
        if path.suffix in {".h5", ".json"}
    }


def rows_of(golden: Path, split: str) -> list[dict[str, str]]:
    ids = set(json.loads((golden / "split.json").read_text())[split])
    rows = map(json.loads, (golden / "rows.jsonl").read_text().splitlines())
    return [row for row in rows if row["Image_ID"] in ids]


@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_says_what_it_is(golden: Path, name: str) -> None:
    run = Run(golden / "runs" / name)
    config, manifest, metrics = run.config, run.manifest, run.metrics
    assert (config.train.k_txt, config.train.lr, config.train.epochs) == (2, 1e-3, 3)
    assert config.data.rows == str(golden / "rows.jsonl")
    assert (manifest["name"], manifest["status"]) == (name, name)
    assert manifest["features"]["vision"]["row_shape"] == [16, 16]
    assert metrics["epoch"] == len(history(run)) == (3 if name == "finished" else 1)
    assert metrics["loss"] == history(run)[-1]["val_loss"]


@pytest.mark.parametrize("split", ["val", "test"])
def test_its_best_weights_give_the_old_logits(golden: Path, finished: Run, split: str) -> None:
    features = finished.manifest["features"]
    vision = open_store(golden / "cache" / "vit" / features["vision"]["fingerprint"])
    text = open_store(golden / "cache" / "text" / features["text"]["fingerprint"])
    assert isinstance(vision, VisionStore)
    assert isinstance(text, TextStore)
    rows = rows_of(golden, split)
    positions = text.lookup([row["Hypothesis"] for row in rows])
    hidden, mask = text.gather(positions, int(text.lengths(positions).max()))
    inputs = {
        "features": vision.gather(vision.lookup([row["Image_ID"] for row in rows])),
        "hidden": hidden,
        "padding_mask": mask,
    }
    found = np.asarray(load_best(finished)(inputs, training=False))[:, 0]
    with np.load(golden / "logits.npz") as file:
        expected = file[split]
    assert np.ptp(expected) > 0.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("split", "control"), [("val", "none"), ("test", "none"), ("test", "shuffled-images")]
)
def test_evaluate_gives_the_old_metrics(
    golden: Path, finished: Run, tmp_path: Path, split: str, control: str
) -> None:
    suffix = "" if control == "none" else f"-{control}"
    path = finished.folder / f"evaluate-{split}{suffix}.json"
    expected = json.loads(path.read_text())
    files = store_files(golden)
    run = shutil.copytree(finished.folder, tmp_path / "finished")
    found = command("evaluate", run, "--split", split, "--control", control)
    # Not the versions and the command, which are those of today.
    of_today = {"command", "versions"}
    assert found.keys() | of_today >= expected.keys()
    wanted = {key: value for key, value in expected.items() if key not in of_today}
    assert_same_values(found, wanted, 1e-6)
    assert store_files(golden) == files, "features were extracted again"


@pytest.mark.slow
def test_the_stopped_run_goes_on_to_the_end(
    golden: Path, finished: Run, tmp_path: Path, tolerance: float
) -> None:
    run = Run(Path(shutil.copytree(golden / "runs" / "stopped", tmp_path / "stopped")))
    command("train", "--config", run.config_path, "--runs", tmp_path, "--name", "stopped")
    assert run.manifest["status"] == "finished"
    assert_same_values(run.metrics, finished.metrics, tolerance)
    for found, expected in zip(history(run), history(finished), strict=True):
        assert_same_values(found, expected, tolerance)


@pytest.mark.slow
def test_training_again_gives_the_old_figures(
    golden: Path, finished: Run, tmp_path: Path, tolerance: float
) -> None:
    files = store_files(golden)
    command("train", "--config", finished.config_path, "--runs", tmp_path, "--name", "again")
    again = Run(tmp_path / "again")
    assert_same_values(again.metrics, finished.metrics, tolerance)
    for found, expected in zip(history(again), history(finished), strict=True):
        assert_same_values(found, expected, tolerance)
    for key in ("data", "features", "parameters", "seeds"):
        ours, theirs = again.manifest[key], finished.manifest[key]
        ours, theirs = ({**found, "splits_file": None} for found in (ours, theirs))
        assert_same_values(ours, theirs, 0.0)
    assert store_files(golden) == files, "features were extracted again"


@pytest.mark.slow
def test_extracting_again_gives_the_old_features(
    golden: Path, finished: Run, tmp_path: Path, tolerance: float
) -> None:
    for kind in ("vit", "text"):
        config = ("--config", finished.config_path, "--root", tmp_path)
        command(f"extract-{kind}", *config, "--split", "all")
        (folder,) = (golden / "cache" / kind).iterdir()
        old, new = open_store(folder), open_store(tmp_path / kind / folder.name)
        assert new.spec == old.spec
        assert sorted(new.keys()) == sorted(old.keys())
        for key in old.keys():  # noqa: SIM118
            pair = []
            for store in (old, new):
                position = store.lookup([key])
                if isinstance(store, TextStore):
                    length = int(store.lengths(position)[0])
                    pair.append(store.gather(position, length)[0])
                else:
                    pair.append(store.gather(position))
            np.testing.assert_allclose(pair[1], pair[0], rtol=tolerance, atol=tolerance)
