"""The benchmarks themselves, at sizes where a figure means nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from click.testing import CliRunner
from held import hold
from on_jax import run_on_jax
from tiny_runs import tiny_config, worker_here

from benchmarks import (
    accelerator,
    feeding,
    first_step,
    growth,
    loop,
    number_formats,
    search,
    search_quality,
    study_search,
    together,
)
from benchmarks.__main__ import benchmarks
from benchmarks.arithmetic import bytes_moved, operations, parameters
from benchmarks.loader import OURS, OURS_FIRST, WARM_HEADER, best_peer, measure, report
from benchmarks.loader_cold import COLD_HEADER
from benchmarks.loader_peers import PEERS, Peer, RandomReader, StreamReader, numpy_memmap
from benchmarks.measuring import in_child, ratios, spread, written
from benchmarks.results_file import RESULTS, processor_of
from benchmarks.sizes import TINY
from benchmarks.steps import cached_stepper, random_batch
from benchmarks.tables import table
from featstore.progress import SILENT
from featstore.project import Project
from trainer.commands.main import cli
from trainer.config import render_config
from trainer.run.folder import Run
from trainer.run.training import Training

ROOT = Path(__file__).resolve().parent.parent

LOADER: dict[str, Any] = {
    "rows": 64,
    "row_shape": (4, 8),
    "batch_size": 8,
    "batches": 2,
    "rounds": 2,
}


def test_a_table_is_markdown_of_even_columns() -> None:
    assert table(("way", "ms"), [("memcpy", "0.5"), ("a|b", "10.25")]).splitlines() == [
        "| way    |    ms |",
        "| ------ | ----: |",
        "| memcpy |   0.5 |",
        r"| a\|b   | 10.25 |",
    ]
    with pytest.raises(ValueError, match="1 cells, expected 2"):
        table(("way", "ms"), [("memcpy",)])


def test_the_loader_benchmark_measures_every_way_that_is_installed(tmp_path: Path) -> None:
    figures = measure(**LOADER, scratch=str(tmp_path))
    assert not list(tmp_path.iterdir())
    names = {peer.name for peer in PEERS}
    assert names <= figures["warm"].keys() | figures["absent"].keys()
    assert {"NumPy memmap, take", "TFRecord (tf.data)", OURS_FIRST} <= figures["warm"].keys()
    assert all("pip install" in needs for needs in figures["absent"].values())
    assert figures["warm"][OURS]["featstore_speed_to_this"] == 1
    for way in figures["warm"].values():
        low, high = way["spread_milliseconds"]
        assert 0 < low <= way["milliseconds_a_batch"] <= high
    text = report(figures)
    assert f"The best of the other formats is {best_peer(figures)};" in text
    assert all(name in text for name in (*WARM_HEADER, *names))
    assert all(name in text for name in COLD_HEADER) or not figures["cold"]


@contextlib.contextmanager
def shifted_rows(features: Any, folder: Path) -> Iterator[RandomReader]:
    yield lambda positions, out: features[(positions + 1) % len(features)]


@contextlib.contextmanager
def one_row_twice(features: Any, folder: Path) -> Iterator[StreamReader]:
    yield lambda batch_size: iter([features[:1], features])


@contextlib.contextmanager
def one_row_short(features: Any, folder: Path) -> Iterator[StreamReader]:
    yield lambda batch_size: iter([features[1:]])


@contextlib.contextmanager
def not_installed(features: Any, folder: Path) -> Iterator[RandomReader]:
    import a_format_that_nobody_has  # noqa: F401

    yield lambda positions, out: out


@pytest.mark.parametrize(
    "peer",
    [
        Peer("shifted", False, shifted_rows),
        Peer("twice", True, one_row_twice),
        Peer("short", True, one_row_short),
    ],
    ids=lambda peer: peer.name,
)
def test_a_way_that_returns_other_rows_is_refused(tmp_path: Path, peer: Peer) -> None:
    with pytest.raises(ValueError, match=f"^{peer.name}: "):
        measure(**LOADER, scratch=str(tmp_path), peers=[peer])


def test_a_peer_that_is_not_installed_is_listed(tmp_path: Path) -> None:
    peers = [Peer("nobody's", False, not_installed), Peer("memmap", False, numpy_memmap)]
    figures = measure(**LOADER, scratch=str(tmp_path), peers=peers)
    assert "a_format_that_nobody_has" in figures["absent"]["nobody's"]
    assert "memmap" in figures["warm"]
    assert "nobody's is absent" in report(figures)


def test_too_few_rows_for_a_round(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 batches of 8 need more than 20 rows"):
        measure(**LOADER | {"rows": 20, "batches": 3}, scratch=str(tmp_path))


def test_the_checks_read_what_was_written(tmp_path: Path) -> None:
    features = np.arange(48, dtype=np.float16).reshape(6, 2, 4)
    for peer in PEERS:
        folder = tmp_path / peer.name.replace("/", " ")
        folder.mkdir()
        with contextlib.suppress(ImportError), peer.open(features, folder) as read:
            if peer.streams:
                rows = np.concatenate([np.array(batch) for batch in read(4)])
                rows = rows[np.argsort(rows[:, 0, 0])]
                assert rows.tobytes() == features.tobytes(), peer.name
            else:
                found = read(np.array([5, 0, 3]), np.zeros((3, 2, 4), np.float16))
                assert found.tobytes() == features[[5, 0, 3]].tobytes(), peer.name


def test_the_best_peer_is_the_one_that_the_store_gains_least_on() -> None:
    speeds = {OURS: 1.0, "memcpy, one block": 0.2, "slow": 9.0, "fast": 1.1, "faster": 0.9}
    ways = {name: {"featstore_speed_to_this": speed} for name, speed in speeds.items()}
    assert best_peer({"warm": ways}) == "faster"
    assert best_peer({"warm": {OURS: ways[OURS]}}) is None


def test_spreads_and_ratios_are_of_the_rounds() -> None:
    assert spread([3.0, 1.0, 2.0], 1) == {"median": 2.0, "spread": [1.0, 3.0]}
    # Of the medians alone, it would be 2.
    assert ratios([10.0, 2.0, 4.0], [1.0, 2.0, 1.0], 1) == {"median": 4.0, "spread": [1.0, 10.0]}
    assert written(spread([0.001, 0.0025]), " ms", 1, 1e3) == "1.8 ms (1.0–2.5)"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_that_of_the_process_alone() -> None:
    before, after = in_child(hold, 64)
    assert 64 << 20 <= after["anonymous"] - before["anonymous"] < 80 << 20
    assert after["peak"] >= after["anonymous"] + after["mapped"] >= 64 << 20


def products_of_graph(k_txt: int, rows: int, length: int) -> tuple[int, int]:
    """Return the operations of the matrix products that a traced step needs, and its parameters."""
    model, stepper = cached_stepper(TINY.train(k_txt), TINY)
    batch = random_batch(rows, length, size=TINY)
    numbers = stepper._numbers.array()  # type: ignore[attr-defined]
    given = (batch.inputs(), batch.labels, batch.weights, numbers)
    arguments = tf.nest.map_structure(tf.constant, given)
    traced = stepper._train.python_function  # type: ignore[attr-defined]
    # With the batch's own shape: the step itself is traced for any.
    graph = tf.function(traced, autograph=False).get_concrete_function(*arguments).graph
    waiting = [op for op in graph.get_operations() if op.type == "ResourceApplyAdam"]
    assert len(waiting) == len(model.trainable_variables)
    waiting += [tensor.op for tensor in graph.outputs]
    seen, found = set(), 0
    while waiting:
        op = waiting.pop()
        if op.name in seen:
            continue
        seen.add(op.name)
        waiting += [tensor.op for tensor in op.inputs]
        assert op.type != "Einsum"
        if "MatMul" in op.type:
            transposed = op.get_attr("transpose_a" if op.type == "MatMul" else "adj_x")
            inner = op.inputs[0].shape[-2 if transposed else -1]
            found += 2 * inner * int(np.prod(op.outputs[0].shape))
    return found, sum(int(np.prod(v.shape)) for v in model.trainable_variables)


@pytest.mark.parametrize(("k_txt", "length"), [(0, 1), (1, 12), (2, 8), (3, 12)])
def test_the_operations_are_those_of_the_steps_own_graph(k_txt: int, length: int) -> None:
    counted = operations(TINY, k_txt, 8, length)
    optimizer = counted.pop("AdamW")
    products, trained = products_of_graph(k_txt, 8, length)
    assert sum(counted.values()) == products
    assert parameters(TINY, k_txt) == trained
    assert optimizer % trained == 0


def test_the_bytes_grow_with_what_is_moved() -> None:
    one, twice = bytes_moved(TINY, 2, 8, 12), bytes_moved(TINY, 2, 16, 12)
    assert twice["features"] == 2 * one["features"]
    assert twice["parameters"] == one["parameters"]
    assert one["features"] == 2 * 2 * 8 * 16 * (TINY.tokens + 12)


@pytest.fixture(scope="module")
def real_config(tiny_vit: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings of rows and presets as a user has them."""
    folder = tmp_path_factory.mktemp("real")
    path = folder / "featstore.toml"
    path.write_text(render_config(tiny_config(folder, tiny_vit, tiny_text)))
    return path


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_the_study_search_runs_on_a_users_rows(
    tmp_path: Path, real_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = study_search.end_to_end_seconds

    def once(folder: Path, ks: tuple[int, ...]) -> dict[int, dict[str, Any]]:
        """Compile the model of the first k_txt alone: the next is more of the same."""
        return dict.fromkeys(ks, timed(folder, ks[:1])[ks[0]])

    monkeypatch.setattr(study_search, "end_to_end_seconds", once)
    recipe = tmp_path / study_search.RECIPE.name
    recipe.write_text(study_search.RECIPE.read_text().replace("trials = 6", "trials = 2"))
    monkeypatch.setattr(study_search, "RECIPE", recipe)
    shown = run(tmp_path, "study-search", "--config", str(real_config), "--workers", "1")
    (file,) = tmp_path.glob("*.json")
    found = json.loads(file.read_text())["study_search"]
    assert found["trials"] == 2
    assert found["workers"].keys() == {"1"}
    assert 0 < found["workers"]["1"]["best"] <= 1
    wall = found["workers"]["1"]["wall_seconds"]
    assert 0 < found["workers"]["1"]["work_seconds"] < wall < found["from_nothing_seconds"]
    # Two epochs of 128 rows in steps of 32 and of 48 validation rows, for each trial.
    steps = {k: found["end_to_end"][k]["plain"] for k in ("2", "3")}
    low, high = (
        4
        * pick(
            4 * step["step"]["median"] + 2 * step["predict"]["median"] for step in steps.values()
        )
        for pick in (min, max)
    )
    assert low - 0.1 <= found["end_to_end_plain_seconds"] <= high + 0.1
    assert "on 128 training and 48 validation rows" in shown
    assert "cached, 1 worker" in shown
    assert "From nothing to the best of 2 trials on 224 rows" in shown


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have commands, and a search's worker, run here: each process would import Keras first."""

    def command(line: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        at = next(i for i, part in enumerate(line) if part in (str(ROOT / "cli.py"), "benchmarks"))
        program = benchmarks if line[at] == "benchmarks" else cli
        done = CliRunner().invoke(program, line[at + 1 :])
        assert done.exit_code == 0 or not options.get("check"), done.output
        return subprocess.CompletedProcess(line, done.exit_code, done.stdout, done.stderr)

    monkeypatch.setattr(subprocess, "run", command)
    monkeypatch.setattr(feeding, "in_child", lambda function, *given: function(*given))
    # Its children have some cores each; this process has all of them after it too.
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)
    with worker_here():
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_search_quality_tests_what_each_search_found(tmp_path: Path, real_config: Path) -> None:
    shown = run(
        tmp_path,
        *("search-quality", "--config", str(real_config)),
        *("--seeds", "1", "--trials", "2", "--epochs", "1"),
    )
    (file,) = tmp_path.glob("*.json")
    kinds = json.loads(file.read_text())["search_quality"]["kinds"]
    counts = {name: len(kind["searches"][0]["trials"]) for name, kind in kinds.items()}
    assert counts == {"random": 2, "tpe": 2, "halving": 2, "defaults": 1}
    for kind in kinds.values():
        (found,) = kind["searches"]
        best = next(trial for trial in found["trials"] if trial[0] == found["best"])
        assert best[2] == max(trial[2] for trial in found["trials"] if trial[2] is not None)
        # None where one class is predicted of all: each of these photos has a row of either.
        low, high = found["interval"] or (found["test"], found["test"])
        assert low <= found["test"] <= high
    assert "| random, successive halving, 2 epochs |" in shown
    assert "48 validation and 48 test rows" in shown


def test_a_budget_counts_trials_that_completed_within_it() -> None:
    trials = [[0, 2.0, 0.5, 4], [2, 3.0, None, 1], [1, 5.0, 0.4, 4], [3, 7.0, 0.9, 4]]
    best = [search_quality.best_after(trials, seconds) for seconds in (1, 2, 6, 7)]
    assert [trial and trial[0] for trial in best] == [None, 0, 0, 3]
    assert [trial[0] for trial in search_quality.within(trials, 5)] == [0, 2, 1]


def test_a_search_that_has_nothing_yet_is_no_part_of_a_mean() -> None:
    late, early = [[0, 3.0, 0.5, 4]], [[0, 1.0, 0.7, 4], [1, 2.0, None, 4]]
    about = {"best": 0, "test": 0.6, "interval": [0.5, 0.8]}
    searches = [{"trials": late, **about}, {"trials": early, **about}]
    kinds = {"random": {"title": "random", "epochs": 4, "searches": searches}}
    rows = {"val": 10, "test": 20}
    shown = search_quality.report({"seconds": 4, "kinds": kinds, "rows": rows})
    cells = [cell.strip() for cell in shown.splitlines()[-1].split("|")[2:-1]]
    one, test = "0.6000 (0.5000–0.7000)", "0.6000 (0.6000–0.6000)"
    assert cells == ["none yet", "none yet", one, one, "2", "1", "6", test]
    assert "±0.150" in shown


@pytest.mark.slow
def test_a_command_is_timed_to_the_end_of_its_first_step(
    tmp_path: Path, real_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = first_step.seconds_to_end
    once = functools.cache(seconds)
    # The import of Keras is timed once, not in each round.
    monkeypatch.setattr(
        first_step,
        "seconds_to_end",
        lambda program, *given: (once if program == first_step.KERAS else seconds)(program, *given),
    )
    project = Project.load(real_config)
    project.extract("vit", show=SILENT)
    found = first_step.timed(real_config, tmp_path, (0,), rounds=1)
    whole, keras, less = (found["0"][name]["median"] for name in ("whole", "keras", "less_keras"))
    assert min(whole, keras) > 0
    # Each is rounded by itself.
    assert less == pytest.approx(whole - keras, abs=0.002)
    (last,) = tmp_path.glob("*-0-1")
    assert not (last / "history.csv").exists()
    figures = {"rounds": 1, "projects": {"your own": {"train_rows": 128, "k_txt": found}}}
    assert "| your own, 128 rows |" in first_step.report(figures)


@pytest.mark.slow
def test_number_formats_are_compared_under_the_same_weights(
    tiny_vit: Path, tiny_text: Path, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "data", tiny_vit, tiny_text, epochs=2)
    file = tmp_path / "featstore.toml"
    file.write_text(render_config(config))
    figures = number_formats.measure(file, layers=(0,), rounds=2, batches=2)
    found = figures["dtypes"]
    changes = [found[d]["k_txt"]["0"]["largest_logit_difference"] for d in number_formats.DTYPES]
    assert changes[0] == 0
    assert 0 < changes[1] < changes[2]
    assert changes[1] < changes[3] < 1
    assert [found[dtype]["row_bytes"] for dtype in number_formats.DTYPES] == [
        16 * 16 * 4,
        16 * 16 * 2,
        16 * 16 * 2,
        16 * (16 + 4),
    ]
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert "| int8 " in number_formats.report(figures)
    assert not (tmp_path / "data" / "cache" / "vit").exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="jax is not installed")
def test_the_compiler_counts_the_same_operations() -> None:
    program = """
import dataclasses, json, jax
from benchmarks.sizes import TINY
from benchmarks.steps import cached_stepper, random_batch
size = dataclasses.replace(TINY, width=128, mlp_dim=128)
_, stepper = cached_stepper(size.train(2), size)
batch = random_batch(8, 12, size=size)
given = (batch.inputs(), batch.labels, batch.weights)
arguments = (stepper._states(), given, stepper._numbers.array())
cost = stepper._train.lower(*arguments).compile().cost_analysis()
print(json.dumps((cost[0] if isinstance(cost, list) else cost)["flops"]))
"""
    found = json.loads(run_on_jax("-c", program).splitlines()[-1])
    size = dataclasses.replace(TINY, width=128, mlp_dim=128)
    counted = sum(operations(size, 2, 8, 12).values())
    # The compiler also counts softmax, norms, activations and dropout.
    assert counted < found * 1.02
    assert counted > found * 0.85


@pytest.mark.slow
def test_growth_measures_every_store_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def child(function: Callable[..., Any], *given: Any) -> Any:
        """Train here: its process would import Keras first."""
        asked.append(function.__name__)
        trains = function in (growth.step_seconds, growth.peak_memory)
        return function(*given) if trains else in_child(function, *given)

    monkeypatch.setattr(growth, "in_child", child)
    figures = growth.measure((64, 128), 3000, 1, 3, scratch=str(tmp_path))
    assert not list(tmp_path.iterdir())
    assert list(figures["stores"]) == ["64", "128"]
    assert figures["stores"]["64"]["ratio_to_smallest"]["median"] == 1
    assert figures["stores"]["128"]["features_bytes"] == 128 * 49 * 192 * 2
    for store in figures["stores"].values():
        assert store["peak_bytes"] >= store["anonymous_bytes"] > 0
    assert asked[1:] == ["step_seconds", "peak_memory", "peak_memory", "open_and_look_up"]
    assert figures["many"]["rows"] == 3000
    text = growth.report(figures)
    assert "| 3,000 |" in text
    assert "| 128  |" in text


def test_opening_fails_where_a_row_is_not_found(tmp_path: Path) -> None:
    spec = growth.write_parts(tmp_path, [np.ones((3, 1, 4), np.float16)], "three")
    assert growth.open_and_look_up(tmp_path, spec, ["00000002"])["open_seconds"] > 0
    with pytest.raises(ValueError, match="1 of 2 rows were not found"):
        growth.open_and_look_up(tmp_path, spec, ["00000000", "00000003"])


def test_the_loop_is_the_real_one(tmp_path: Path) -> None:
    figures = loop.measure(40, 80, 2, 1, TINY, str(tmp_path))
    assert figures["steps_an_epoch"] == 8
    assert 0 <= figures["wait_share"]["median"] < 1
    assert figures["step_seconds"]["median"] > 0
    assert "waiting for data" in loop.report(figures)


@pytest.mark.slow
def test_runs_trained_together_are_the_runs_trained_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: dict[str, float] = {}
    end = Training.end

    def record(training: Training, status: str) -> None:
        end(training, status)
        assert isinstance(training.run, Run)
        losses[training.run.name] = training.progress.history[-1]["loss"]

    monkeypatch.setattr(Training, "end", record)
    figures = together.measure(2, 2, 20, 40, 2, 1, (3,), TINY, str(tmp_path))
    assert len(losses) == 8
    for run in ("0-0-0", "0-0-1", "0-1-0", "0-1-1"):
        assert losses[f"alone-{run}"] == pytest.approx(losses[f"together-{run}"], rel=1e-4)
    assert losses["alone-0-0-0"] != losses["alone-0-0-1"]
    assert figures["whole_ratio"]["median"] > 0
    assert figures["heads"]["3"]["ratio"]["median"] > 0
    assert "| trials an hour, all included |" in together.report(figures)


def search_figures() -> dict[str, Any]:
    """Return figures of a search whose sums can be done in one's head."""
    side = {"step": 1.0, "setup": 10.0, "val_step": 0.5, "val_setup": 2.0}
    cached = {"step": 0.1, "setup": 4.0, "val_step": 0.05, "rest": 3.0}
    study = {"images": 100, "train_rows": 800, "val_rows": 100, "epochs": 2}
    return {
        "size": "tiny",
        "batch_size": 10,
        "study": {**study, "trials": [[2, 3]]},
        "images_per_second": 4.0,
        "k_txt": {
            "2": {
                "load_seconds": 5.0,
                "sentences_per_second": 100.0,
                "cached": cached,
                "end_to_end": {**side, "step": 2.0},
                "end_to_end_xla": side,
            }
        },
    }


def test_a_search_costs_the_sum_of_its_parts() -> None:
    figures = search_figures()
    sums = {
        way: sum(one * count for _, one, count in lines)
        for way, lines in search.parts(figures).items()
    }
    # Photos 25, text 5 + 9, three trials: set up 4, then 2 epochs of 80 and 10 batches, 3 to save.
    assert sums["cached"] == pytest.approx(39 + 3 * (4 + 2 * (8 + 0.5) + 3))
    assert sums["end_to_end_xla"] == pytest.approx(3 * (12 + 2 * (80 + 5)))
    assert sums["end_to_end"] == pytest.approx(3 * (12 + 2 * (160 + 5)))
    text = search.report(figures)
    assert "end to end, XLA: all, 4.9× of cached" in text


def test_caching_breaks_even_when_the_epochs_gain_what_extraction_cost() -> None:
    figures = search_figures()
    assert search.break_even(figures) == {"2": pytest.approx(39 / (85 - 8.5))}
    figures["k_txt"]["2"]["end_to_end_xla"]["step"] = 0.01
    figures["k_txt"]["2"]["end_to_end_xla"]["val_step"] = 0.01
    assert search.break_even(figures) == {"2": float("inf")}
    assert "never" in search.report(figures)


def test_processors_of_one_name_are_told_apart() -> None:
    fields = "vendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: {}\nmodel name\t: {}\n\n"
    assert processor_of(fields.format(1, "AMD EPYC") * 2) == "AMD EPYC, family 25, model 1"
    assert processor_of(fields.format(17, "AMD EPYC")) == "AMD EPYC, family 25, model 17"
    named = "AMD EPYC 7763 64-Core Processor"
    assert processor_of(fields.format(1, named)) == named
    assert processor_of("processor\t: 0\nBogoMIPS\t: 50.00\n") == ""


def run(results: Path, *arguments: str) -> str:
    done = CliRunner().invoke(benchmarks, ["--results", str(results), *arguments])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.slow
def test_what_a_command_measured_is_kept_and_printed_as_a_table(tmp_path: Path) -> None:
    shown = run(tmp_path, "roofline", "--size", "tiny", "--k-txt", "0", "--rounds", "2")
    assert "taken to the longer" in shown
    (file,) = tmp_path.glob("*.json")
    content = json.loads(file.read_text())
    assert content["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert content["roofline"]["versions"]["keras"]
    run(tmp_path, "loader", "--size", "tiny", "--rows", "100", "--rounds", "1")
    again = run(tmp_path, "tables")
    assert again.startswith(f"## {content['machine']['processor']}, ")
    assert again.index("### loader") < again.index("### roofline")
    assert shown.rpartition("kept in")[0].strip() in again


def test_figures_of_another_version_are_refused_by_name(tmp_path: Path) -> None:
    figures = {"command": "", "versions": {}, "k_txt": {"0": {}}}
    content = {"machine": {"processor": "x", "cores": 1, "memory_gb": 1}, "roofline": figures}
    (tmp_path / "x.json").write_text(json.dumps(content))
    done = CliRunner().invoke(benchmarks, ["--results", str(tmp_path), "tables"])
    assert done.exit_code == 1
    assert "run `python -m benchmarks roofline`" in done.output


def test_an_unknown_benchmark_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(benchmarks, ["--results", str(tmp_path), "all", "lop"])
    assert done.exit_code == 2
    assert "no benchmark 'lop'" in done.output


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_all_runs_each_benchmark_and_keeps_it(tmp_path: Path) -> None:
    names = ("extraction", "loop")
    run(tmp_path, "all", *names, "--size", "tiny")
    (file,) = tmp_path.glob("*.json")
    # Extraction has what feeds it measured beside it.
    kept = (*names, "feeding")
    assert {"machine", *kept} == json.loads(file.read_text()).keys()
    text = run(tmp_path, "tables")
    assert all(f"### {name}" in text for name in kept)


@pytest.mark.slow
def test_steps_measures_both_ways(tmp_path: Path) -> None:
    run(tmp_path, "steps", "--size", "tiny", "--k-txt", "1", "--rows", "8", "--rounds", "2")
    (file,) = tmp_path.glob("*.json")
    found = json.loads(file.read_text())["steps"]["k_txt"]["1"]
    for way in ("end_to_end", "end_to_end_xla"):
        low, high = found[way]["ratio_spread"]
        assert 0 < low <= found[way]["ratio"] <= high
    assert "| end to end, XLA |" in run(tmp_path, "tables")


@pytest.mark.slow
def test_search_measures_every_part(tmp_path: Path) -> None:
    study = search.Study(images=100, train_rows=160, val_rows=20, trials=((1, 2),), epochs=2)
    figures = search.measure(40, 20, 8, 16, 1, (1,), TINY, study, str(tmp_path))
    assert figures["k_txt"]["1"].keys() >= {"cached", "end_to_end_xla"}
    assert all(one >= 0 for lines in search.parts(figures).values() for _, one, _ in lines)
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert "cached: all" in search.report(figures)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="jax is not installed")
def test_the_accelerator_benchmark_runs_where_tensorflow_is_not_installed(tmp_path: Path) -> None:
    program = """
import runpy, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tensorflow", "tensorflow_text"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
common = sys.argv[1:]
for last in (["--batch-size", "4", "--photos", "8"], ["--batch-size", "8", "--photos", "0"]):
    sys.argv[:] = ["benchmarks", *common, *last]
    try:
        runpy.run_module("benchmarks", run_name="__main__")
    except SystemExit as end:
        assert not end.code
"""
    common = ["accelerator", "--size", "tiny", "--k-txt", "1", "--rounds", "1", "--steps", "2"]
    run_on_jax("-c", program, "--results", str(tmp_path), *common, "--policy", "float32")
    (file,) = tmp_path.glob("*.json")
    figures = json.loads(file.read_text())["accelerator"]
    assert figures["steps"].keys() == {"float32/4/1", "float32/8/1"}
    assert figures["extraction"].keys() == {"float32"}
    assert figures["steps"]["float32/4/1"]["end_to_end_to_device"]["median"] > 0
    assert "### accelerator" in run(tmp_path, "tables")


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_trials_measures_what_is_beside_the_steps(tmp_path: Path) -> None:
    shown = run(tmp_path, "trials", "--size", "tiny", "--search", "0", "7")
    assert "| 7 trials, k_txt 0 |" in shown
    (file,) = tmp_path.iterdir()
    (found,) = json.loads(file.read_text())["trials"]["searches"]
    low, high = found["overhead_seconds"]["spread"]
    assert 0 < low <= found["overhead_seconds"]["median"] <= high
    assert found["work_seconds"] > 0
    # The tiny encoders' weights are as small as the rest.
    assert 0 < found["weightless_trials"] <= 7
    assert found["memory_bytes"].keys() == {"after_5", "last"}
    assert found["workers_replaced"] == 0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="jax is not installed")
