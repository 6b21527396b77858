"""A run: its files, its seeds, stopping and going on, plateaus, divergence, controls."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import tiny_config, with_train

import trainer.run.fit
import trainer.run.training
from featstore.errors import (
    ConfigError,
    MissingFeaturesError,
    RunError,
    StoppedError,
    UsageError,
)
from featstore.progress import SILENT
from featstore.project import Project
from trainer.batches import CachedRows
from trainer.config import Config, TrainConfig, render_config
from trainer.features import cached_rows, prepare
from trainer.model.head import HEAD_LAYERS
from trainer.model.weights import trained_weights
from trainer.run.checkpoint import Progress, build_model, load_best
from trainer.run.engine import Engines
from trainer.run.fit import fit, train_together
from trainer.run.folder import Run
from trainer.run.training import Reporter, Training, judge, monitored

TIMES = {"seconds", "val_seconds", "wait_share"}
STEPS = 8  # 32 photos × 4 sentences, 16 rows a step


@dataclasses.dataclass
class Workspace:
    """A project with its photos extracted, a folder for each run, and models that serve them all.

    That such a model gives a run what its own would is in `test_engine.py`. A run that goes on has
    others than it had before, as in a process of its own: what it needs is in its files.
    """

    config: Config
    project: Project
    folder: Path
    engines: Engines = dataclasses.field(default_factory=Engines)
    other_engines: Engines = dataclasses.field(default_factory=Engines)
    _numbers: Iterator[int] = dataclasses.field(default_factory=itertools.count)

    def run(self, name: str = "") -> Run:
        return Run(self.folder / (name or f"run{next(self._numbers)}"))

    def training(
        self,
        run: Run | None = None,
        init_from: Run | None = None,
        reporter: Reporter | None = None,
        engines: Engines | None = None,
        **changes: Any,
    ) -> Training:
        config = with_train(self.config, **changes)
        prepare(self.project, config.train.k_txt)
        run = run or self.run()
        return Training(run, self.project, config.train, init_from, reporter, engines=engines)

    def fit(self, engines: Engines | None = None, **kwargs: Any) -> Training:
        training = self.training(engines=engines or self.engines, **kwargs)
        try:
            fit(training)
        finally:
            training.release()
        return training


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_vit: Path, tiny_text: Path) -> Workspace:
    folder = tmp_path_factory.mktemp("fit")
    # The state is compared too.
    config = tiny_config(folder / "data", tiny_vit, tiny_text, keep_state=True)
    project = Project(config)
    project.extract("vit", show=SILENT)
    return Workspace(config, project, folder / "runs")


@pytest.fixture(scope="module")
def plain(work: Workspace) -> Training:
    """An uninterrupted run that learns the rule."""
    return work.fit(epochs=4)


@pytest.fixture(scope="module")
def whole(work: Workspace) -> Training:
    """An uninterrupted run of the settings as they are."""
    return work.fit()


def history(training: Training | Run) -> list[dict[str, str]]:
    run = training if isinstance(training, Run) else training.run
    with run.history_path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files if name != "progress"}


def assert_same_run(a: Run, b: Run) -> None:
    """Check that two runs have the same figures, and the same state bit for bit."""
    assert history(a) == history(b)
    assert a.metrics == b.metrics
    first, second = arrays(a.checkpoint_path), arrays(b.checkpoint_path)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.tobytes() == second[name].tobytes(), name
    best = zip(load_best(a).get_weights(), load_best(b).get_weights(), strict=True)
    assert all(x.tobytes() == y.tobytes() for x, y in best)


def assert_close_runs(a: Run, b: Run) -> None:
    """Check that two runs have the same figures and weights, but for the last digits."""
    for one, two in zip(history(a), history(b), strict=True):
        for name, value in one.items():
            assert float(two[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-5), name
    pairs = zip(load_best(a).get_weights(), load_best(b).get_weights(), strict=True)
    for x, y in pairs:
        np.testing.assert_allclose(x, y, atol=2e-4)


def stop_after(steps: int) -> Reporter:
    asked = itertools.count(1)
    return Reporter(stopping=lambda: next(asked) >= steps)


def test_a_run_writes_every_file_that_it_promises(plain: Training) -> None:
    documented = [
        line.split()[0]
        for line in (sys.modules["trainer.run.folder"].__doc__ or "").splitlines()
        if line.startswith("    ")
        and not line.split()[0].startswith(
            ("evaluate", "explain", "parity", "predictions", "report", "summary", "tracking")
        )
    ]
    assert len(documented) >= 8
    for name in documented:
        assert (plain.run.folder / name).exists(), name
    extra = {path.name for path in plain.run.folder.iterdir()} - {n.rstrip("/") for n in documented}
    assert extra <= {".lock"}


def test_a_run_learns_the_rule(plain: Training) -> None:
    metrics = plain.run.metrics
    assert metrics["at_half"]["accuracy"] > 0.95
    assert metrics["rows"] == 48
    losses = [float(row["loss"]) for row in history(plain)]
    assert losses[-1] < losses[0] / 2


def test_the_manifest_says_what_the_run_is(plain: Training, work: Workspace) -> None:
    manifest = plain.run.manifest
    assert manifest["status"] == "finished"
    assert manifest["data"]["rows_digest"] == work.project.dataset.examples.digest()
    assert manifest["data"]["counts"]["train"] == {
        "rows": 128,
        "images": 32,
        "entailment": 64,
        "contradiction": 64,
        "rows_of_split": 128,
        "rows_left_out": {},
        "rows_cut": 0,
    }
    count = sum(w.size for w in plain.model.get_weights())
    assert manifest["parameters"]["trainable"] == count
    assert {"python", "tensorflow", "keras", "numpy"} <= manifest["versions"].keys()
    wall = manifest["wall_seconds"]
    assert 0 < wall["training"] + wall["validation"] <= wall["total"]
    assert plain.run.config == with_train(work.config, epochs=4)


def test_the_figures_of_the_best_epoch_are_those_of_its_weights(
    plain: Training, work: Workspace
) -> None:
    records = history(plain)
    best = min(records, key=lambda row: float(row["val_loss"]))
    metrics = plain.run.metrics
    assert metrics["epoch"] == int(best["epoch"])
    assert metrics["loss"] == pytest.approx(float(best["val_loss"]))
    rows = cached_rows(plain.project, plain.train_config, "val")
    batch = rows.batch(np.arange(len(rows)), len(rows))
    logits = np.asarray(load_best(plain.run)(batch.inputs()), np.float64)[:, 0]
    p = 1 / (1 + np.exp(-logits))
    loss = -np.mean(np.where(rows.labels == 1, np.log(p), np.log(1 - p)))
    assert metrics["loss"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("k_txt", [0, 1])
def test_a_seed_decides_everything(work: Workspace, k_txt: int) -> None:
    first, second = work.fit(k_txt=k_txt), work.fit(k_txt=k_txt, engines=work.other_engines)
    assert_same_run(first.run, second.run)
    assert history(work.fit(k_txt=k_txt, seed=1)) != history(first)


@pytest.mark.parametrize("steps", [1, 5, STEPS, STEPS + 1, 2 * STEPS - 1])
def test_a_stopped_run_goes_on_as_if_it_had_not(
    work: Workspace, whole: Training, steps: int
) -> None:
    run = work.run()
    with pytest.raises(StoppedError, match=f"--name {run.name}") as stopped:
        work.fit(run=run, reporter=stop_after(steps))
    assert "\n" not in str(stopped.value)
    assert run.manifest["status"] == "stopped"
    work.fit(run=run, engines=work.other_engines)
    assert_same_run(run, whole.run)
    assert run.manifest["status"] == "finished"


@pytest.mark.slow
def test_a_run_stopped_many_times_with_trained_text_layers(work: Workspace) -> None:
    whole = work.fit(k_txt=1)
    run = work.run()
    for steps in (3, 7):
        with pytest.raises(StoppedError):
            work.fit(run=run, k_txt=1, reporter=stop_after(steps))
    work.fit(run=run, k_txt=1, engines=work.other_engines)
    assert_same_run(run, whole.run)


def test_a_finished_run_keeps_its_state_only_if_asked_to(work: Workspace, plain: Training) -> None:
    lean = work.fit(epochs=4, keep_state=False)
    assert not lean.run.checkpoint_path.exists()
    assert history(lean) == history(plain)
    assert lean.run.metrics == plain.run.metrics
    asked = itertools.count(1)
    run = work.run()
    stopped = Reporter(stopping=lambda: next(asked) >= 5)
    with pytest.raises(StoppedError):
        work.fit(run=run, epochs=4, keep_state=False, reporter=stopped)
    assert run.checkpoint_path.exists()
    work.fit(run=run, epochs=4, keep_state=False, engines=work.other_engines)
    assert not run.checkpoint_path.exists()
    assert history(run) == history(plain)


def test_a_kill_between_state_and_reports_loses_no_report(work: Workspace, plain: Training) -> None:
    run = work.run()
    work.fit(run=run, epochs=4)
    for path in (run.history_path, run.metrics_path, run.curves_path):
        path.unlink()
    run.write_manifest({**run.manifest, "status": "running"})
    work.fit(run=run, epochs=4, engines=work.other_engines)
    assert_same_run(run, plain.run)
    assert run.curves_path.exists()


PROGRAM = """
import sys, time
from pathlib import Path
from featstore.project import Project
from trainer.config import load_config
from trainer.features import prepare
from trainer.run import training
from trainer.run.fit import fit
from trainer.run.training import Reporter, Training
from trainer.run.folder import Run
training.STATE_SECONDS = float(sys.argv[4])
config = load_config(sys.argv[1])
run = Run(Path(sys.argv[2]))
project = Project(config)
prepare(project, config.train.k_txt)
slow = Reporter(
    stopping=lambda: time.sleep(float(sys.argv[3])),
    epoch=lambda record: print(record["epoch"], flush=True),
)
with run.writing():
    fit(Training(run, project, config.train, reporter=slow))
