"""What `[train]` can ask for beyond a plain run: each option acts, and goes on after a stop.

Nothing here names a backend: the last test runs the others on JAX.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
from on_jax import run_on_jax
from test_resume import assert_same
from test_step import LENGTH, ROWS, random_batch, tiny_model, weights_of
from tiny_runs import tiny_config, with_train

from featstore.config import DataConfig, EncodersConfig, StoreConfig
from featstore.data.examples import Examples
from featstore.errors import ConfigError, RunError, StoppedError, UsageError
from featstore.progress import SILENT
from featstore.project import Project
from featstore.store.numbers import Numbers
from trainer.batches import Batch, CachedRows, Emphasis
from trainer.config import LOWER_IS_BETTER, MONITORS, Config, TrainConfig
from trainer.features import emphasis, oversample_line, prepare
from trainer.metrics import evaluate_logits, validation_figures
from trainer.run.adjustable import depths
from trainer.run.checkpoint import load_best
from trainer.run.engine import Engine, Engines
from trainer.run.fit import fit
from trainer.run.folder import Run
from trainer.run.optimizer import averaged, cut_learning_rate, make_optimizer, rate_scale
from trainer.run.resume import check_resumable
from trainer.run.step import Stepper, cross_entropy, make_stepper
from trainer.run.training import Reporter, Training, monitored

PLAIN = TrainConfig(lr=1e-2, weight_decay=0.1, clipnorm=0.5)
WAYS = [
    {},
    {"fast_path": False},
    {"dtype_policy": "mixed_float16"},
    {"dtype_policy": "mixed_bfloat16"},
    {"dtype_policy": "mixed_float16", "fast_path": False},
]
ways = pytest.mark.parametrize(
    "way", WAYS, ids=["fast", "plain", "mixed_float16", "mixed_bfloat16", "plain-mixed_float16"]
)


# --- which rows, and how much they say


def examples_of(hypotheses: list[str], labels: list[int]) -> Examples:
    count = len(labels)
    ids = np.array([f"photo{i}" for i in range(count)], object)
    lines, sources = np.arange(1, count + 1), np.array(["rows.csv"] * count, object)
    return Examples(ids, np.array(hypotheses, object), np.array(labels, np.int8), lines, sources)


SENTENCES = ["a dog", "a man", "two dogs", "two men", "three women", "it rains"]
EXAMPLES = examples_of(SENTENCES, [1, 0, 1, 1, 1, 1])


def test_a_row_gets_the_surplus_of_each_of_its_buckets() -> None:
    found = emphasis(TrainConfig(oversample={"gender": 1.2, "counting": 2.5}), EXAMPLES)
    np.testing.assert_allclose(found.draws, [1, 1.2, 2.5, 2.7, 2.7, 1])
    recorded = found.recorded["oversample"]
    assert recorded["rows_of_bucket"] == {"gender": 3, "counting": 3}
    assert (recorded["rows"], recorded["draws_an_epoch"]) == (6, 11.1)
    line = "oversampling: 11 draws an epoch of 6 rows; of buckets gender 3, counting 3"
    assert oversample_line(recorded) == line
    other = emphasis(TrainConfig(oversample={"counting": 2.5, "gender": 1.2}), EXAMPLES)
    assert other.recorded["oversample"]["digest"] == recorded["digest"]


def test_the_users_own_buckets_count(tmp_path: Path) -> None:
    path = tmp_path / "buckets.toml"
    path.write_text("weather = ['rains', 'snows']\n")
    own = TrainConfig(oversample={"weather": 4.0}, buckets=str(path))
    assert emphasis(own, EXAMPLES).draws.tolist() == [1, 1, 1, 1, 1, 4]
    with pytest.raises(ConfigError, match=r"unknown bucket 'gender'; known: weather"):
        emphasis(dataclasses.replace(own, oversample={"gender": 2.0}), EXAMPLES)


def test_draws_are_as_expected_and_follow_from_seed_and_epoch_alone() -> None:
    draws = np.array([1, 1.25, 2, 3.5])
    emphasised = Emphasis(np.repeat(draws, 50))
    counts = [np.bincount(emphasised.drawn(200, 7, e), minlength=200) for e in range(100)]
    assert all(
        (count >= np.floor(emphasised.draws)).all() and (count <= np.ceil(emphasised.draws)).all()
        for count in counts
    )
    mean = np.mean(counts, axis=0).reshape(4, 50).mean(axis=1)
    # Of 5,000 draws each; the deviation of their mean is at most 0.007.
    np.testing.assert_allclose(mean, draws, atol=0.03)
    assert (counts[0] != counts[1]).any()
    assert (np.bincount(emphasised.drawn(200, 8, 0)) != counts[0]).any()
    assert (np.bincount(emphasised.drawn(200, 7, 0)) == counts[0]).all()


def rows_with(emphasised: Emphasis | None, labels: np.ndarray, classes: int = 2) -> CachedRows:
    """Return rows over stores of zeros."""
    count = len(labels)
    vision = SimpleNamespace(
        row_shape=(2, 3), gather_stored=lambda at: Numbers(np.zeros((len(at), 2, 3), np.float16))
    )
    text = SimpleNamespace(
        lengths=lambda at: 3 + at % 5,
        gather_stored=lambda at, length: (
            Numbers(np.zeros((len(at), length, 3), np.float16)),
            np.ones((len(at), length), bool),
        ),
    )
    place = np.arange(count)
    options: dict[str, Any] = {"whole": True, "classes": classes, "emphasis": emphasised}
    return CachedRows(vision, text, place, place, labels, **options)


def test_labels_of_three_classes_are_smoothed_over_all_three() -> None:
    labels = np.array([2, 0, 1, 2], np.int8)
    weights = np.array([1.0, 2.0, 0.5], np.float32)
    rows = rows_with(Emphasis(class_weights=weights, label_smoothing=0.3), labels, classes=3)
    batch = rows.batch(np.arange(4), 5)
    np.testing.assert_allclose(batch.labels[:2], [[0.1, 0.1, 0.8], [0.8, 0.1, 0.1]], atol=1e-6)
    assert batch.weights.tolist() == [0.5, 1.0, 2.0, 0.5, 0.0]


def test_an_epoch_has_each_row_as_often_as_it_is_drawn() -> None:
    labels = np.zeros(60, np.int8)
    emphasised = Emphasis(np.linspace(1, 3, 60))
    rows = rows_with(emphasised, labels)
    steps = rows.epoch(8, 3, 2)
    found = np.bincount(np.concatenate(steps), minlength=60)
    np.testing.assert_array_equal(found, np.bincount(emphasised.drawn(60, 3, 2)))
    assert all(len(step) == 8 for step in steps if step is not min(steps, key=len))
    plain = rows_with(None, labels)
    assert [step.tolist() for step in plain.epoch(8, 3, 2)] != [step.tolist() for step in steps]
    ones = rows_with(Emphasis(np.ones(60)), labels)
    assert [step.tolist() for step in plain.epoch(8, 3, 2)] == [
        step.tolist() for step in ones.epoch(8, 3, 2)
    ]


def test_class_weights_are_inverse_to_what_is_drawn_or_as_given() -> None:
    def of(**given: Any) -> list[float]:
        return [round(float(x), 6) for x in emphasis(TrainConfig(**given), EXAMPLES).class_weights]

    assert of(class_weights="balanced") == [3.0, 0.6]
    drawn = {"class_weights": "balanced", "oversample": {"gender": 3.0}}
    assert of(**drawn) == [round(12 / 6, 6), round(12 / 18, 6)]
    assert of(class_weights={"entailment": 2.0}) == [1.0, 2.0]
    with pytest.raises(ConfigError, match=r"unknown label 'entailed' \(did you mean 'entailment'"):
        of(class_weights={"entailed": 2.0})


def test_weights_and_smoothing_are_in_the_loss() -> None:
    labels = np.array([1, 0, 1, 1, 0], np.int8)
    given = Emphasis(None, np.array([2.0, 0.5], np.float32), 0.2)
    batch = rows_with(given, labels).batch(np.arange(5), 8)
    np.testing.assert_allclose(batch.weights, [0.5, 2, 0.5, 0.5, 2, 0, 0, 0])
    logits = np.array([0.3, -2, 4, -1, 0.1, 9, 9, 9], np.float32)
    smooth = keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=0.2, reduction=None)
    losses = np.asarray(smooth(labels[:, None].astype("float32"), logits[:5, None]))
    weights = np.where(labels == 1, 0.5, 2)
    expected = (losses * weights).sum() / weights.sum()
    found = float(cross_entropy(batch.labels, logits, batch.weights))
    assert found == pytest.approx(expected, rel=1e-6)
    assert rows_with(None, labels).batch(np.arange(5), 5).labels.tolist() == [1, 0, 1, 1, 0]


# --- the rate, the gradient and the average of a step


def trained(settings: TrainConfig, batches: list[Batch], steps: int = 0) -> list[np.ndarray]:
    """Train on batches, of an epoch of so many steps; return the weights."""
    model = tiny_model(settings.dtype_policy)
    optimizer = make_optimizer(settings)
    stepper = make_stepper([(model, optimizer)])
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    for done, batch in enumerate(batches):
        if steps:
            inner.rate_scale = rate_scale(settings, done / steps)
        stepper.train(batch)
    stepper.sync()
    with averaged(model, optimizer):
        return weights_of(model)


def assert_close(found: list[np.ndarray], expected: list[np.ndarray], atol: float = 2e-6) -> None:
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=atol)


def joined(*batches: Batch) -> Batch:
    def rows(values: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(values)

    return Batch(
        Numbers(rows([b.features.values for b in batches])),
        Numbers(rows([b.hidden.values for b in batches])),
        rows([b.padding_mask for b in batches]),
        rows([b.labels for b in batches]),
        rows([b.weights for b in batches]),
        np.arange(len(batches) * ROWS),
    )


@pytest.mark.parametrize("warmup", [0, 1.5])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_schedules_are_keras_own(schedule: str, warmup: float) -> None:
    train = TrainConfig(lr=0.02, min_lr=0.002, epochs=5, lr_schedule=schedule, warmup_epochs=warmup)
    steps, rise = 8, round(8 * warmup)
    kinds = keras.optimizers.schedules
    if schedule == "cosine":
        oracle: Any = kinds.CosineDecay(
            0.0 if warmup else 0.02,
            5 * steps - rise,
            alpha=0.1,
            warmup_target=0.02 if warmup else None,
            warmup_steps=rise,
        )
    else:
        fall = kinds.PolynomialDecay(0.02, 5 * steps - rise, end_learning_rate=0.002)

        def oracle(step: int) -> Any:
            return fall(step - rise) if step >= rise else 0.02 * step / rise

    for step in range(5 * steps + 1):
        found = 0.02 * rate_scale(train, step / steps)
        assert found == pytest.approx(float(oracle(step)), rel=1e-5, abs=1e-9), step


def test_a_warm_up_alone_ends_at_the_rate_and_must_end() -> None:
    train = TrainConfig(warmup_epochs=2.0)
    assert [rate_scale(train, epochs) for epochs in (0, 0.5, 1, 2, 7)] == [0, 0.25, 0.5, 1, 1]


@ways
def test_a_scheduled_step_has_its_rate(way: dict[str, Any]) -> None:
    """The weights are those that Keras's AdamW has with Keras's schedule."""
    train = dataclasses.replace(PLAIN, lr_schedule="cosine", warmup_epochs=0.5, epochs=2, **way)
    batches = [random_batch(seed) for seed in range(8)]
    found = trained(train, batches, steps=4)
    oracle = tiny_model(train.dtype_policy)
    rate = keras.optimizers.schedules.CosineDecay(0.0, 6, warmup_target=1e-2, warmup_steps=2)
    own = keras.optimizers.AdamW(rate, weight_decay=0.1, clipnorm=0.5)
    if train.dtype_policy == "mixed_float16":
        own = keras.optimizers.LossScaleOptimizer(own)
    oracle.compile(own, keras.losses.BinaryCrossentropy(from_logits=True), jit_compile=False)
    for batch in batches:
        oracle.train_on_batch(batch.inputs(), batch.labels[:, None])
    assert_close(found, weights_of(oracle), 1e-5 if not way.get("dtype_policy") else 2e-3)
    constant = trained(dataclasses.replace(PLAIN, **way), batches)
    assert max(np.abs(a - b).max() for a, b in zip(found, constant, strict=True)) > 1e-2


@ways
def test_accumulated_steps_are_one_of_all_their_rows(way: dict[str, Any]) -> None:
    once = dataclasses.replace(PLAIN, **way)
    train = dataclasses.replace(once, accumulate_steps=2)
    batches = [random_batch(seed) for seed in range(4)]
    start = weights_of(tiny_model(once.dtype_policy))
    for one, two in zip(trained(train, batches[:1]), start, strict=True):
        np.testing.assert_array_equal(one, two)
    expected = trained(once, [joined(*batches[:2]), joined(*batches[2:])])
    assert_close(trained(train, batches), expected, 2e-5 if "dtype_policy" not in way else 2e-3)
    assert max(np.abs(a - b).max() for a, b in zip(expected, start, strict=True)) > 1e-2


@ways
def test_the_average_is_of_the_weights_after_each_step(way: dict[str, Any]) -> None:
    train = dataclasses.replace(PLAIN, ema_momentum=0.7, **way)
    model = tiny_model(train.dtype_policy)
    optimizer = make_optimizer(train)
    stepper = make_stepper([(model, optimizer)])
    expected: list[np.ndarray] = []
    for seed in range(5):
        stepper.train(random_batch(seed))
        stepper.sync()
        now = weights_of(model)
        expected = [0.7 * a + 0.3 * w for a, w in zip(expected or now, now, strict=True)]
        with averaged(model, optimizer):
            assert_close(weights_of(model), expected)
        for one, two in zip(weights_of(model), now, strict=True):
            np.testing.assert_array_equal(one, two)
    plain = trained(dataclasses.replace(PLAIN, **way), [random_batch(seed) for seed in range(5)])
    assert_close(plain, now, 1e-6)


# Row shape of the image features.
SHAPE = (16, 16)


def moved(engine: Engine, stepper: Stepper, train: TrainConfig) -> list[np.ndarray]:
    """Return how the weights of a cached model move in a run's first step."""
    engine.reset(train)
    stepper.forget()
    before = weights_of(engine.model)
    rng = np.random.default_rng(0)
    features = Numbers(rng.normal(size=(ROWS, *SHAPE)).astype(np.float16))
    hidden = Numbers(rng.normal(size=(ROWS, LENGTH, SHAPE[1])).astype(np.float16))
    stepper.train(dataclasses.replace(random_batch(0), features=features, hidden=hidden))
    stepper.sync()
    return [b - a for a, b in zip(before, weights_of(engine.model), strict=True)]


