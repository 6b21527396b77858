"""A recipe: a TOML file of stages, each a run or a search, one after the other.

    [recipe]
    name = "shared"                 # folder below that of the runs; default: the file's name

    [data]                          # what the stages have in common, as in featstore.toml
    rows = "a2.jsonl"

    [[stage]]
    name = "warm-up"
    data = {rows = "warmup.jsonl"}  # sections of its own win over the common ones
    train = {k_txt = 3, epochs = 3}

    [[stage]]
    name = "search"                 # a stage with a space is a search
    init_from = "warm-up"           # an earlier stage, or a run's folder
    space = "study-search.toml"

    [[stage]]
    name = "final"
    init_from = "warm-up"
    settings_from = "search"        # the best trial's, of what the space names
    train = {epochs = 6}            # but for these
    test = true                     # measured on the test split too
    controls = true                 # and against the same run trained on the sentence alone
    predict = {rows = "new.csv", images = "photos", out = "predictions.csv"}

Relative paths are taken from the file's folder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featstore.config import runs_folder
from featstore.errors import ConfigError
from featstore.settings import checked_values, plain_path, read_toml, suggest
from trainer.config import SECTIONS, Config, load_config, with_sections
from trainer.run.folder import NAME_PATTERN

STAGE_SECTIONS = ("data", "encoders", "store", "train")
PREDICT_KEYS = ("rows", "images", "out")


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe.

    Attributes:
        name: Of its run or search, below the recipe's folder.
        config: Its settings; of a stage with `settings_from` without those that it takes over.
        own: Section to the keys that the stage itself or the command line sets.
        init_from: An earlier stage's name, or a run's folder; None: fresh.
        settings_from: An earlier search's name; None: its own settings alone.
        space: File of what is searched; None: it is a run.
        search: `[search]` settings of a search.
        test: Whether it is measured on the test split.
        controls: Whether the same run is trained on the sentence alone.
        predict: Rows, photos and output of predictions; None: none are made.
    """

    name: str
    config: Config
    own: Mapping[str, frozenset[str]]
    init_from: str | None = None
    settings_from: str | None = None
    space: Path | None = None
    search: Mapping[str, Any] = field(default_factory=dict)
    test: bool = False
    controls: bool = False
    predict: Mapping[str, Path] | None = None


@dataclass(frozen=True)
class Recipe:
    """A recipe as read.

    Attributes:
        file: Its file.
        name: Folder of its runs, below `runs`.
        runs: Folder of all runs.
        stages: In their order.
    """

    file: Path
    name: str
    runs: Path
    stages: tuple[Stage, ...]

    @property
    def folder(self) -> Path:
        """Where its runs lie."""
        return self.runs / self.name


def read_recipe(
    path: str | os.PathLike[str],
    config_file: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    runs: str | os.PathLike[str] | None = None,
) -> Recipe:
    """Read a recipe.

    Args:
        path: Its file.
        config_file: Settings below the recipe's own; None: `featstore.toml` of the working
            directory, where there is one.
        overrides: Section to key to value, for all stages; these win.
        runs: Folder of the runs; None: the configuration's.

    Raises:
        ConfigError: The file cannot be read, or a key, a value, or the order of the stages is
            wrong; the message names the stage.
    """
    file = Path(path)
    tables = read_toml(file)
    where, home = str(file), file.absolute().parent
    known = ("recipe", "stage", *STAGE_SECTIONS)
    for name in tables:
        if name not in known:
            raise ConfigError(
                f"{where}: unknown section {name!r}{suggest(name, known)};"
                f" known: {', '.join(known)}"
            )
    about = _checked(tables.get("recipe", {}), {"name": str}, f"{where}: [recipe]")
    name = _name(about.get("name", file.stem), f"{where}: [recipe] name")
    common = _sections(tables, STAGE_SECTIONS, where, home)
    given = _sections(overrides or {}, STAGE_SECTIONS, "command line", Path.cwd())
    base = load_config(config_file, common)
    listed = tables.get("stage", [])
    if not isinstance(listed, list) or not listed:
        raise ConfigError(f'{where}: no stages; expected [[stage]] tables, each with name = "…"')
    stages: list[Stage] = []
    for number, table in enumerate(listed, 1):
        stages.append(_stage(table, number, stages, base, given, where, home))
    return Recipe(file, name, Path(runs or runs_folder(config_file)), tuple(stages))