"""


@pytest.mark.slow
@pytest.mark.parametrize("saved", [True, False])
def test_a_killed_run_goes_on_as_if_it_had_not(
    work: Workspace, plain: Training, saved: bool
) -> None:
    """From its last state, or from the start where none was worth saving yet."""
    run = work.run()
    config = work.folder / "killed.toml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(render_config(with_train(work.config, epochs=4, keep_state=True)))
    root = Path(trainer.run.fit.__file__).parents[2]
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            PROGRAM,
            str(config),
            str(run.folder),
            "0.3",
            "0" if saved else "60",
        ],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "1"
        time.sleep(0.5)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    assert run.manifest["status"] == "running"
    assert len(history(run)) < 4
    assert run.checkpoint_path.exists() is saved
    with run.writing():
        work.fit(run=run, epochs=4, engines=work.other_engines)
    assert_same_run(run, plain.run)


def test_going_on_with_other_inputs_is_refused(work: Workspace, tmp_path: Path) -> None:
    run = work.run()
    with pytest.raises(StoppedError):
        work.fit(run=run, reporter=stop_after(3))
    with pytest.raises(UsageError, match=r"other settings \(train\.lr: wanted 0\.1, stored 0\.003"):
        run.check_free_or_same(with_train(work.config, lr=0.1))
    run.check_free_or_same(work.config)
    other = work.run()
    work.fit(run=other, epochs=1)
    with pytest.raises(RunError, match="--init-from changed"):
        work.training(run=run, init_from=other)
    rows = tmp_path / "rows.jsonl"
    lines = Path(str(work.config.data.rows)).read_text().splitlines(keepends=True)
    rows.write_text("".join(lines[:-1]))
    data = dataclasses.replace(work.config.data, rows=str(rows))
    fewer = Project(dataclasses.replace(work.config, data=data))
    with pytest.raises(RunError, match="the rows changed"):
        Training(run, fewer, work.config.train)


def test_a_damaged_checkpoint_is_one_line(work: Workspace) -> None:
    run = work.run()
    with pytest.raises(StoppedError):
        work.fit(run=run, reporter=stop_after(3))
    whole = run.checkpoint_path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"PK\x05\x06" + bytes(18)):
        run.checkpoint_path.write_bytes(damaged)
        with pytest.raises(RunError, match="delete it to start again") as caught:
            work.training(run=run)
        assert "\n" not in str(caught.value)


def test_features_at_one_place_are_not_those_of_another(work: Workspace, tmp_path: Path) -> None:
    project = Project(work.config)
    prepare(project, 0)
    store = dataclasses.replace(work.config.store, root=str(tmp_path))
    elsewhere = project.with_config(dataclasses.replace(work.config, store=store))
    with pytest.raises(MissingFeaturesError, match=re.escape(str(tmp_path))):
        prepare(elsewhere, 0, compare=False)


def test_two_trainings_of_one_run_exclude_each_other(work: Workspace) -> None:
    run = work.run()
    with run.writing(), pytest.raises(RunError, match="another process"), Run(run.folder).writing():
        raise AssertionError("the lock was given twice")


def test_a_finished_name_is_taken(plain: Training) -> None:
    with pytest.raises(UsageError, match="finished run; choose another --name"):
        plain.run.check_free_or_same(plain.config)


def verdicts(values: list[float], **settings: Any) -> list[tuple[bool, bool, int]]:
    """For each epoch: the best so far? the rate to be cut? how many epochs since the best?"""
    train, progress = TrainConfig(**settings), Progress()
    found = []
    for epoch, value in enumerate(values):
        progress.epoch = epoch
        cut = judge(train, progress, value)
        found.append((progress.best_epoch == epoch, cut, progress.waited))
    return found


def test_judge_cuts_after_its_patience() -> None:
    found = verdicts([5, 5, 4, 4, 4, 4, 4], reduce_lr_patience=2)
    assert [best for best, _, _ in found] == [True] + [False] * 6
    assert [cut for _, cut, _ in found] == [False, False, True, False, True, False, True]
    assert [waited for _, _, waited in found] == [0, 1, 2, 3, 4, 5, 6]


def test_judge_with_patience_1_acts_at_once() -> None:
    found = verdicts([1, 1, 2, 1], reduce_lr_patience=1)
    assert found == [(True, False, 0), (False, True, 1), (True, False, 0), (False, True, 1)]


def test_a_gain_starts_both_patiences_again() -> None:
    found = verdicts([1, 0, 2, 1, 1], reduce_lr_patience=2)
    assert found[3] == (False, False, 1)
    assert found[4] == (False, True, 2)


def test_the_monitored_value_is_better_when_higher() -> None:
    record = {"val_loss": 0.3, "val_macro_f1": 0.8, "val_accuracy": 0.7, "val_auc": None}
    assert monitored(TrainConfig(monitor="val_loss"), record) == -0.3
    assert monitored(TrainConfig(monitor="val_macro_f1"), record) == 0.8
    assert monitored(TrainConfig(monitor="val_accuracy"), record) == 0.7
    with pytest.raises(RunError, match="val_auc"):
        monitored(TrainConfig(monitor="val_auc"), record)


def test_a_plateau_cuts_the_rate_and_ends_the_run(work: Workspace) -> None:
    # A rate too small to change float32 weights: no epoch is better than the first.
    training = work.fit(
        lr=1e-12,
        weight_decay=0.0,
        epochs=9,
        reduce_lr_patience=1,
        reduce_lr_factor=0.25,
        early_stop_patience=3,
    )
    rates = [float(row["lr"]) for row in history(training)]
    assert rates == pytest.approx([1e-12, 1e-12, 2.5e-13, 6.25e-14])
    assert training.run.metrics["epoch"] == 1
    assert training.run.manifest["status"] == "finished"


@pytest.mark.parametrize("monitor", ["val_loss", "val_macro_f1", "val_accuracy", "val_auc"])
def test_the_monitor_chooses_the_epoch(work: Workspace, monitor: str) -> None:
    training = work.fit(monitor=monitor, epochs=3, lr=0.03)
    values = [float(row[monitor]) for row in history(training)]
    best = min(values) if monitor == "val_loss" else max(values)
    metrics = training.run.metrics
    assert metrics["epoch"] == values.index(best) + 1
    assert metrics["monitor"] == monitor


@pytest.mark.parametrize("batch_size", [16, 128])
def test_divergence_is_one_line_and_the_run_is_stopped(work: Workspace, batch_size: int) -> None:
    # With one step an epoch it is not the loss but the val logits that are not finite.
    run = work.run()
    with pytest.raises(RunError, match="smaller --lr") as caught:
        work.fit(run=run, lr=1e30, clipnorm=0.0, batch_size=batch_size, epochs=3)
    assert "\n" not in str(caught.value)
    assert run.manifest["status"] == "stopped"


@pytest.mark.parametrize("together", [1, 2])
def test_the_val_split_is_not_read_for_a_loss_that_diverged(
    work: Workspace, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    read: list[Any] = []
    whole = CachedRows.batch

    def counted(rows: CachedRows, *args: Any) -> Any:
        read.append(rows)
        return whole(rows, *args)

    monkeypatch.setattr(CachedRows, "batch", counted)
    diverging = [work.training(lr=1e30, clipnorm=0.0, seed=0) for _ in range(together)]
    failures = train_together(diverging)
    assert all("the loss is" in str(failure) for failure in failures)
    assert len(read) == STEPS
    # One that goes on is measured, whatever the others did.
    read.clear()
    healthy = work.training(epochs=1)
    assert train_together([work.training(lr=1e30, clipnorm=0.0), healthy])[1] is None
    assert read.count(healthy.val_rows) + read.count(healthy.rows) < len(read) == STEPS + 3


def layer_arrays(training: Training) -> dict[str, np.ndarray]:
    return {name: np.asarray(w) for name, w in trained_weights(training.model).items()}


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 1)])
def test_init_from_copies_the_head_and_shared_text_layers(
    work: Workspace, before: int, after: int
) -> None:
    source = work.fit(k_txt=before, epochs=1, lr=0.05)
    fresh = layer_arrays(work.training(k_txt=after, seed=5))
    training = work.training(k_txt=after, seed=5, init_from=source.run)
    started = layer_arrays(training)
    theirs = {n: np.asarray(w) for n, w in trained_weights(load_best(source.run)).items()}
    text = {name.split("/")[0] for name in started} - set(HEAD_LAYERS)
    assert len(text) == after
    for name, value in started.items():
        expected = theirs.get(name, fresh[name])
        np.testing.assert_array_equal(value, expected, err_msg=name)
    shared = {name for name in started if name in theirs}
    assert {name.split("/")[0] for name in shared} >= {"xattn", "mlp_1", "logit"}
    assert any((started[name] != fresh[name]).any() for name in shared)
    manifest = training.manifest
    assert manifest["init_from"] == str(source.run.folder)
    assert set(manifest["initialised_layers"]) == {name.split("/")[0] for name in shared}


def test_init_from_another_head_is_refused(work: Workspace, plain: Training) -> None:
    with pytest.raises(RunError, match=r"--init-from run\d+: layer mlp_1: .*shape") as caught:
        work.training(mlp_dim=9, init_from=plain.run)
    assert "\n" not in str(caught.value)


def test_without_the_picture_a_run_falls_to_chance(work: Workspace, plain: Training) -> None:
    blind = work.fit(control="hypothesis-only", epochs=4).run.metrics
    # Each sentence is right for half its photos: exactly half, whatever the model says.
    assert blind["auc"] == pytest.approx(0.5, abs=1e-6)
    assert blind["at_half"]["accuracy"] == 0.5
    shuffled = work.fit(control="shuffled-images", epochs=4).run.metrics
    assert shuffled["at_half"]["accuracy"] < 0.75
    assert plain.run.metrics["at_half"]["accuracy"] > 0.95
    assert blind["control"] == "hypothesis-only"


CHANGES: dict[str, dict[str, Any]] = {
    "k_txt": {"k_txt": 1},
    "lr": {"lr": 1e-3},
    "weight_decay": {"weight_decay": 0.5},
    "clipnorm": {"clipnorm": 1e-3},
    "dropout": {"dropout": 0.5},
    "attention_dropout": {"attention_dropout": 0.0},
    "batch_size": {"batch_size": 32},
    "epochs": {"epochs": 1},
    "num_heads": {"num_heads": 1},
    "head_dim": {"head_dim": 8},
    "mlp_dim": {"mlp_dim": 16},
    "queries": {"queries": "all"},
    "fusion_layers": {"fusion_layers": 2},
    "monitor": {"monitor": "val_loss"},
    "lr_schedule": {"lr_schedule": "cosine"},
    "warmup_epochs": {"warmup_epochs": 1.0},
    "min_lr": {"min_lr": 0.04},
    "accumulate_steps": {"accumulate_steps": 2},
    "ema_momentum": {"ema_momentum": 0.9},
    "label_smoothing": {"label_smoothing": 0.1},
    "class_weights": {"class_weights": {"contradiction": 1.0, "entailment": 3.0}},
    "oversample": {"oversample": {"gender": 1.5}},
    "reduce_lr_factor": {"reduce_lr_factor": 0.1},
    "reduce_lr_patience": {"reduce_lr_patience": 2},
    "early_stop_patience": {"early_stop_patience": 1},
    "seed": {"seed": 3},
    "control": {"control": "hypothesis-only"},
    "dtype_policy": {"dtype_policy": "mixed_bfloat16"},
}
# What decides how the same numbers are computed.
SAME_FIGURES = {"fast_path", "keep_state", "features_on"}
# With k_txt 0, or alone, without effect: see test_options.py and test_vision_blocks.py. Views need
# features of their own: see test_views.py.
ELSEWHERE = {"layer_decay", "buckets", "k_vit", "views"}
# The accuracy soon stands at 1 and gains no more: rate cuts and the early stop come.
RESTLESS = {
    "lr": 0.05,
    "epochs": 6,
    "monitor": "val_accuracy",
    "reduce_lr_patience": 1,
    "early_stop_patience": 3,
}


@pytest.fixture(scope="module")
def restless(work: Workspace) -> Training:
    first, again = work.fit(**RESTLESS), work.fit(**RESTLESS)
    # So what another run has otherwise is the work of its settings.
    assert history(first) == history(again)
    return first


def test_every_setting_is_in_the_table() -> None:
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    assert CHANGES.keys() == names - SAME_FIGURES - ELSEWHERE


def test_the_plain_path_has_keras_own_layers(work: Workspace) -> None:
    layer = work.training(k_txt=1, fast_path=False).model.get_layer("xattn")
    assert type(layer) is keras.layers.MultiHeadAttention
    dense = work.training(k_txt=1, fast_path=False).model.get_layer("mlp_1")
    assert type(dense) is keras.layers.Dense
    assert not work.training(k_txt=1, fast_path=False).model.get_layer("text_tail").fast


@pytest.mark.parametrize("name", CHANGES)
def test_every_setting_has_an_effect(work: Workspace, restless: Training, name: str) -> None:
    changed = work.fit(**{**RESTLESS, **CHANGES[name]})
    figures = [(history(t), t.run.metrics["epoch"]) for t in (restless, changed)]
    assert figures[0] != figures[1]


def test_heads_may_follow_from_the_width(work: Workspace) -> None:
    model = build_model(with_train(work.config, num_heads=0, head_dim=4), (16, 16))
    assert model.get_layer("xattn").num_heads == 4
    with pytest.raises(ConfigError, match="head_dim"):
        build_model(with_train(work.config, num_heads=0, head_dim=5), (16, 16))


def test_a_run_neither_reads_nor_changes_global_random_state(work: Workspace) -> None:
    # The sentences are encoded before.
    work.training(k_txt=1)
    runs = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        before = random.getstate(), np.random.get_state()[1].tolist()
        runs.append(work.fit(dropout=0.3, k_txt=1, engines=Engines(kept=0)).run)
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    assert_same_run(*runs)


def events(run: Run) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard reads: tag to steps and values."""
    loaded = EventAccumulator(str(run.tensorboard_path)).Reload()
    return {
        tag: [(e.step, float(e.tensor_proto.float_val[0])) for e in loaded.Tensors(tag)]
        for tag in loaded.Tags()["tensors"]
    }


