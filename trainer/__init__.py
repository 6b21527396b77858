"""Tier 2: train, search, and use runs over cached features.

    run = trainer.train(featstore.Project.load("featstore.toml"), k_txt=3, lr=3e-5, name="first")
    run.evaluate("test")

Nothing heavy is imported before a name is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.api import (
        Run,
        compare,
        evaluate,
        import_weights,
        load_run,
        predict,
        report,
        train,
    )
    from trainer.config import TrainConfig
    from trainer.exploration.explore import eda
    from trainer.recipes.chain import run_recipe
    from trainer.tuning.drive import SearchResults, load_search, search

_HOMES = {
    "Run": "trainer.api",
    "SearchResults": "trainer.tuning.drive",
    "TrainConfig": "trainer.config",
    "compare": "trainer.api",
    "eda": "trainer.exploration.explore",
    "evaluate": "trainer.api",
    "import_weights": "trainer.api",
    "load_run": "trainer.api",
    "load_search": "trainer.tuning.drive",
    "predict": "trainer.api",
    "report": "trainer.api",
    "run_recipe": "trainer.recipes.chain",
    "search": "trainer.tuning.drive",
    "train": "trainer.api",
}
__all__ = [
    "Run",
    "SearchResults",
    "TrainConfig",
    "compare",
    "eda",
    "evaluate",
    "import_weights",
    "load_run",
    "load_search",
    "predict",
    "report",
    "run_recipe",
    "search",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from featstore import __version__

        return __version__
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    if _HOMES[name] == "trainer.api":
        from featstore.encoders.framework import import_framework

        # It imports Keras at once; what stands in Keras's way is said in one line.
        import_framework()
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, "__version__"])
