"""Settings that others keep from having any effect, as `layer_decay` where no layer trains.

What was asked for the very work at hand, as a flag or an argument, is refused. What a file
says is only remarked on: it may be of other runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from featstore.errors import ConfigError
from featstore.settings import toml_value
from trainer.config import SECTIONS, Config


class Rule(NamedTuple):
    """A setting that not always has an effect.

    Attributes:
        section, key: The setting.
        beside: The settings of `[train]` that it depends on.
        why: Says of settings why it has none; "" where it has.
    """

    section: str
    key: str
    beside: tuple[str, ...]
    why: Callable[[Config], str]

    @property
    def default(self) -> Any:
        """The setting's value where nobody sets it."""
        return getattr(SECTIONS[self.section], self.key)


def _no_layers(config: Config) -> str:
    frozen = config.train.k_txt == config.train.k_vit == 0
    return "k_txt and k_vit are 0, so that no layer of an encoder trains" if frozen else ""


def _no_draws(config: Config) -> str:
    return "" if config.train.oversample else "oversample is empty"


def _no_lowest(config: Config) -> str:
    train = config.train
    if train.lr_schedule == "constant":
        return 'lr_schedule is "constant"'
    return "" if train.min_lr < train.lr else f"it is not below lr, {train.lr:g}: no rate falls"


def _no_cuts(config: Config) -> str:
    schedule = config.train.lr_schedule
    return "" if schedule == "plateau" else f'lr_schedule is "{schedule}", not "plateau"'


def _no_views(config: Config) -> str:
    return "[train] views is 1: no photo is changed" if config.train.views == 1 else ""


def _no_photos(config: Config) -> str:
    return "[data] rows are not set, so that the built-in demo's are used" if config.is_demo else ""


def _no_draw_of_split(config: Config) -> str:
    data = config.data
    if data.split_file:
        return "split_file says which photos are in which split"
    if not isinstance(data.rows, str) or not data.rows:
        return "[data] rows are per split" if isinstance(data.rows, dict) else ""
    # Not before it is asked: reading tables takes more than the settings do.
    from featstore.data.table_rows import saved_splits

    return "[data] rows are per split" if saved_splits(data.rows) else ""


def _no_trackers(config: Config) -> str:
    alone = set(config.track.to) <= {"tensorboard"}
    return "[track] to has none of mlflow, wandb, trackio" if alone else ""


RULES = (
    Rule("train", "layer_decay", ("k_txt", "k_vit"), _no_layers),
    Rule("train", "buckets", ("oversample",), _no_draws),
    Rule("train", "min_lr", ("lr_schedule", "lr"), _no_lowest),
    Rule("train", "reduce_lr_factor", ("lr_schedule",), _no_cuts),
    Rule("train", "reduce_lr_patience", ("lr_schedule",), _no_cuts),
    Rule("store", "view_seed", ("views",), _no_views),
    Rule("data", "images", (), _no_photos),
    Rule("data", "fractions", (), _no_draw_of_split),
    Rule("data", "split_seed", (), _no_draw_of_split),
    Rule("track", "project", (), _no_trackers),
)


class Unused(NamedTuple):
    """A setting that is not its default, and has no effect.

    Attributes:
        section, key: The setting.
        line: Says so, and why.
        beside: The settings of `[train]` that it depends on.
    """

    section: str
    key: str
    line: str
    beside: tuple[str, ...] = ()


def line_of(section: str, key: str, value: Any, why: str) -> str:
    """Say that a setting has no effect."""
    return f"[{section}] {key} = {toml_value(value)} has no effect: {why}"


def unused(config: Config) -> list[Unused]:
    """Return the settings that have no effect beside the others, those at their default apart."""
    found = []
    for rule in RULES:
        value = getattr(getattr(config, rule.section), rule.key)
        if value != rule.default and (why := rule.why(config)):
            line = line_of(rule.section, rule.key, value, why)
            found.append(Unused(rule.section, rule.key, line, rule.beside))
    return found


def refuse_unused(found: Collection[Unused], given: Mapping[str, Collection[str]]) -> None:
    """Refuse a setting that was asked for, and has no effect.

    Args:
        found: Of `unused`.
        given: Section to the keys that were asked for.

    Raises:
        ConfigError: There is one.
    """
    for one in found:
        if one.key in given.get(one.section, ()):
            raise ConfigError(f"{one.line}; leave it out, or change that")