def test_tensorboard_has_every_epoch_in_one_file_a_session(work: Workspace) -> None:
    run, shown = work.run(), []

    def look(record: dict[str, Any]) -> None:
        # What an epoch found can be seen at once.
        shown.append(len(events(run)["epoch/val_loss"]))

    training = work.fit(run=run, epochs=3, reporter=Reporter(epoch=look))
    assert shown == [1, 2, 3]
    assert len(list(run.tensorboard_path.iterdir())) == 1
    for name, values in events(run).items():
        recorded = [record[name.removeprefix("epoch/")] for record in training.progress.history]
        assert values == [(i + 1, pytest.approx(v, rel=1e-6)) for i, v in enumerate(recorded)]
    figures = {f"epoch/{key}" for key in training.progress.history[0]} - {"epoch/epoch"}
    assert events(run).keys() == figures


def test_a_run_that_goes_on_adds_one_event_file(work: Workspace) -> None:
    run = work.run()
    with pytest.raises(StoppedError):
        work.fit(run=run, epochs=4, reporter=stop_after(2 * STEPS + 3))
    work.fit(run=run, epochs=4, engines=work.other_engines)
    assert len(list(run.tensorboard_path.iterdir())) == 2
    assert [step for step, _ in events(run)["epoch/loss"]] == [1, 2, 3, 4]


