"""What a search varies: every kind of distribution, every wrong space, flags, grids."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import optuna
import pytest

from featstore.errors import ConfigError
from featstore.settings import hints
from trainer.config import Config, TrainConfig
from trainer.tuning.space import Space, space_from_json
from trainer.tuning.space_file import read_space

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "study-search.toml"


def space_of(folder: Path, text: str, search: Any = None, **flags: Any) -> Space:
    path = folder / "space.toml"
    path.write_text(text)
    return read_space(path, search or {}, flags)


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("lr = {uniform = [0.1, 0.5]}", "lr", optuna.distributions.FloatDistribution(0.1, 0.5)),
        (
            "lr = {log_uniform = [1e-5, 1e-3]}",
            "lr",
            optuna.distributions.FloatDistribution(1e-5, 1e-3, log=True),
        ),
        (
            "dropout = {uniform = [0, 0.5], step = 0.25}",
            "dropout",
            optuna.distributions.FloatDistribution(0, 0.5, step=0.25),
        ),
        (
            "mlp_dim = {int = [256, 1024], step = 256}",
            "mlp_dim",
            optuna.distributions.IntDistribution(256, 1024, step=256),
        ),
        (
            "batch_size = {log_int = [8, 128]}",
            "batch_size",
            optuna.distributions.IntDistribution(8, 128, log=True),
        ),
        (
            "k_txt = {choice = [2, 3]}",
            "k_txt",
            optuna.distributions.CategoricalDistribution([2, 3]),
        ),
    ],
)
def test_every_kind_is_optunas(tmp_path: Path, text: str, name: str, expected: Any) -> None:
    (parameter,) = space_of(tmp_path, f"[train]\n{text}\n").parameters
    assert (parameter.name, parameter.distribution()) == (name, expected)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[trian]\nlr = 1e-4", "unknown section 'trian' (did you mean 'train'?)"),
        ("[train]\nlrr = {uniform = [0, 1]}", "unknown setting 'lrr' in [train]"),
        ("[train]\nlr = {unifrom = [0, 1]}", "unknown distribution 'unifrom'"),
        ("[train]\nlr = {uniform = [0.5, 0.1]}", "low < high"),
        ("[train]\nlr = {log_uniform = [0.0, 0.1]}", "above 0"),
        ("[train]\nlr = {uniform = [0.1]}", "must be [low, high]"),
        ("[train]\nlr = {uniform = 0.1}", "must be a list"),
        ('[train]\nlr = {uniform = ["a", "b"]}', "must be [low, high]"),
        ("[train]\nlr = {choice = []}", "must be a list"),
        ("[train]\nk_txt = {choice = [2, 2]}", "repeats 2"),
        ('[train]\nk_txt = {choice = ["two"]}', "k_txt"),
        ("[train]\nk_txt = {uniform = [0, 3]}", "is not a float"),
        ("[train]\nmonitor = {int = [0, 3]}", "is not a number"),
        ("[train]\ndropout = {uniform = [0.0, 2.0]}", "dropout"),
        ("[train]\ndropout = {uniform = [0.0, 0.5], step = 0.3}", "does not lead"),
        ("[train]\ndropout = {uniform = [0.0, 0.5], step = 0}", "step must be above 0"),
        ("[train]\nlr = {log_uniform = [1e-5, 1e-3], step = 1e-5}", "has no step"),
        ("[train]\nk_txt = {choice = [2, 3], step = 1}", "choice has no step"),
        ("[train]\nlr = {uniform = [0, 1], choice = [1]}", "must have one of"),
        ('[data]\nrows = "x"', "[data] is not searched"),
        ('[store]\nroot = {choice = ["a", "b"]}', "cannot be searched"),
        ("[train]\nlr = 1e-4", "nothing to search"),
        ("[search]\ntrails = 3\n[train]\nlr = {uniform = [0, 1]}", "trails"),
        ('[search]\nsampler = "grid"\n[train]\nlr = {uniform = [0.1, 1]}', "no finite set"),
        (
            '[search]\nsampler = "grid"\n[train]\nseed = {int = [0, 99999]}',
            "has 100000 values, more than 10000",
        ),
        (
            "[[search.enqueue]]\nlr = 9.0\n[train]\nlr = {uniform = [0.1, 1]}",
            "outside of what is searched",
        ),
        (
            "[[search.enqueue]]\ndropuot = 0.1\n[train]\ndropout = {uniform = [0.1, 0.4]}",
            "'dropuot' is not searched (did you mean 'dropout'?)",
        ),
        ('[search]\nsampler = "cma"\n[train]\nlr = {uniform = [0.1, 1]}', "take tpe"),
        ("search = 3\n[train]\nlr = {uniform = [0.1, 1]}", "[search]"),
    ],
)
def test_a_wrong_space_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        space_of(tmp_path, text)
    message = str(raised.value)
    assert words in message
    assert "\n" not in message


def test_what_decides_features_must_be_finite(tmp_path: Path) -> None:
    space = space_of(tmp_path, "[train]\nk_txt = {log_int = [1, 6]}\n")
    with pytest.raises(ConfigError, match="decides which features are stored"):
        space.feature_configs(Config())


def test_each_set_of_features_is_named_once(tmp_path: Path) -> None:
    text = (
        "[train]\nk_txt = {int = [0, 2]}\nlr = {uniform = [0.1, 1]}\n"
        '[store]\ndtype = {choice = ["float16", "int8"]}\n'
    )
    configs = space_of(tmp_path, text).feature_configs(Config())
    found = [(config.train.k_txt, config.store.dtype) for config in configs]
    assert sorted(found) == [(k, dtype) for k in (0, 1, 2) for dtype in ("float16", "int8")]


def test_a_flag_beats_the_space(tmp_path: Path) -> None:
    text = "[search]\ntrials = 3\n[train]\nlr = {uniform = [0.1, 1]}\nk_txt = {choice = [2, 3]}\n"
    space = space_of(tmp_path, text, {"trials": 7}, train={"k_txt": 1})
    assert [parameter.name for parameter in space.parameters] == ["lr"]
    assert space.trials == 7
    fixed = space_of(tmp_path, text + "epochs = 9\n", train={"epochs": 2})
    assert "epochs" not in fixed.fixed["train"]


def test_the_metric_is_what_the_trials_monitor(tmp_path: Path) -> None:
    text = '[search]\nmetric = "val_auc"\n[train]\nlr = {uniform = [0.1, 1]}\n'
    assert space_of(tmp_path, text).base(Config()).train.monitor == "val_auc"
    own = space_of(tmp_path, text + 'monitor = "val_loss"\n').base(Config())
    assert own.train.monitor == "val_loss"


def test_a_grid_has_each_combination_once(tmp_path: Path) -> None:
    text = (
        '[search]\nsampler = "grid"\n[train]\nk_txt = {choice = [0, 2, 3]}\n'
        "dropout = {uniform = [0.0, 0.3], step = 0.1}\nmlp_dim = {int = [8, 10]}\n"
    )
    space = space_of(tmp_path, text)
    grid = list(space.grid())
    assert len(grid) == space.trials == 3 * 4 * 3
    assert len({tuple(values.values()) for values in grid}) == len(grid)
    assert max(values["dropout"] for values in grid) == 0.3


def test_a_space_comes_back_from_json(tmp_path: Path) -> None:
    text = (
        "[search]\ntrials = 4\n[[search.enqueue]]\nlr = 0.5\n"
        "[train]\nlr = {uniform = [0.1, 1]}\nmlp_dim = {int = [8, 16], step = 4}\n"
        '[store]\ndtype = {choice = ["float16", "int8"]}\n'
    )
    space = space_of(tmp_path, text)
    again = space_from_json(json.loads(json.dumps(space.to_json())))
    assert again == dataclasses.replace(space, fixed={})
    config = again.config(Config(), {"lr": 0.25, "mlp_dim": 12, "store.dtype": "int8"})
    assert (config.train.lr, config.train.mlp_dim, config.store.dtype) == (0.25, 12, "int8")


@pytest.mark.parametrize("field", dataclasses.fields(TrainConfig), ids=lambda field: field.name)
def test_every_setting_of_a_run_can_be_searched(
    tmp_path: Path, field: dataclasses.Field[Any]
) -> None:
    from featstore.settings import toml_value

    kind = hints(TrainConfig)[field.name]
    default = field.default
    others = {bool: not default, int: 4, float: 0.25, str: "/b.toml"}
    other = field.metadata["choices"][-1] if field.metadata.get("choices") else others.get(kind)
    if field.metadata["words"] is not None:
        other = {"gender": 1.2, "counting": 1.5}
    assert other not in (None, default)
    choices = f"[{toml_value(default)}, {toml_value(other)}]"
    space = space_of(tmp_path, f"[train]\n{field.name} = {{choice = {choices}}}\n")
    (parameter,) = space.parameters
    stored = parameter.labels[1]
    assert getattr(space.config(Config(), {field.name: stored}).train, field.name) == other


def test_the_recipe_is_the_studys_search() -> None:
    space = read_space(RECIPE, {}, {})
    assert (space.search.sampler, space.trials) == ("random", 6)
    found = {parameter.name: (parameter.kind, parameter.values) for parameter in space.parameters}
    assert found == {
        "lr": ("log_uniform", (2e-5, 1e-4)),
        "weight_decay": ("log_uniform", (5e-6, 5e-5)),
        "dropout": ("uniform", (0.05, 0.30)),
        "k_txt": ("choice", (2, 3)),
    }
    assert space.enqueue == ({"lr": 5e-5, "weight_decay": 1e-5, "dropout": 0.15, "k_txt": 2},)
    assert space.base(Config()).train.epochs == 2
    default = read_space(None, {}, {})
    assert default.parameters == space.parameters
    assert default.enqueue == space.enqueue
