"""A program run in a process of its own, with Keras on JAX."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def run_on_jax(*arguments: str, timeout: float | None = None) -> str:
    """Run Python on the CPU, where the tests can be imported too; return its standard output.

    Args:
        arguments: Of Python, such as `"-c", program`.
        timeout: Seconds after which it is taken to hang.
    """
    environment = {
        **os.environ,
        "KERAS_BACKEND": "jax",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout
