"""Settings of a search that no trial of it can use."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator

from featstore.errors import ConfigError
from trainer.config import Config
from trainer.tuning.space import Parameter, SearchConfig, Space
from trainer.unused import RULES, Rule, Unused, line_of


def unused_in_space(space: Space, base: Config) -> list[Unused]:
    """Return the settings that have no effect in any trial; those at their default apart.

    One that has none in some trials, as `layer_decay` in those of `k_txt` 0, is none of them.

    Args:
        space: What is varied.
        base: The settings that all trials share.

    Raises:
        ConfigError: A setting is searched that has no effect in any trial.
    """
    searched = {(parameter.section, parameter.key) for parameter in space.parameters}
    found = []
    for rule in RULES:
        value = getattr(getattr(base, rule.section), rule.key)
        is_searched = (rule.section, rule.key) in searched
        if not is_searched and value == rule.default:
            continue
        reasons = [rule.why(config) for config in _corners(space, base, rule)]
        if not all(reasons):
            continue
        if is_searched:
            raise ConfigError(
                f"[{rule.section}] {rule.key} is searched and has no effect in any trial:"
                f" {reasons[0]}; search it no more, or change that"
            )
        line = line_of(rule.section, rule.key, value, reasons[0])
        found.append(Unused(rule.section, rule.key, line))
    return [*found, *_of_search(space, base)]


def _corners(space: Space, base: Config, rule: Rule) -> Iterator[Config]:
    """Yield settings with each choice, and both ends of each range, that a rule looks at."""
    varied = [
        parameter
        for parameter in space.parameters
        if (parameter.section, parameter.key) == (rule.section, rule.key)
        or (parameter.section == "train" and parameter.key in rule.beside)
    ]
    for values in itertools.product(*map(_ends, varied)):
        named = zip((parameter.name for parameter in varied), values, strict=True)
        yield space.config(base, dict(named))


def _ends(parameter: Parameter) -> Collection[object]:
    return parameter.labels if parameter.kind == "choice" else parameter.values


def _of_search(space: Space, base: Config) -> list[Unused]:
    """Return the settings of `[search]` itself."""
    search, default = space.search, SearchConfig()
    tried = {key: (getattr(base.train, key),) for key in ("epochs", "k_txt", "k_vit")}
    tried |= {p.key: p.values for p in space.parameters if p.section == "train"}
    reasons = {}
    if search.sampler == "grid":
        reasons["seed"] = 'sampler "grid" draws nothing'
    if max(tried["epochs"]) == 1:
        reasons["pruner"] = "a trial has one epoch"
    if search.together > 1 and (min(tried["k_txt"]) or min(tried["k_vit"])):
        reasons["together"] = "no trial has k_txt 0 and k_vit 0"
    return [
        Unused("search", key, line_of("search", key, getattr(search, key), why))
        for key, why in reasons.items()
        if getattr(search, key) != getattr(default, key)
    ]