def test_backends_measures_both(tmp_path: Path) -> None:
    common = ("--size", "tiny", "--k-txt", "0", "--k-txt", "9", "--rounds", "1", "--steps", "2")
    shown = run(tmp_path, "backends", *common)
    (file,) = tmp_path.iterdir()
    found = json.loads(file.read_text())["backends"]["sizes"]["tiny"]
    # The encoder has four layers.
    assert found["steps"].keys() == found["first_step"].keys() == {"0"}
    step = found["steps"]["0"]
    assert step["ratio"]["median"] == pytest.approx(
        step["jax"]["median"] / step["tensorflow"]["median"], rel=0.02
    )
    assert found["first_step"]["0"]["jax"]["median"] > step["jax"]["median"]
    assert found["photos_per_second"]["tensorflow"]["median"] > 0
    assert "ViT, photos a second" in shown


@pytest.mark.slow
def test_threads_compares_one_with_all(tmp_path: Path) -> None:
    shown = run(tmp_path, "threads", "--size", "tiny", "--rounds", "1", "--steps", "2")
    (file,) = tmp_path.iterdir()
    found = json.loads(file.read_text())["threads"]["sizes"]
    assert [one["k_txt"] for one in found] == [0, 3]
    for one in found:
        taken = one["all"]["median"] / one["one"]["median"]
        assert one["ratio"]["median"] == pytest.approx(taken, rel=0.02)
    assert "| 16 wide, 8 rows, k_txt 3 |           one |" in shown