@pytest.mark.parametrize(
    "way",
    [{}, *(pytest.param(way, marks=pytest.mark.slow) for way in WAYS[1:3])],
    ids=["fast", "plain", "mixed_float16"],
)
def test_each_text_layer_has_its_own_rate(way: dict[str, Any], tiny_text: Path) -> None:
    """Each moves, and decays, as all do at its rate."""
    sizes = {"num_heads": 2, "head_dim": 4, "mlp_dim": 8, "k_txt": 2, "dropout": 0.0}
    train = dataclasses.replace(PLAIN, layer_decay=0.5, **sizes, **way)
    same = dataclasses.replace(train, layer_decay=1.0)
    config = Config(DataConfig(), EncodersConfig(text=str(tiny_text)), StoreConfig(), train)
    engine, uniform = (Engine(Config.of(config, one), SHAPE) for one in (train, same))
    steppers = [make_stepper([(one.model, one.optimizer)]) for one in (engine, uniform)]
    model, found = engine.model, moved(engine, steppers[0], train)
    of_depth = [
        moved(uniform, steppers[1], dataclasses.replace(same, lr=1e-2 * 0.5**depth))
        for depth in range(3)
    ]
    where, told = depths(model), [0.0] * 3
    assert sorted(set(where)) == [0, 1, 2]
    for i, depth in enumerate(where):
        np.testing.assert_allclose(found[i], of_depth[depth][i], rtol=1e-4, atol=3e-7)
        others = [np.abs(found[i] - of_depth[d][i]).max() for d in range(3) if d != depth]
        told[depth] = max(told[depth], min(others))
    assert min(told) > 1e-4
    names = [variable.path for variable in model.trainable_variables]
    layers = {name.split("/")[1]: depth for name, depth in zip(names, where, strict=True) if depth}
    assert layers == {"transformer_layer_2": 2, "transformer_layer_3": 1}


