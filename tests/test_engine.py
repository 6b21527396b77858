"""A model that served other runs gives the next one what a new model would give, bit for bit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from on_jax import run_on_jax

from featstore.config import DataConfig, EncodersConfig, StoreConfig
from featstore.encoders.presets import resolve_preset
from featstore.project import Project
from tests.tiny_runs import prepared, tiny_config, with_train
from trainer.config import Config, TrainConfig, render_config
from trainer.model import cached
from trainer.model.cached import build_cached_model, load_pretrained
from trainer.model.sizes import count_parameters
from trainer.model.weights import random_state
from trainer.run.engine import Engine, Engines, architecture
from trainer.run.fit import fit, train_together
from trainer.run.folder import Run
from trainer.run.optimizer import make_optimizer
from trainer.run.training import Training

ROW_SHAPE = (16, 16)
# What may change from one run to the next of an architecture.
CHANGING = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32),
        "lr": st.floats(1e-5, 1e-2),
        "weight_decay": st.floats(1e-6, 0.1),
        "clipnorm": st.floats(0.01, 3.0),
        "dropout": st.floats(0.01, 0.9),
        "attention_dropout": st.floats(0.01, 0.9),
    }
)


def config_of(text: Path, **train: Any) -> Config:
    sizes = {"num_heads": 2, "head_dim": 4, "mlp_dim": 8, "k_txt": 2}
    return Config(
        DataConfig(), EncodersConfig(text=str(text)), StoreConfig(), TrainConfig(**sizes | train)
    )


def arrays(variables: Any) -> list[np.ndarray]:
    return [np.asarray(variable) for variable in variables]


def assert_as_new(engine: Engine, config: Config) -> None:
    """Compare everything of an engine with a model and an optimizer that are made now."""
    preset, train = resolve_preset(config.encoders.text), config.train
    model = build_cached_model(
        preset.config, ROW_SHAPE[1], ROW_SHAPE[0], train, feature_dtype=config.store.dtype
    )
    load_pretrained(model, preset)
    optimizer = make_optimizer(train)
    optimizer.build(model.trainable_variables)
    for ours, theirs in (
        (engine.model.variables, model.variables),
        (engine.optimizer.variables, optimizer.variables),
    ):
        for one, two in zip(arrays(ours), arrays(theirs), strict=True):
            np.testing.assert_array_equal(one, two)
    for one, two in zip(
        random_state(engine.model).values(), random_state(model).values(), strict=True
    ):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    "fixed",
    [
        {"k_txt": 0},
        {"k_txt": 3, "fast_path": False},
        {"k_txt": 1, "dtype_policy": "mixed_float16"},
        {"k_txt": 4, "dtype_policy": "mixed_bfloat16", "num_heads": 4},
        {"k_txt": 1, "dtype_policy": "mixed_float16", "accumulate_steps": 2, "ema_momentum": 0.9},
        {"k_txt": 0, "queries": "all", "fusion_layers": 2},
    ],
    ids=str,
)
def test_reset_is_as_new(tiny_text: Path, fixed: dict[str, Any]) -> None:
    engine = Engine(config_of(tiny_text, **fixed), ROW_SHAPE)
    rng = np.random.default_rng(0)

    @settings(max_examples=6, deadline=None)
    @given(CHANGING)
    def check(changes: dict[str, Any]) -> None:
        for variable in (*engine.model.variables, *engine.optimizer.variables):
            variable.assign(rng.integers(1, 5, variable.shape).astype(variable.dtype))
        config = config_of(tiny_text, **fixed | changes)
        engine.reset(config.train)
        assert_as_new(engine, config)

    check()


# --- whole runs


@pytest.fixture(scope="module")
def project(
    tiny_vit: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Project, Config]:
    config = tiny_config(tmp_path_factory.mktemp("engine"), tiny_vit, tiny_text, epochs=1)
    for k_txt in (0, 2):
        made = prepared(with_train(config, k_txt=k_txt))
    return made, config


def run_of(
    place: tuple[Project, Config], folder: Path, train: TrainConfig, engines: Engines | None = None
) -> dict[str, Any]:
    """Train a run; return all that its folder and its model say."""
    run = Run(folder)
    with run.writing():
        training = Training(run, place[0], train, engines=engines)
        fit(training)
    found = {
        "history": [
            {key: value for key, value in record.items() if "seconds" not in key}
            | {"wait_share": None}
            for record in training.progress.history
        ],
        "metrics": dict(run.metrics),
        "weights": arrays(training.model.trainable_variables),
    }
    training.release()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("k_txt", [0, 2])
def test_a_run_after_another_is_as_alone(
    project: tuple[Project, Config], tmp_path: Path, k_txt: int
) -> None:
    """Over pairs of runs, of the same model and of others in between."""
    engines, number = Engines(), 0

    @settings(max_examples=3, deadline=None)
    @given(CHANGING, st.sampled_from([8, 12]))
    def check(changes: dict[str, Any], mlp_dim: int) -> None:
        nonlocal number
        number += 1
        train = dataclasses.replace(project[1].train, k_txt=k_txt, mlp_dim=mlp_dim, **changes)
        after = run_of(project, tmp_path / f"after-{number}", train, engines)
        alone = run_of(project, tmp_path / f"alone-{number}", train)
        assert after["history"] == alone["history"]
        assert after["metrics"] == alone["metrics"]
        for one, two in zip(after["weights"], alone["weights"], strict=True):
            np.testing.assert_array_equal(one, two)

    check()
    assert len(engines._idle) <= 2


@pytest.mark.slow
def test_runs_together_are_served_again(project: tuple[Project, Config], tmp_path: Path) -> None:
    """A second group of the same architecture is not traced again, and ends as the first did."""
    engines, ends = Engines(), []
    for group in "ab":
        trainings = [
            Training(
                Run(tmp_path / f"{group}{i}"),
                project[0],
                dataclasses.replace(project[1].train, lr=lr, dropout=dropout),
                engines=engines,
            )
            for i, (lr, dropout) in enumerate(((1e-3, 0.1), (3e-3, 0.3), (2e-3, 0.0)))
        ]
        assert train_together(trainings) == [None] * 3
        ends.append([arrays(training.model.trainable_variables) for training in trainings])
        for training in trainings:
            training.release()
    assert len(engines._steppers) == 1
    for first, second in zip(*ends, strict=True):
        for one, two in zip(first, second, strict=True):
            np.testing.assert_array_equal(one, two)


def test_engines_are_shared_by_architecture_alone(tiny_text: Path) -> None:
    base = config_of(tiny_text)
    same = architecture(base, ROW_SHAPE, "t")
    for changes in ({"lr": 1.0}, {"dropout": 0.3}, {"weight_decay": 0.5}, {"seed": 9}):
        assert architecture(with_train(base, **changes), ROW_SHAPE, "t") == same
    for changes in (
        {"dropout": 0.0, "attention_dropout": 0.1},
        {"mlp_dim": 9},
        {"head_dim": 8},
        {"k_txt": 1},
        {"dtype_policy": "mixed_bfloat16"},
        {"weight_decay": 0.0},
        {"clipnorm": 0.0},
        {"fast_path": False},
        {"queries": "all"},
        {"fusion_layers": 2},
    ):
        assert architecture(with_train(base, **changes), ROW_SHAPE, "t") != same
    options = [
        ({"lr_schedule": "linear"}, {"lr_schedule": "cosine", "warmup_epochs": 1.0}),
        ({"layer_decay": 0.5}, {"layer_decay": 0.9}),
        ({"ema_momentum": 0.5}, {"ema_momentum": 0.9}),
    ]
    for one, other in options:
        first = architecture(with_train(base, **one), ROW_SHAPE, "t")
        assert first == architecture(with_train(base, **other), ROW_SHAPE, "t") != same
    for changes in ({"oversample": {"gender": 2.0}}, {"class_weights": "balanced"}):
        assert architecture(with_train(base, **changes), ROW_SHAPE, "t") == same
    assert architecture(with_train(base, accumulate_steps=2), ROW_SHAPE, "t") != same
    plain = with_train(base, fast_path=False)
    assert architecture(plain, ROW_SHAPE, "t") != architecture(
        with_train(plain, dropout=0.3), ROW_SHAPE, "t"
    )
    assert architecture(base, ROW_SHAPE, "u") != same
    of_three = dataclasses.replace(base, data=dataclasses.replace(base.data, classes=3))
    assert architecture(of_three, ROW_SHAPE, "t") != same
    assert architecture(base, (17, 16), "t") != same


def test_few_engines_are_kept_and_none_twice(tiny_text: Path) -> None:
    engines = Engines(kept=1)
    first = engines.take(config_of(tiny_text, k_txt=0), ROW_SHAPE, "t")
    other = engines.take(config_of(tiny_text, k_txt=0), ROW_SHAPE, "t")
    assert first is not other
    engines.give_back(first)
    engines.give_back(first)
    assert engines.take(config_of(tiny_text, k_txt=0, seed=3), ROW_SHAPE, "t") is first
    engines.give_back(other)
    engines.give_back(first)
    assert engines.take(config_of(tiny_text, k_txt=0), ROW_SHAPE, "t") is first
    assert engines.take(config_of(tiny_text, k_txt=0), ROW_SHAPE, "t") is not other


def test_large_engines_are_let_go_of_first(
    tiny_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = Engines()
    made = [engines.take(config_of(tiny_text, mlp_dim=n), ROW_SHAPE, "t") for n in (4, 5, 6)]
    for engine in made:
        engines.give_back(engine)
    assert engines.bytes == sum(engine.bytes for engine in made) > 0
    monkeypatch.setattr("trainer.run.engine.KEPT_BYTES", made[0].bytes)
    first = engines.take(config_of(tiny_text, mlp_dim=4), ROW_SHAPE, "t")
    assert first is made[0]
    engines.give_back(first)
    # The last one is kept whatever it takes.
    assert engines.bytes == first.bytes


JAX = """
import sys
from pathlib import Path
import dataclasses, json
import numpy as np
from featstore.errors import RunError
from featstore.project import Project
from trainer.config import load_config
from trainer.features import prepare
from trainer.run.engine import Engines
from trainer.run.fit import fit
from trainer.run.folder import Run
from trainer.run.training import Training
config, runs = load_config(sys.argv[1]), Path(sys.argv[2])
project = Project(config)
prepare(project, config.train.k_txt)
def run(name, engines, **changes):
    train = dataclasses.replace(config.train, **changes)
    training = Training(Run(runs / name), project, train, engines=engines)
    try:
        fit(training)
    except RunError:
        assert name == "diverged"
        return training.release()
    training.release()
    return [np.asarray(v).tolist() for v in training.model.trainable_variables]