def test_losses_are_fetched_in_bounded_numbers(
    work: Workspace, whole: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer.run.fit, "LOSS_EVERY_STEPS", 3)
    monkeypatch.setattr(trainer.run.training, "STATE_SECONDS", 0.0)
    assert json.dumps(history(work.fit())) == json.dumps(history(whole))


@pytest.mark.slow
def test_runs_trained_together_end_as_each_alone(work: Workspace) -> None:
    """Other rates, sizes, dropout and lengths of run; one of them was stopped and catches up."""
    changes: list[dict[str, Any]] = [
        {"epochs": 3},
        {"epochs": 2, "lr": 1e-2, "mlp_dim": 5, "weight_decay": 0.1},
        {"epochs": 3, "dropout": 0.4, "num_heads": 1},
    ]
    alone = [work.fit(**change) for change in changes]
    runs = [work.run() for _ in changes]
    with pytest.raises(StoppedError):
        fit(work.training(runs[2], reporter=stop_after(STEPS + 3), **changes[2]))
    together = [work.training(run, **change) for run, change in zip(runs, changes, strict=True)]
    assert train_together(together) == [None, None, None]
    for expected, run in zip(alone, runs, strict=True):
        assert_close_runs(expected.run, run)
        assert run.manifest["status"] == "finished"