def test_a_cut_stops_at_the_lowest_rate() -> None:
    optimizer = make_optimizer(dataclasses.replace(PLAIN, min_lr=4e-3))
    for expected in (5e-3, 4e-3, 4e-3):
        cut_learning_rate(optimizer, 0.5, 4e-3)
        assert float(np.asarray(optimizer.learning_rate)) == pytest.approx(expected)
    cut_learning_rate(optimizer, 0.5, 1.0)
    assert float(np.asarray(optimizer.learning_rate)) == pytest.approx(4e-3)


# --- what chooses the epoch


def test_every_figure_of_validation_can_be_monitored() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 60)
    poor, good = rng.normal(size=60), (2 * labels - 1) * 3 + rng.normal(size=60)
    figures = [validation_figures(evaluate_logits(labels, logits)) for logits in (poor, good)]
    assert set(figures[0]) == set(MONITORS)
    assert set(LOWER_IS_BETTER) < set(MONITORS)
    for name in MONITORS:
        values = [monitored(TrainConfig(monitor=name), record) for record in figures]
        assert values[0] < values[1], name
    found = evaluate_logits(labels, good)["at_threshold"]["entailment"]
    assert figures[1]["val_f1"] == found["f1"]


# --- whole runs


@dataclasses.dataclass
class Place:
    """A project with its features, a folder of runs, and the models that serve them all."""

    config: Config
    project: Project
    runs: Path
    engines: Engines = dataclasses.field(default_factory=Engines)

    def train(self, name: str, reporter: Reporter | None = None, **options: Any) -> Run:
        """Train a run, or go on with it."""
        run = Run(self.runs / name)
        train = dataclasses.replace(self.config.train, **options)
        prepare(self.project, train.k_txt)
        with run.writing():
            training = Training(run, self.project, train, None, reporter, engines=self.engines)
            try:
                fit(training)
            finally:
                training.release()
        return run


