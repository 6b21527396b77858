"""The framework: which backends are taken, in one line which are not; both give the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import write_data

from featstore.encoders.framework import import_framework
from featstore.errors import UsageError

ROOT = Path(__file__).parent.parent


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("backend", ["torch", "numpy", "openvino", "tensorfow"])
def test_another_backend_is_one_line(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_BACKEND", backend)
    with pytest.raises(UsageError) as caught:
        import_framework()
    line = str(caught.value)
    assert line.startswith(f"KERAS_BACKEND={backend}: ")
    assert "KERAS_BACKEND=tensorflow or KERAS_BACKEND=jax" in line
    assert "\n" not in line


def test_a_command_on_another_backend(tiny_vit: Path, tiny_text: Path, tmp_path: Path) -> None:
    options = {**write_data(tmp_path / "data"), "root": tmp_path / "root"}
    options |= {"vit": tiny_vit, "text": tiny_text}
    flags = [
        part
        for name, value in options.items()
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    for command in ("extract-vit", "extract-text"):
        done = run("cli.py", command, *flags, KERAS_BACKEND="torch")
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = [text for text in done.stderr.splitlines() if not text.startswith("rows: ")]
        assert line.startswith("error: KERAS_BACKEND=torch: ")


@pytest.mark.parametrize(
    ("backend", "package"), [("jax", "jax"), ("tensorflow", "tensorflow"), ("", "keras")]
)
def test_a_missing_package_is_one_line(backend: str, package: str) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from featstore.errors import UsageError\n"
        "from trainer.commands.console import import_framework\n"
        "try: import_framework()\n"
        "except UsageError as error: print(error.exit_code, error)"
    )
    done = run("-c", code, KERAS_BACKEND=backend)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("2 Keras cannot be imported on the backend ")
    assert package in line
    assert "KERAS_BACKEND=tensorflow or KERAS_BACKEND=jax" in line


@pytest.mark.slow
def test_a_backend_of_keras_json_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "keras.json").write_text('{"backend": "numpy"}')
    code = (
        "from featstore.encoders.framework import import_framework\n"
        "from featstore.errors import UsageError\n"
        "try: import_framework()\n"
        "except UsageError as error: print(error)"
    )
    done = run("-c", code, KERAS_BACKEND="", KERAS_HOME=str(tmp_path))
    assert done.stdout.splitlines() == [
        f"{tmp_path / 'keras.json'}: backend numpy is not supported; set KERAS_BACKEND=tensorflow"
        " or KERAS_BACKEND=jax"
    ]


@pytest.mark.slow
def test_jax_cuts_and_compiles_the_same(tiny_vit: Path, tiny_text: Path) -> None:
    code = """
import sys
import numpy as np
from featstore.encoders.tower import TextEncoder, VisionEncoder
import keras
assert keras.backend.backend() == "jax"
vision, text = VisionEncoder(sys.argv[1]), TextEncoder(sys.argv[2], 12)
pixels = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
ids, mask = text.tokenize(["a dog runs", "cat"])
for k in range(3):
    expected = np.asarray(vision.tower.lower(k)(pixels))[:, 1:]
    np.testing.assert_allclose(vision.encode(pixels, k), expected, atol=1e-5)
    expected = np.asarray(text.tower.lower(k)(text.tower.inputs(ids, mask)))
    np.testing.assert_allclose(text.encode(ids, mask, k), expected, atol=1e-5)
assert np.asarray(text.backbone.weights[0]).shape
print("same")
"""
    done = run("-c", code, str(tiny_vit), str(tiny_text), KERAS_BACKEND="jax")
    assert done.stdout.strip() == "same", done.stderr[-2000:]
