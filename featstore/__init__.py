"""Tier 1 and the store: pay for the frozen encoders once.

    project = featstore.Project.load("featstore.toml")
    project.extract("vit", split="train")
    store = featstore.open_store("cache/vit/<fingerprint>")

Nothing heavy is imported before a name is used; opening a store needs neither
its preset nor a framework.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featstore.api import Project
    from featstore.errors import FeatstoreError
    from featstore.store.store import TextStore, VisionStore, open_store

_HOMES = {
    "FeatstoreError": "featstore.errors",
    "Project": "featstore.api",
    "TextStore": "featstore.store.store",
    "VisionStore": "featstore.store.store",
    "open_store": "featstore.store.store",
}
__all__ = ["FeatstoreError", "Project", "TextStore", "VisionStore", "open_store"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        import importlib.metadata

        return importlib.metadata.version("featstore")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, "__version__"])