_STAGE_KEYS: dict[str, type] = {
    "name": str,
    "init_from": str,
    "settings_from": str,
    "space": str,
    "search": dict,
    "test": bool,
    "controls": bool,
    "predict": dict,
    **dict.fromkeys(STAGE_SECTIONS, dict),
}


def _stage(
    table: Any,
    number: int,
    before: list[Stage],
    base: Config,
    given: Mapping[str, Mapping[str, Any]],
    where: str,
    home: Path,
) -> Stage:
    """Read one stage."""
    at = f"{where}: stage {number}"
    table = _checked(table, _STAGE_KEYS, at)
    if "name" not in table:
        raise ConfigError(f'{at}: no name; expected name = "warm-up" or the like')
    name = _name(table["name"], f"{at}: name")
    at = f"{where}: stage {name!r}"
    if name in {stage.name for stage in before}:
        raise ConfigError(f"{at}: two stages of that name")
    searches = [stage.name for stage in before if stage.space is not None]
    runs = [stage.name for stage in before if stage.space is None]
    init_from, settings_from = table.get("init_from"), table.get("settings_from")
    if init_from is not None and init_from not in runs:
        if "/" not in init_from:
            raise ConfigError(
                f"{at}: init_from = {init_from!r}: expected the name of an earlier stage that is a"
                f" run{_among(runs)}, or a run's folder, such as ../runs/first"
            )
        init_from = plain_path(str(home / init_from))
    if settings_from is not None and settings_from not in searches:
        raise ConfigError(
            f"{at}: settings_from = {settings_from!r}: expected the name of an earlier stage that"
            f" is a search{_among(searches)}"
        )
    space = table.get("space")
    if space is None and "search" in table:
        raise ConfigError(f'{at}: search settings without a space; add space = "space.toml"')
    if space is not None:
        for key in ("test", "controls", "predict", "settings_from"):
            if key in table:
                raise ConfigError(f"{at}: {key} is of a run; a search has none")
    predict = table.get("predict")
    if predict is not None:
        kinds = dict.fromkeys(PREDICT_KEYS, str)
        predict = {
            key: Path(plain_path(str(home / value)))
            for key, value in _checked(predict, kinds, f"{at}: predict").items()
        }
        if missing := [key for key in ("rows", "out") if key not in predict]:
            raise ConfigError(f"{at}: predict has no {missing[0]}; expected rows and out")
    own = _layered(_sections(table, STAGE_SECTIONS, at, home), given)
    return Stage(
        name,
        with_sections(base, own),
        {section: frozenset(values) for section, values in own.items()},
        init_from,
        settings_from,
        None if space is None else Path(plain_path(str(home / space))),
        table.get("search", {}),
        table.get("test", False),
        table.get("controls", False),
        predict,
    )


def _checked(table: Any, kinds: Mapping[str, type], where: str) -> dict[str, Any]:
    """Return a table whose keys are known and whose values are of their kinds."""
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: expected a table, found {table!r}")
    for key, value in table.items():
        if key not in kinds:
            raise ConfigError(
                f"{where}: unknown key {key!r}{suggest(key, kinds)}; known: {', '.join(kinds)}"
            )
        if not isinstance(value, kinds[key]):
            names = {str: "text", bool: "true or false", dict: "a table"}
            raise ConfigError(f"{where}: {key}: expected {names[kinds[key]]}, found {value!r}")
    return dict(table)


def _name(value: str, where: str) -> str:
    if not NAME_PATTERN.fullmatch(value):
        raise ConfigError(
            f"{where}: {value!r}: expected letters, digits, '.', '_' and '-', beginning with a"
            " letter or digit"
        )
    return value


def _among(names: list[str]) -> str:
    return f" ({', '.join(names)})" if names else ", of which there is none"


def _sections(
    tables: Mapping[str, Any], names: tuple[str, ...], where: str, folder: Path
) -> dict[str, dict[str, Any]]:
    """Return settings, checked, their paths taken from a folder."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        values = tables.get(name, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{where}: {name} must be a section: [{name}]")
        found[name] = checked_values(name, SECTIONS[name], values, where, folder)
    return found


def _layered(
    below: Mapping[str, Mapping[str, Any]], above: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return settings, those of `above` winning."""
    return {name: {**below.get(name, {}), **above.get(name, {})} for name in {**below, **above}}
