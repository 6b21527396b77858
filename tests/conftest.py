"""Fixtures that every test may use; sets the environment before TensorFlow is imported."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("MPLBACKEND", "Agg")
# Compiled in half the time, here and in the processes that tests start; a test's models are run a
# few times only.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

# Python would look for circles among all that the tests import, again and again: see the end of
# the collection.
gc.disable()

# A deadline in milliseconds would be a time limit, on machines that are shared.
settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")

ROOT = Path(__file__).resolve().parent.parent
# The files that take minutes, the longest first: the last to begin would leave cores idle.
LONGEST = (
    "test_benchmarks",
    "test_cluster",
    "test_search_command",
    "test_distributed",
    "test_three_classes",
    "test_family_runs",
    "test_vision_blocks",
    "test_options",
    "test_fit",
    "test_parity_command",
    "test_campaign",
    "test_export",
    "test_engine",
    "test_together",
    "test_notebooks",
    "test_moved",
    "test_real_run",
)


def pytest_configure(config: pytest.Config) -> None:
    """Have pytest-xdist hand out files in the order of the collection, not by their tests."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny ViT preset: 32×32 pixels, patches of 8, 17 tokens 16 wide."""
    from tiny_presets import write_tiny_vision

    return write_tiny_vision(tmp_path_factory.mktemp("presets") / "tiny_vit")


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny DistilBERT preset: 4 layers 16 wide, 32 positions, a tokenizer."""
    from tiny_presets import write_tiny_text

    return write_tiny_text(tmp_path_factory.mktemp("presets") / "tiny_text")


@pytest.fixture(scope="session")
def tiny_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the preset of a tiny encoder, by its name in `TINY_FAMILIES`; written once."""
    from tiny_presets import write_tiny_family

    folder = tmp_path_factory.mktemp("families")

    def written(name: str) -> Path:
        path = folder / name
        return path if path.exists() else write_tiny_family(name, path)

    return written


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder of real presets and photos, which is not part of the repository."""
    folder = ROOT.parent / "shared"
    if not (folder / "presets").is_dir():
        pytest.skip(f"no real presets and photos: {folder} is absent")
    return folder


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """A Ray cluster of two nodes on this machine, one CPU each."""
    from featstore import ray_cluster

    with pytest.MonkeyPatch.context() as patch:
        for name, value in ray_cluster.QUIET.items():
            patch.setenv(name, value)
        # The nodes can import what a test defines, and this checkout.
        patch.setenv("PYTHONPATH", os.pathsep.join((str(Path(__file__).parent), str(ROOT))))
        from ray.cluster_utils import Cluster

        found = Cluster()
        try:
            found.add_node(num_cpus=1, include_dashboard=False)
            found.add_node(num_cpus=1)
            yield found
        finally:
            found.shutdown()