@pytest.fixture(scope="module")
def place(tiny_vit: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("options")
    config = tiny_config(folder / "data", tiny_vit, tiny_text, epochs=2, keep_state=True)
    project = Project(config)
    project.extract("vit", show=SILENT)
    return Place(config, project, folder / "runs")


ROWS_OF_RUN = {
    "oversample": {"gender": 1.5, "negation": 2.0},
    "class_weights": {"entailment": 2.0},
    "label_smoothing": 0.1,
}
RATES = {"lr_schedule": "cosine", "warmup_epochs": 0.5, "layer_decay": 0.5, "k_txt": 1}
AVERAGES = {"accumulate_steps": 3, "ema_momentum": 0.8, "monitor": "val_brier"}
ALL = {**ROWS_OF_RUN, **RATES, **AVERAGES}
RUNS: dict[str, dict[str, Any]] = {
    "rows": ROWS_OF_RUN,
    "averages-mixed_float16": {**AVERAGES, "dtype_policy": "mixed_float16"},
    "all-mixed_bfloat16": {**ALL, "dtype_policy": "mixed_bfloat16"},
    "all-plain": {**ALL, "lr_schedule": "linear", "fast_path": False},
}


@pytest.mark.parametrize("number", RUNS)
def test_a_resumed_run_is_the_unbroken_one(place: Place, number: str) -> None:
    options = RUNS[number]
    whole = place.train(f"whole-{number}", **options)
    asked = itertools.count(1)
    steps = int(whole.history["steps"][0])
    # In the second epoch, between the steps of one update.
    stopping = Reporter(stopping=lambda: next(asked) >= steps + 2)
    with pytest.raises(StoppedError):
        place.train(f"stopped-{number}", reporter=stopping, **options)
    run = place.train(f"stopped-{number}", **options)
    assert len(run.history) == 2
    assert_same(run, whole)
    for key in ("oversample", "class_weights"):
        assert (key in run.manifest) == (key in options)
        assert run.manifest.get(key) == whole.manifest.get(key)


@pytest.fixture(scope="module")
def bare(place: Place) -> Run:
    return place.train("bare")


@pytest.mark.parametrize(
    "option",
    [
        {"oversample": {"negation": 2.0}},
        {"class_weights": {"entailment": 3.0}},
        {"label_smoothing": 0.2},
        {"lr_schedule": "linear"},
        {"warmup_epochs": 1.0},
        {"accumulate_steps": 2},
        {"ema_momentum": 0.9},
    ],
    ids=str,
)
def test_each_option_changes_a_run(place: Place, bare: Run, option: dict[str, Any]) -> None:
    (name,) = option
    run = place.train(f"with-{name}", **option)
    assert run.history["val_loss"].tolist() != bare.history["val_loss"].tolist()
    assert run.config.train == dataclasses.replace(bare.config.train, **option)


def test_the_average_is_what_is_judged_and_kept(place: Place) -> None:
    run = place.train("averaged", ema_momentum=0.9, epochs=1)
    kept = load_best(run).trainable_variables
    with np.load(run.checkpoint_path) as state:
        raw = [state[f"model/{i}"] for i in range(len(kept))]
        state_of = [state[f] for f in state.files if f.startswith("optimizer/")]
    for weight, other in zip(kept, raw, strict=True):
        weight = np.asarray(weight)
        assert any(one.shape == weight.shape and (one == weight).all() for one in state_of)
        assert weight.shape == other.shape
    assert any((np.asarray(w) != other).any() for w, other in zip(kept, raw, strict=True))
    logits = place.train("averaged-again", ema_momentum=0.9, epochs=1).metrics["loss"]
    assert run.metrics["loss"] == logits == run.history["val_loss"][0]


def test_a_plateau_is_cut_to_the_lowest_rate(place: Place) -> None:
    """After the cut to almost nothing, the figures stand still."""
    settings = {"lr": 0.3, "reduce_lr_patience": 1, "early_stop_patience": 9, "epochs": 6}
    run = place.train("cut", **settings, reduce_lr_factor=1e-9, min_lr=1e-9, weight_decay=0.0)
    rates, losses = run.history["lr"].tolist(), run.history["val_loss"].tolist()
    first = next(i for i, rate in enumerate(rates) if rate < 0.3)
    assert rates[first:] == [1e-9] * (6 - first)
    assert losses[first:] == pytest.approx([losses[first]] * (6 - first), rel=1e-5)
    held = place.train("held", **settings, reduce_lr_factor=1e-9, lr_schedule="constant")
    assert held.history["lr"].tolist() == [0.3] * 6


def test_the_rate_of_a_run_is_what_its_schedule_says(place: Place) -> None:
    run = place.train("linear", lr_schedule="linear", epochs=3, lr=1e-3)
    steps = int(run.history["steps"][0])
    last = [(e + (steps - 1) / steps) / 3 for e in range(3)]
    np.testing.assert_allclose(run.history["lr"], [1e-3 * (1 - done) for done in last], rtol=1e-6)
    longer = with_train(run.config, epochs=4)
    with pytest.raises(UsageError, match=r"learning rate falls until epoch 3 \(lr_schedule linear"):
        check_resumable(run, longer)
    with pytest.raises(ConfigError, match=r"warmup_epochs must be below epochs, which is 2; found"):
        place.train("rising", warmup_epochs=2.0)
    with pytest.raises(ConfigError, match=r"accumulate_steps must be at most .* 2 epochs of 8;"):
        place.train("idle", accumulate_steps=17)


def test_the_best_epoch_is_that_of_the_monitor(place: Place) -> None:
    run = place.train("brier", monitor="val_brier", epochs=3, lr=0.05)
    assert run.metrics["monitor"] == "val_brier"
    assert run.metrics["epoch"] == 1 + int(np.argmin(run.history["val_brier"]))


def test_other_buckets_of_the_same_name_are_noticed(place: Place, tmp_path: Path) -> None:
    path = tmp_path / "buckets.toml"
    path.write_text("animals = ['dog']\n")
    settings = {"oversample": {"animals": 2.0}, "buckets": str(path)}
    asked = itertools.count(1)
    with pytest.raises(StoppedError):
        place.train("own", reporter=Reporter(stopping=lambda: next(asked) >= 3), **settings)
    path.write_text("animals = ['dog', 'cat']\n")
    with pytest.raises(RunError, match="the buckets changed since the run was started"):
        place.train("own", **settings)


def test_runs_of_other_numbers_share_a_graph_and_are_as_alone(place: Place) -> None:
    """A rate, a decay, a momentum and weights of rows are arguments of the graph."""
    base = {**RATES, **AVERAGES, "epochs": 1}
    changes = {"layer_decay": 0.8, "ema_momentum": 0.5, "min_lr": 1e-3, "lr_schedule": "linear"}
    other = {**base, **changes, **ROWS_OF_RUN}
    place.train("before", **base)
    steppers = list(place.engines._steppers)
    after = place.train("after", **other)
    assert place.engines._steppers == steppers
    place.engines = Engines()
    assert_same(after, place.train("alone", **other))


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("jax") is None or keras.backend.backend() == "jax",
    reason="jax is not installed, or runs this",
)
def test_all_of_it_on_jax() -> None:
    """Each option once; a number format where it has a graph of its own."""
    formats = "(accumulated and mixed_float16) or (unbroken and mixed_bfloat16)"
    which = f"(fast or {formats} or plateau) and not plain"
    run_on_jax("-m", "pytest", "-q", "-n", "0", __file__, "-k", which)
