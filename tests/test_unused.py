"""Settings that have no effect beside others: refused where asked for, remarked on elsewhere."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tiny_runs import prepared, tiny_config

import trainer
from featstore.errors import ConfigError, StoppedError
from featstore.progress import SILENT
from trainer.commands.main import cli
from trainer.config import Config, render_config, with_sections
from trainer.run.training import Reporter
from trainer.tuning.space_file import read_space
from trainer.tuning.unused import unused_in_space
from trainer.unused import RULES, refuse_unused, unused

# Of each rule, settings of which it says something, and what makes it silent.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "train.layer_decay": ({"train": {"layer_decay": 0.8, "k_txt": 0}}, {"train": {"k_vit": 1}}),
    "train.buckets": ({"train": {"buckets": "b.toml"}}, {"train": {"oversample": {"a": 2.0}}}),
    "train.min_lr": (
        {"train": {"min_lr": 1e-5, "lr_schedule": "constant"}},
        {"train": {"lr_schedule": "cosine"}},
    ),
    "train.reduce_lr_factor": (
        {"train": {"reduce_lr_factor": 0.1, "lr_schedule": "linear"}},
        {"train": {"lr_schedule": "plateau"}},
    ),
    "train.reduce_lr_patience": (
        {"train": {"reduce_lr_patience": 4, "lr_schedule": "linear"}},
        {"train": {"lr_schedule": "plateau"}},
    ),
    "store.view_seed": ({"store": {"view_seed": 3}}, {"train": {"views": 2}}),
    "data.images": ({"data": {"images": "photos"}}, {"data": {"rows": "rows.csv"}}),
    "data.fractions": (
        {"data": {"rows": "rows.csv", "split_file": "s.csv", "fractions": (0.6, 0.2, 0.2)}},
        {"data": {"split_file": ""}},
    ),
    "data.split_seed": (
        {"data": {"rows": {"train": "a.csv", "val": "b.csv"}, "split_seed": 1}},
        {"data": {"rows": ("a.csv", "b.csv")}},
    ),
    "track.project": ({"track": {"project": "mine"}}, {"track": {"to": ("wandb",)}}),
}


def test_every_rule_is_tried() -> None:
    assert CASES.keys() == {f"{rule.section}.{rule.key}" for rule in RULES}


@pytest.mark.parametrize("name", CASES)
def test_a_rule_speaks_and_is_silent(name: str) -> None:
    idle, mended = CASES[name]
    config = with_sections(Config(), idle)
    (found,) = unused(config)
    assert f"{found.section}.{found.key}" == name
    assert found.line.startswith(f"[{found.section}] {found.key} = ")
    assert unused(with_sections(config, mended)) == []
    with pytest.raises(ConfigError, match=r"has no effect: .*; leave it out, or change that"):
        refuse_unused([found], {found.section: [found.key]})
    refuse_unused([found], {"train": ["seed"]})


def test_the_defaults_have_nothing_to_say() -> None:
    # A lowest rate that no rate is above is none of a fall.
    assert unused(Config()) == []
    at_lr = with_sections(Config(), {"train": {"min_lr": 1e-4, "lr_schedule": "cosine"}})
    assert unused(at_lr)[0].line.endswith("it is not below lr, 0.0001: no rate falls")


def searched(train: dict[str, Any], base: dict[str, Any], **search: Any) -> list[str]:
    tables = {"search": search, "train": {"lr": {"log_uniform": [1e-5, 1e-4]}, **train}}
    config = with_sections(Config(), {"train": base})
    space = read_space(tables, {}, {})
    return [one.key for one in unused_in_space(space, space.base(config))]


def test_a_search_may_use_it_in_some_trials() -> None:
    decay = {"layer_decay": {"uniform": [0.6, 1.0]}}
    assert searched({**decay, "k_txt": {"choice": [0, 2]}}, {}) == []
    assert searched({"k_txt": {"int": [0, 2]}}, {"layer_decay": 0.8}) == []
    with pytest.raises(ConfigError, match="layer_decay is searched and has no effect in any"):
        searched({**decay, "k_txt": 0}, {})
    assert searched({"k_txt": 0}, {"layer_decay": 0.8}) == ["layer_decay"]
    # Above the lowest of the rates, below the highest.
    assert searched({"min_lr": {"choice": [5e-5]}}, {}) == []
    with pytest.raises(ConfigError, match="min_lr is searched"):
        searched({"min_lr": {"choice": [1e-3]}}, {})


def test_settings_of_the_search_itself() -> None:
    grid = {"lr": {"choice": [1e-5, 1e-4]}}
    assert searched(grid, {}, sampler="grid", seed=3) == ["seed"]
    assert searched({"epochs": 1}, {}, pruner="median", seed=3) == ["pruner"]
    assert searched({"epochs": {"int": [1, 2]}}, {}, pruner="median") == []
    assert searched({"k_txt": {"choice": [1, 2]}}, {}, together=4) == ["together"]
    assert searched({"k_txt": {"choice": [0, 2]}}, {}, together=4) == []
    assert searched({"k_txt": 2}, {}, together=1) == []


def test_asked_for_or_in_a_file(tmp_path: Path, tiny_vit: Path, tiny_text: Path) -> None:
    """A flag and an argument are refused before any work; a file's setting is remarked on."""
    config = tiny_config(tmp_path, tiny_vit, tiny_text, epochs=1, k_txt=0)
    project = prepared(config)
    with pytest.raises(ConfigError, match=r"\[train\] layer_decay = 0.8 has no effect: k_txt and"):
        trainer.train(project, name="a", runs=tmp_path / "runs", layer_decay=0.8, show=SILENT)
    assert not (tmp_path / "runs").exists()
    file = tmp_path / "featstore.toml"
    file.write_text(render_config(with_sections(config, {"train": {"layer_decay": 0.8}})))
    typed = ["train", "--config", str(file), "--runs", str(tmp_path / "runs"), "--name", "a"]
    done = CliRunner().invoke(cli, [*typed, "--buckets", "b.toml"])
    assert done.exit_code == 2
    assert "b.toml' has no effect: oversample is empty" in done.stderr.replace('"', "'")
    assert not (tmp_path / "runs").exists()
    # It goes with `train --views 4`, and is handed on to a command that has no --views.
    typed = ["extract-text", "--dry-run", "--config", str(file)]
    done = CliRunner().invoke(cli, [*typed, "--view-seed", "3"])
    assert done.exit_code == 0, done.stderr
    said: list[str] = []
    show = dataclasses.replace(SILENT, note=said.append)
    of_file = project.with_config(with_sections(config, {"train": {"layer_decay": 0.8}}))
    # Stopped at once: a run that is begun goes on with what it was begun with.
    asked = itertools.count()
    reporter = Reporter(stopping=lambda: next(asked) >= 0)
    for settings in ({}, {"layer_decay": 0.8}):
        with pytest.raises(StoppedError):
            trainer.train(
                of_file, name="a", runs=tmp_path / "runs", reporter=reporter, show=show, **settings
            )
    assert [line for line in said if "layer_decay = 0.8 has no effect" in line] == said[:1] * 2
