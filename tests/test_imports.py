"""Imports run downward only, and importing a package imports no framework."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).resolve().parent.parent
FRAMEWORKS = {"keras", "keras_hub", "tensorflow", "jax", "torch", "matplotlib"}


def test_imports_run_downward(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The layers stand in pyproject.toml."""
    monkeypatch.syspath_prepend(str(ROOT))
    failed = lint_imports(str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True)
    assert not failed, capsys.readouterr().out


@pytest.mark.parametrize(
    "module", ["featstore", "trainer", "featstore.store.store", "featstore.features"]
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