def test_what_an_accelerator_showed_is_kept_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*given: Any, progress: Any, **settings: Any) -> Any:
        base = {"device": "a GPU", "size": "tiny", "tokens": 12, "extraction": {}}
        progress("float32/32/0", {**base, "steps": {"float32/32/0": {"rows_per_second": 1}}})
        raise KeyboardInterrupt

    monkeypatch.setattr(accelerator, "device", lambda: "a GPU")
    monkeypatch.setattr(accelerator, "measure", measure)
    done = CliRunner().invoke(benchmarks, ["--results", str(tmp_path), "accelerator"])
    assert done.exit_code != 0
    kept = json.loads((tmp_path / "a-gpu.json").read_text())["accelerator"]["steps"]
    assert kept == {"float32/32/0": {"rows_per_second": 1}}


def test_the_accelerator_benchmark_says_how_to_start_it(tmp_path: Path) -> None:
    done = CliRunner().invoke(benchmarks, ["--results", str(tmp_path), "accelerator"])
    assert "KERAS_BACKEND=jax python -m benchmarks accelerator" in str(done.exception)


def test_the_documented_tables_are_those_of_the_results() -> None:
    shown = run(RESULTS, "tables")
    page = (ROOT / "docs" / "BENCHMARKS.md").read_text()
    assert page.partition("\n---\n\n")[2] == shown, "write what `benchmarks tables` prints there"
    steps = shown.partition("### steps")[2].partition("\n###")[0]
    table_lines = [line for line in steps.splitlines() if line.startswith("|")]
    assert len(table_lines) == 6
    assert "\n".join(table_lines) in (ROOT / "README.md").read_text()
