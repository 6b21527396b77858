"""Imports run downward only, and importing a package imports no framework."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FRAMEWORKS = {"keras", "keras_hub", "tensorflow", "jax", "torch", "matplotlib"}


def test_imports_run_downward() -> None:
    """The layers stand in pyproject.toml."""
    # In a process of its own: it keeps hold of the streams that it finds.
    script = "from importlinter.cli import lint_imports_command as lint; lint()"
    done = subprocess.run(
        [sys.executable, "-c", script, "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Contracts: 4 kept, 0 broken." in done.stdout


@pytest.mark.parametrize(
    "module",
    ["featstore", "trainer", "featstore.store.store", "featstore.features", "trainer.tuning.drive"],
)
def test_importing_it_imports_no_framework(module: str) -> None:
    script = (
        f"import sys, {module}; print(*sorted({FRAMEWORKS!r} & sys.modules.keys()))\n"
        f"assert {module!r} in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr
