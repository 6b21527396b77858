"""What a search varies: the space and the search's own settings.

`trainer.tuning.space_file` reads them from TOML. Every value goes through the check of
its setting, so a setting that a later version adds can be searched without a
line here.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featstore.errors import ConfigError
from featstore.settings import checked_values, setting, toml_value
from trainer.config import LOWER_IS_BETTER, MONITORS, SECTIONS, Config, with_sections

if TYPE_CHECKING:
    import optuna

KINDS = ("uniform", "log_uniform", "int", "log_int", "choice")
LARGEST_GRID = 10_000
DEFAULT_TRIALS = 20
KEEP_ALL = "all"


@dataclass(frozen=True)
class SearchConfig:
    """The section `[search]` of a space file."""

    sampler: str = setting(
        "random", "how the next trial is drawn", choices=("random", "tpe", "grid", "cma")
    )
    pruner: str = setting(
        "none", "what ends a poor trial early", choices=("none", "median", "hyperband", "halving")
    )
    trials: int = setting(
        0,
        f"trials in all, fixed ones included, at most the grid's; 0: the grid, or {DEFAULT_TRIALS}",
        minimum=0,
    )
    together: int = setting(
        0,
        "trials of k_txt 0 that share each pass over the store; 0: 8 with random and grid, else 1",
        minimum=0,
    )
    metric: str = setting(
        "val_macro_f1",
        "what is searched for: its best epoch is a trial's value; also the trials' [train]"
        " monitor, unless that is set",
        choices=MONITORS,
    )
    seed: int = setting(0, "seed of the draws", minimum=0, maximum=2**32 - 1)
    keep: int | str = setting(
        5, "trials that keep their weights: the best so many, or all", before=KEEP_ALL
    )

    def __post_init__(self) -> None:
        """Check `keep`, which is a number or a word."""
        if self.keep != KEEP_ALL and not str(self.keep).isdigit():
            raise ConfigError(
                f"[search] keep must be a number or {KEEP_ALL!r}, found {self.keep!r}"
            )

    @property
    def kept(self) -> int:
        """How many trials keep their weights."""
        return sys.maxsize if self.keep == KEEP_ALL else int(self.keep)

    @property
    def minimises(self) -> bool:
        """Whether a lower value of the metric is better."""
        return self.metric in LOWER_IS_BETTER

    @property
    def group_size(self) -> int:
        """How many trials are drawn at once where they can share passes over the store."""
        return self.together or (8 if self.sampler in ("random", "grid") else 1)


@dataclass(frozen=True)
class Parameter:
    """One searched setting.

    Attributes:
        section, key: The setting.
        kind: One of `KINDS`.
        values: The choices, or the two bounds, both included.
        step: Distance of two values between the bounds; None where there is none.
    """

    section: str
    key: str
    kind: str
    values: tuple[Any, ...]
    step: float | int | None = None

    @property
    def name(self) -> str:
        """The parameter's name in the study: the key, of another section with its name."""
        return self.key if self.section == "train" else f"{self.section}.{self.key}"

    @property
    def labels(self) -> tuple[Any, ...]:
        """The choices as a study can store them."""
        return tuple(
            v if isinstance(v, bool | int | float | str) else toml_value(v) for v in self.values
        )

    def distribution(self) -> optuna.distributions.BaseDistribution:
        """Return it as Optuna's distribution."""
        from optuna.distributions import (
            CategoricalDistribution,
            FloatDistribution,
            IntDistribution,
        )

        if self.kind == "choice":
            return CategoricalDistribution(self.labels)
        low, high = self.values
        if self.kind in ("int", "log_int"):
            return IntDistribution(low, high, log=self.kind == "log_int", step=int(self.step or 1))
        return FloatDistribution(low, high, log=self.kind == "log_uniform", step=self.step)

    def setting(self, stored: Any) -> Any:
        """Return the setting's value for a value of the study."""
        return self.values[self.labels.index(stored)] if self.kind == "choice" else stored

    def grid(self) -> tuple[Any, ...]:
        """Return every value as a study stores it.

        Raises:
            ConfigError: There are too many to name.
        """
        if self.kind == "choice":
            return self.labels
        if self.step is None:
            raise ConfigError(
                f"{self.name} = {{{self.kind} = …}} has no finite set of values; give it a step, or"
                " {choice = [...]}"
            )
        low, high = self.values
        count = round((high - low) / self.step) + 1
        if count > LARGEST_GRID:
            raise ConfigError(f"{self.name} has {count} values, more than {LARGEST_GRID}")
        # The last one is the bound itself, which a sum of floats may pass.
        return tuple(min(low + i * self.step, high) for i in range(count))


@dataclass(frozen=True)
class Space:
    """What a search varies and how.

    Attributes:
        search: The search's own settings.
        parameters: What is searched, in the file's order.
        fixed: Section to key to value of what the file fixes.
        enqueue: Parameter name to stored value of each trial that runs first.
    """

    search: SearchConfig
    parameters: tuple[Parameter, ...]
    fixed: dict[str, dict[str, Any]]
    enqueue: tuple[dict[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return it JSON-able; `space_from_json` reads it back."""
        return {
            "search": dataclasses.asdict(self.search),
            "parameters": [dataclasses.asdict(parameter) for parameter in self.parameters],
            "enqueue": list(self.enqueue),
        }

    @property
    def trials(self) -> int:
        """Trials in all: of a grid, no more than it has."""
        wanted = self.search.trials
        if self.search.sampler == "grid":
            whole = len(self.enqueue) + math.prod(len(p.grid()) for p in self.parameters)
            return min(wanted or whole, whole)
        return wanted or DEFAULT_TRIALS

    def grid(self) -> Iterator[dict[str, Any]]:
        """Yield every combination of values, the last parameter fastest.

        Raises:
            ConfigError: The space is not finite, or too large.
        """
        axes = [parameter.grid() for parameter in self.parameters]
        size = math.prod(map(len, axes))
        if size > LARGEST_GRID:
            raise ConfigError(f"the grid has {size} trials, more than {LARGEST_GRID}")
        names = [parameter.name for parameter in self.parameters]
        for values in itertools.product(*axes):
            yield dict(zip(names, values, strict=True))

    def base(self, config: Config) -> Config:
        """Return the settings that all trials share: a configuration's, under what is fixed."""
        return with_sections(config, self.fixed)

    def config(self, base: Config, values: Mapping[str, Any]) -> Config:
        """Return the settings of a trial.

        Args:
            base: The settings that all trials share.
            values: Parameter name to stored value.
        """
        changes: dict[str, dict[str, Any]] = {}
        for parameter in self.parameters:
            if parameter.name in values:
                value = parameter.setting(values[parameter.name])
                changes.setdefault(parameter.section, {})[parameter.key] = value
        checked = {
            name: checked_values(name, SECTIONS[name], given, "trial", Path.cwd())
            for name, given in changes.items()
        }
        return with_sections(base, checked)

    def largest_batch(self, base: Config) -> int:
        """Return the most rows of a trial's step."""
        found = [p.values for p in self.parameters if p.key == "batch_size"]
        return max(map(int, found[0])) if found else base.train.batch_size

    def feature_configs(self, base: Config) -> list[Config]:
        """Return one configuration for each set of features that a trial can ask for.

        Raises:
            ConfigError: They are too many.
        """
        deciding = [
            parameter
            for parameter in self.parameters
            if parameter.section != "train" or parameter.key in ("k_txt", "k_vit", "views")
        ]
        for parameter in deciding:
            if parameter.kind in ("uniform", "log_uniform", "log_int"):
                raise ConfigError(
                    f"{parameter.name} decides which features are stored: give it"
                    " {choice = [...]} or {int = [...]}"
                )
        return [
            self.config(base, values) for values in Space(self.search, tuple(deciding), {}).grid()
        ]


def space_from_json(value: Mapping[str, Any]) -> Space:
    """Return what `Space.to_json` wrote.

    Raises:
        KeyError, TypeError: It did not.
    """
    parameters = [
        Parameter(**{**parameter, "values": tuple(_tupled(v) for v in parameter["values"])})
        for parameter in value["parameters"]
    ]
    search = SearchConfig(**value["search"])
    return Space(search, tuple(parameters), {}, tuple(value["enqueue"]))


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list) else value


def shown(value: Any) -> str:
    """Return a setting's value in few characters."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
