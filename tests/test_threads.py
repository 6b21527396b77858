"""How many threads compute a step: one where it is small, and the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import featstore.config
import trainer.commands.train
import trainer.model.sizes
import trainer.run.manifest
from featstore.encoders import framework
from featstore.encoders.framework import INTRAOP_THREADS
from tests.tiny_runs import prepared, tiny_config, with_train
from trainer.commands.main import cli
from trainer.config import Config, render_config
from trainer.model.sizes import SMALL_STEP, SMALL_STEP_OF_MANY, step_threads
from trainer.run.folder import Run
from trainer.tuning import workers
from trainer.tuning.search_file import start_search
from trainer.tuning.space_file import read_space

ROOT = Path(__file__).resolve().parent.parent
# Of the tiny encoders.
WIDTH = 16


@pytest.fixture(scope="module")
def work(tiny_vit: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("threads")
    config = tiny_config(folder, tiny_vit, tiny_text)
    prepared(config)
    (folder / "featstore.toml").write_text(render_config(config))
    return config


def folder_of(config: Config) -> Path:
    return Path(config.data.rows).parent


@pytest.mark.parametrize(
    ("cores", "most"), [(1, SMALL_STEP), (2, SMALL_STEP), (3, SMALL_STEP_OF_MANY)]
)
def test_a_small_step_has_one(
    work: Config, monkeypatch: pytest.MonkeyPatch, cores: int, most: int
) -> None:
    monkeypatch.setattr(trainer.model.sizes, "usable_cores", lambda: cores)
    assert step_threads(work) == 1
    assert step_threads(work, most // WIDTH) == 1
    assert step_threads(work, most // WIDTH + 1) == 0
    assert step_threads(with_train(work, batch_size=most)) == 0
    assert step_threads(with_train(work, k_vit=1)) == 0


def test_a_preset_that_is_missing_is_for_others_to_name(work: Config, tmp_path: Path) -> None:
    encoders = featstore.config.EncodersConfig(vit=str(tmp_path / "none"), text=work.encoders.text)
    missing = Config(work.data, encoders, work.store, work.train, work.track)
    assert step_threads(missing) == 0


@pytest.mark.parametrize(
    ("flags", "expected"),
    [((), [(1,)]), (("--batch-size", "4096"), [(0,)]), (("--extract",), [(0,)])],
)
def test_train_limits_them(
    work: Config, monkeypatch: pytest.MonkeyPatch, flags: Any, expected: Any
) -> None:
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(framework, "limit_threads", lambda *given: asked.append(given))
    monkeypatch.setattr(trainer.run.manifest, "threads_of_operation", lambda: asked[-1][0])
    folder = folder_of(work)
    where = ("--config", str(folder / "featstore.toml"), "--runs", str(folder / "runs"))
    name = f"n{len(flags)}{len(expected)}"
    done = CliRunner().invoke(cli, ["train", *where, "--name", name, "--epochs", "1", *flags])
    assert done.exit_code == 0, done.output
    assert asked == expected
    if expected == [(1,)]:
        # Sentences are encoded by all.
        monkeypatch.setattr(trainer.commands.train, "FEW_SENTENCES", -1)
        asked.clear()
        done = CliRunner().invoke(cli, ["train", *where, "--name", "many", "--epochs", "1"])
        assert (done.exit_code, asked) == (0, [(0,)])
    # A run that goes on has what it had, an older one what its own settings say.
    run = Run(folder / "runs" / name)
    assert run.manifest["threads"] == expected[0][0]
    older = {key: value for key, value in run.manifest.items() if key != "threads"}
    for manifest, again in (
        ({**older, "threads": 7}, [(7,)]),
        (older, [(1,)] if flags == ("--extract",) else expected),
    ):
        asked.clear()
        run.write_manifest(manifest)
        goes_on = ["train", "--name", name, "--runs", str(run.folder.parent), "--epochs", "1"]
        CliRunner().invoke(cli, goes_on)
        assert asked == again


@pytest.mark.slow
def test_what_trains_the_control_limits_them(work: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(framework, "limit_threads", lambda *given: asked.append(given))
    folder = folder_of(work)
    where = ("--runs", str(folder / "runs"))
    settings = ("--config", str(folder / "featstore.toml"), "--epochs", "1")
    commands = (
        ("train", "--name", "seen", *settings, *where),
        ("evaluate", "seen", "--with-controls", "--split", "val", *where),
        ("evaluate", "seen", "--split", "val", *where),
    )
    for command in commands:
        done = CliRunner().invoke(cli, list(command))
        assert done.exit_code == 0, done.output
    assert asked == [(1,), (1,)]


def test_a_search_limits_them(work: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(work)
    found: list[Any] = []

    def start(context: Any, search: Any, slot: int, deadline: float, threads: Any) -> Any:
        found.append(threads)
        raise KeyboardInterrupt

    monkeypatch.setattr(workers, "_start", start)
    monkeypatch.setattr(workers, "usable_cores", lambda: 2)
    monkeypatch.setattr(trainer.model.sizes, "usable_cores", lambda: 2)
    for number, (sizes, count) in enumerate((("8, 32", 1), ("8, 4096", 1), ("8, 32", 2))):
        path = folder / f"space{number}.toml"
        path.write_text(
            "[search]\ntrials = 2\n[train]\nk_txt = {choice = [0, 1]}\n"
            f"batch_size = {{choice = [{sizes}]}}\nlr = {{log_uniform = [1e-4, 1e-3]}}\n"
        )
        space = read_space(path, {}, {})
        project = prepared(work)
        search = start_search(
            folder / "runs" / f"s{number}", space.base(work), space, None, None, project
        )
        with pytest.raises(KeyboardInterrupt):
            workers.run_workers(search, count, float("inf"), lambda: False)
    assert found == [(1, 0), (0, 0), (1, 1)]


SAID = """
import os, sys
from featstore.encoders.framework import limit_threads, threads_of_operation
limit_threads(*map(int, sys.argv[1:]))
import tensorflow as tf
print(threads_of_operation(), tf.config.threading.get_inter_op_parallelism_threads())
tf.constant(1.0) + 1
limit_threads(2)
print(threads_of_operation())
"""


def said(*arguments: str, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SAID, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_tensorflow_has_them_until_it_computes() -> None:
    assert said("1") == ["1", "0", "1"]
    assert said("1", **{INTRAOP_THREADS: "2"}) == ["2", "0", "2"]
    # A worker's share of the cores is what it has.
    assert said("1", "1", **{INTRAOP_THREADS: "2"}) == ["1", "1", "1"]


STEPPED = """
import hashlib
import numpy as np
from benchmarks.backends import SMALL
from benchmarks.steps import cached_stepper, random_batch
from featstore.encoders.framework import pinned_framework
with pinned_framework():
    model, stepper = cached_stepper(SMALL.train(3), SMALL)
    for seed in range(4):
        stepper.train(random_batch(SMALL.rows, 12 + seed, seed, SMALL))
    stepper.sync()
    for variable in model.trainable_variables:
        print(variable.path, hashlib.sha256(np.asarray(variable).tobytes()).hexdigest())
"""


def has_avx512() -> bool:
    cpu_info = Path("/proc/cpuinfo")
    return cpu_info.exists() and " avx512f " in cpu_info.read_text()


@pytest.mark.slow
@pytest.mark.skipif(not has_avx512(), reason="oneDNN's products without AVX-512 depend on threads")
def test_the_bits_are_the_same() -> None:
    """With oneDNN's products; Eigen's, of which `conftest` has the tests, depend on the threads."""
    one, many = (
        subprocess.run(
            [sys.executable, "-c", STEPPED],
            cwd=ROOT,
            env={**os.environ, INTRAOP_THREADS: threads, "TF_ENABLE_ONEDNN_OPTS": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "3")
    )
    assert len(one.splitlines()) > 50
    assert one == many
