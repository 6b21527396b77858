"""A search's space as a TOML file: read it, and say what is wrong with it.

A space file has the sections of `featstore.toml`. Where a setting's value is a
table with one of `KINDS`, the setting is searched; a plain value fixes it:

    [search]
    sampler = "tpe"
    trials = 30

    [[search.enqueue]]                    # run first
    lr = 5e-5

    [train]
    lr = {log_uniform = [2e-5, 1e-4]}
    mlp_dim = {int = [256, 1024], step = 256}
    k_txt = {choice = [2, 3]}
    epochs = 4
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from featstore.errors import ConfigError
from featstore.settings import build_section, hints, read_toml, suggest
from trainer.config import SECTIONS
from trainer.tuning.space import KINDS, Parameter, SearchConfig, Space

STORE_KEYS = ("dtype", "tokens", "precision")
LARGEST_INTEGER = 2**53


def default_space(demo: bool) -> dict[str, Any]:
    """Return the tables that are searched where no space is given.

    The ranges are those of the reference study's third phase, with its
    second phase's settings as the first trial; the demo's small encoders
    need a larger rate.
    """
    low, high, first = (1e-4, 1e-3, 5e-4) if demo else (2e-5, 1e-4, 5e-5)
    baseline = {"lr": first, "weight_decay": 1e-5, "dropout": 0.15, "k_txt": 2}
    return {
        "search": {"sampler": "random", "trials": 6, "enqueue": [baseline]},
        "train": {
            "epochs": 2,
            "lr": {"log_uniform": [low, high]},
            "weight_decay": {"log_uniform": [5e-6, 5e-5]},
            "dropout": {"uniform": [0.05, 0.30]},
            "k_txt": {"choice": [2, 3]},
        },
    }


def read_space(
    source: Path | Mapping[str, Any] | None,
    search_flags: Mapping[str, Any],
    flags: Mapping[str, Mapping[str, Any]],
    demo: bool = False,
) -> Space:
    """Read a space, under the flags of the command line.

    Args:
        source: A TOML file, or its tables; None takes `default_space`.
        search_flags: Key to value of `[search]`; these win.
        flags: Section to key to value of other settings; these win, and a
            searched setting among them is searched no more.
        demo: The data are the built-in demo's.

    Raises:
        ConfigError: Unknown section, key or kind of distribution; a value of the
            wrong type or out of the setting's bounds; nothing to search.
    """
    where, folder = "space", Path.cwd()
    if source is None:
        tables, where = default_space(demo), "default space"
    elif isinstance(source, Path):
        tables, where, folder = read_toml(source), str(source), source.absolute().parent
    else:
        tables = dict(source)
    own = dict(_table(tables.pop("search", {}), "search", where))
    queued = own.pop("enqueue", [])
    build_section("search", SearchConfig, own, where, folder)
    search = build_section(
        "search", SearchConfig, {**own, **search_flags}, "command line", Path.cwd()
    )
    parameters, fixed = _sections(tables, where, folder)
    kept = tuple(p for p in parameters if p.key not in flags.get(p.section, {}))
    dropped = {p.name for p in parameters} - {p.name for p in kept}
    enqueue = _enqueued(queued, kept, dropped, where, folder)
    if not kept:
        what = "by the flags" if parameters else "in the file"
        raise ConfigError(
            f"{where}: nothing to search: every setting is fixed {what}; write one as"
            " lr = {log_uniform = [2e-5, 1e-4]}"
        )
    if not any(p.name == "monitor" for p in kept):
        fixed.setdefault("train", {}).setdefault("monitor", search.metric)
    for section, values in flags.items():
        for key in values:
            fixed.get(section, {}).pop(key, None)
    space = Space(search, kept, fixed, enqueue)
    if search.sampler == "cma" and sum(p.kind != "choice" for p in kept) < 2:
        # Optuna would draw them at random, and say so where nobody reads it.
        raise ConfigError(
            f"{where}: sampler cma draws two or more numbers that depend on each other, and fewer"
            " are searched; take tpe"
        )
    if search.sampler == "grid":
        try:
            list(space.grid())
        except ConfigError as error:
            raise ConfigError(f"{where}: sampler grid: {error}") from error
    return space


def _table(value: Any, name: str, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: {name} must be a section: [{name}]")
    return value


def _sections(
    tables: Mapping[str, Any], where: str, folder: Path
) -> tuple[list[Parameter], dict[str, dict[str, Any]]]:
    parameters: list[Parameter] = []
    fixed: dict[str, dict[str, Any]] = {}
    known = ("search", "train", "encoders", "store")
    for name, values in tables.items():
        if name == "data":
            raise ConfigError(f"{where}: [data] is not searched; set it in featstore.toml")
        if name not in known:
            raise ConfigError(
                f"{where}: unknown section {name!r}{suggest(name, known)};"
                f" known: {', '.join(known)}"
            )
        for key, value in _table(values, name, where).items():
            if _is_distribution(name, key, value):
                parameters.append(_parameter(name, key, value, where, folder))
            else:
                fixed.setdefault(name, {})[key] = _checked(name, key, value, where, folder)
    return parameters, fixed


def _checked(section: str, key: str, value: Any, where: str, folder: Path) -> Any:
    """Return a value as its setting's type, by the setting's own check."""
    return getattr(build_section(section, SECTIONS[section], {key: value}, where, folder), key)


def _is_distribution(section: str, key: str, value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    # A setting may itself be a table.
    takes_table = "dict" in str(hints(SECTIONS[section]).get(key, ""))
    return not takes_table or any(kind in value for kind in KINDS)


def _parameter(
    section: str, key: str, table: Mapping[str, Any], where: str, folder: Path
) -> Parameter:
    known = [field.name for field in dataclasses.fields(SECTIONS[section])]
    name = f"[{section}] {key}"
    if key not in known:
        raise ConfigError(
            f"{where}: unknown setting {key!r} in [{section}]{suggest(key, known)};"
            f" known: {', '.join(known)}"
        )
    if section == "store" and key not in STORE_KEYS:
        raise ConfigError(
            f"{where}: {name} cannot be searched; of [store] can: {', '.join(STORE_KEYS)}"
        )
    for word in table:
        if word not in (*KINDS, "step"):
            raise ConfigError(
                f"{where}: {name}: unknown distribution {word!r}{suggest(word, KINDS)};"
                f" known: {', '.join(KINDS)}"
            )
    named = [kind for kind in KINDS if kind in table]
    if len(named) != 1:
        found = ", ".join(map(repr, named)) or "none"
        raise ConfigError(f"{where}: {name} must have one of {', '.join(KINDS)}; found {found}")
    kind = named[0]
    given, step = table[kind], table.get("step")
    if not isinstance(given, list) or not given:
        raise ConfigError(f"{where}: {name}: {kind} must be a list, found {given!r}")
    if kind == "choice":
        if step is not None:
            raise ConfigError(f"{where}: {name}: choice has no step")
        choices = tuple(_checked(section, key, value, where, folder) for value in given)
        for i, value in enumerate(choices):
            if value in choices[:i]:
                raise ConfigError(f"{where}: {name}: choice repeats {value!r}")
        return Parameter(section, key, kind, choices)
    low, high = _bounds(section, key, kind, given, where, folder)
    if kind.startswith("log"):
        if low <= 0:
            raise ConfigError(f"{where}: {name}: {kind} must be above 0, found {low!r}")
        if step is not None:
            raise ConfigError(f"{where}: {name}: {kind} has no step")
        return Parameter(section, key, kind, (low, high))
    if kind == "int" and step is None:
        step = 1
    return Parameter(section, key, kind, (low, high), _step(name, kind, low, high, step, where))


def _bounds(
    section: str, key: str, kind: str, given: list[Any], where: str, folder: Path
) -> tuple[Any, Any]:
    name, whole = f"[{section}] {key}", kind.endswith("int")
    is_number = [isinstance(v, int if whole else int | float) for v in given]
    if len(given) != 2 or not all(is_number) or any(isinstance(v, bool) for v in given):
        what = "integers" if whole else "numbers"
        raise ConfigError(f"{where}: {name}: {kind} must be [low, high] in {what}, found {given}")
    hint = hints(SECTIONS[section])[key]
    if not whole and hint is not float:
        raise ConfigError(
            f"{where}: {name} is not a float: search it with int, log_int or choice, not {kind}"
        )
    if hint not in (int, float):
        raise ConfigError(f"{where}: {name} is not a number: search it with choice, not {kind}")
    low, high = (_checked(section, key, value, where, folder) for value in given)
    if whole:
        low, high = int(low), int(high)
        if max(abs(low), abs(high)) > LARGEST_INTEGER:
            raise ConfigError(f"{where}: {name}: {kind} must stay within ±2^53, found {given}")
    if not low < high:
        raise ConfigError(f"{where}: {name}: {kind} must have low < high, found {given}")
    return low, high


def _step(
    name: str, kind: str, low: float, high: float, step: Any, where: str
) -> float | int | None:
    if step is None:
        return None
    types = int if kind == "int" else int | float
    if not isinstance(step, types) or isinstance(step, bool) or not 0 < step <= high - low:
        raise ConfigError(
            f"{where}: {name}: step must be above 0 and at most high - low, found {step!r}"
        )
    count = (high - low) / step
    if not math.isclose(count, round(count), rel_tol=1e-9):
        raise ConfigError(f"{where}: {name}: step {step!r} does not lead from {low} to {high}")
    return step if kind == "int" else float(step)


def _enqueued(
    queued: Any, parameters: tuple[Parameter, ...], dropped: set[str], where: str, folder: Path
) -> tuple[dict[str, Any], ...]:
    if not isinstance(queued, list) or not all(isinstance(trial, dict) for trial in queued):
        raise ConfigError(f"{where}: fixed trials must be tables: [[search.enqueue]]")
    known = {parameter.name: parameter for parameter in parameters}
    found = []
    for number, table in enumerate(queued, 1):
        trial = {}
        for name, value in _flat(table):
            if name in dropped:
                continue
            place = f"{where}: [[search.enqueue]] {number}"
            if name not in known:
                raise ConfigError(
                    f"{place}: {name!r} is not searched{suggest(name, known)};"
                    f" searched: {', '.join(known)}"
                )
            parameter = known[name]
            value = _checked(parameter.section, parameter.key, value, place, folder)
            trial[name] = _inside(parameter, value, place)
        found.append(trial)
    return tuple(found)


def _flat(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield names and values, those of `encoders.text = …` under one name."""
    for key, value in table.items():
        if key in SECTIONS and isinstance(value, dict):
            yield from (
                (inner if key == "train" else f"{key}.{inner}", v) for inner, v in value.items()
            )
        else:
            yield key, value


def _inside(parameter: Parameter, value: Any, place: str) -> Any:
    """Return a value as the study stores it, where the parameter can take it."""
    if parameter.kind == "choice":
        if value in parameter.values:
            return parameter.labels[parameter.values.index(value)]
    else:
        low, high = parameter.values
        steps = (value - low) / parameter.step if parameter.step else 0.0
        is_whole = parameter.kind not in ("int", "log_int") or value == int(value)
        if low <= value <= high and is_whole and math.isclose(steps, round(steps), abs_tol=1e-9):
            return int(value) if parameter.kind in ("int", "log_int") else value
    raise ConfigError(
        f"{place}: {parameter.name} = {value!r} is outside of what is searched:"
        f" {parameter.kind} = {list(parameter.values)}"
        + (f", step = {parameter.step}" if parameter.step else "")
    )