def test_what_ends_one_run_leaves_the_others(work: Workspace, whole: Training) -> None:
    def refuse(record: dict[str, Any]) -> None:
        raise ValueError("enough")

    healthy = work.training(epochs=2)
    diverging = work.training(epochs=2, lr=1e30, clipnorm=0.0)
    refused = work.training(epochs=2, reporter=Reporter(epoch=refuse))
    failures = train_together([diverging, healthy, refused])
    assert isinstance(failures[0], RunError)
    assert failures[1] is None
    assert isinstance(failures[2], ValueError)
    assert_close_runs(whole.run, healthy.run)
    assert diverging.run.manifest["status"] == "stopped"
    assert len(history(refused)) == 1


def test_stopping_saves_every_run(work: Workspace) -> None:
    unbroken = [work.training(epochs=2), work.training(epochs=2, lr=1e-2)]
    train_together(unbroken)
    runs = [work.run(), work.run()]
    stopped = [
        work.training(runs[0], epochs=2, reporter=stop_after(5)),
        work.training(runs[1], epochs=2, lr=1e-2),
    ]
    with pytest.raises(StoppedError):
        train_together(stopped)
    assert [t.progress.step for t in stopped] == [5, 5]
    again = [work.training(runs[0], epochs=2), work.training(runs[1], epochs=2, lr=1e-2)]
    train_together(again)
    for expected, run in zip(unbroken, runs, strict=True):
        assert_same_run(expected.run, run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"\[train\] seed is 1 and 0"),
        ({"batch_size": 8}, r"\[train\] batch_size is 8 and 16"),
        ({"control": "hypothesis-only"}, r"\[train\] control"),
        ({"k_txt": 1}, r"\[train\] k_txt is 1 and 0"),
    ],
)
def test_only_runs_of_the_same_batches_go_together(
    work: Workspace, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        train_together([work.training(), work.training(**change)])


def test_text_layers_do_not_train_together(work: Workspace) -> None:
    with pytest.raises(UsageError, match="k_txt 0 and k_vit 0 only"):
        train_together([work.training(k_txt=1), work.training(k_txt=1)])