engines = Engines()
first = run("first", engines, lr=0.002, dropout=0.2)
run("diverged", engines, lr=1e30, clipnorm=1.0)
assert run("again", engines, lr=0.002, dropout=0.2) == first
assert run("alone", None, lr=0.002, dropout=0.2) == first
assert len(engines._steppers) == 1
print("same")
"""


@pytest.mark.slow
def test_on_jax_a_run_after_another_is_as_alone(
    project: tuple[Project, Config], tmp_path: Path
) -> None:
    """Also after one that diverged, whose last steps were never written back."""
    config = tmp_path / "config.toml"
    config.write_text(render_config(with_train(project[1], k_txt=1)))
    assert run_on_jax("-c", JAX, str(config), str(tmp_path)).endswith("same\n")


# --- pretrained layers, sizes


def test_pretrained_layers_are_read_alone(
    tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = resolve_preset(str(tiny_text))
    models = [
        build_cached_model(preset.config, 16, 16, config_of(tiny_text, k_txt=3).train)
        for _ in range(2)
    ]
    cached.load_text_layers(models[0], cached.load_backbone(preset, "float32"))
    monkeypatch.setattr(cached, "load_backbone", lambda *args: pytest.fail("the whole backbone"))
    load_pretrained(models[1], preset)
    for one, two in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.slow
def test_real_pretrained_layers_are_read_alone(
    shared_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = resolve_preset(str(shared_dir / "presets" / "distil_bert_minilm_l6_en_uncased"))
    train = TrainConfig(k_txt=4)
    models = [build_cached_model(preset.config, 384, 196, train) for _ in range(2)]
    cached.load_text_layers(models[0], cached.load_backbone(preset, "float32"))
    monkeypatch.setattr(cached, "load_backbone", lambda *args: pytest.fail("the whole backbone"))
    load_pretrained(models[1], preset)
    for one, two in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    "train",
    [
        {"k_txt": 0},
        {"k_txt": 3, "mlp_dim": 5},
        {"k_txt": 1, "num_heads": 0, "head_dim": 8},
        {"k_txt": 4, "num_heads": 3, "head_dim": 5},
        {"k_txt": 1, "queries": "all", "fusion_layers": 3},
    ],
    ids=json.dumps,
)
@pytest.mark.parametrize("classes", [2, 3])
def test_parameters_are_counted_without_a_model(
    tiny_text: Path, train: dict[str, Any], classes: int
) -> None:
    config = config_of(tiny_text, **train)
    text = resolve_preset(str(tiny_text)).config
    model = build_cached_model(text, 24, 16, config.train, classes=classes)
    expected = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    assert count_parameters(text, {"hidden_dim": 24}, config.train, classes) == expected


def test_the_study_has_its_parameters() -> None:
    text = {"config": {"hidden_dim": 768, "intermediate_dim": 3072}}
    vision = {"hidden_dim": 768}
    head = {"k_txt": 0, "num_heads": 12, "head_dim": 64, "mlp_dim": 512}
    assert count_parameters(text, vision, TrainConfig(**head)) == 2_758_145
    # A fusion layer: four projections of 768 and a normalisation.
    more = count_parameters(text, vision, TrainConfig(**head, fusion_layers=2))
    assert more - 2_758_145 == 4 * (768**2 + 768) + 2 * 768
    assert count_parameters(text, vision, TrainConfig(**head), 3) - 2_758_145 == 2 * 513
    layer = count_parameters(text, vision, TrainConfig(k_txt=1)) - count_parameters(
        text, vision, TrainConfig(k_txt=0)
    )
    assert layer == 7_087_872


def test_nothing_of_keras_is_left_changed(tiny_text: Path) -> None:
    before = keras.layers.Layer.add_weight
    Engine(config_of(tiny_text, k_txt=0), ROW_SHAPE)
    assert keras.layers.Layer.add_weight is before
