"""The wheel: what is in it, and that it runs from where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("featstore", "trainer")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*args: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        args,
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*args: str, cwd: Path) -> None:
    options = ("--no-deps", "--no-index", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", args[0], *options, *args[1:], cwd=cwd)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, so that an old build folder cannot add to it."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    source.mkdir()
    for name in (*PACKAGES, "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("cli.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(folder), ".", cwd=source)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    folder = wheel.parent / "installed"
    pip("install", "--target", str(folder), str(wheel), cwd=wheel.parent)
    return folder


@pytest.mark.slow
def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file()
        if path.suffix in (".py", ".toml") or {"presets", "templates"} & {*path.parts}
        if "__pycache__" not in path.parts
    }
    assert {"trainer/commands/main.py", "featstore/demo/presets/vit_demo/config.json"} <= expected
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = (name for name in names if name.endswith("/entry_points.txt"))
        text = archive.read(entry_points).decode()
    information = entry_points.removesuffix("entry_points.txt")
    assert {name for name in names if not name.startswith(information)} == expected
    assert text.split("\n")[:2] == [
        "[console_scripts]",
        "featstore = featstore.__main__:main",
    ]


@pytest.mark.slow
def test_the_installed_commands_say_their_version(installed: Path, tmp_path: Path) -> None:
    expected = f"featstore {PROJECT['version']}\n"
    for command in ((sys.executable, "-m", "featstore"), (str(installed / "bin" / "featstore"),)):
        # Not the checkout, which an editable install would find.
        assert run(*command, "--version", cwd=tmp_path, PYTHONPATH=str(installed)) == expected
    script = "import featstore, trainer; print(featstore.__file__, trainer.__file__)"
    found = run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(installed)).split()
    assert [Path(path).parent for path in found] == [installed / name for name in PACKAGES]


def test_a_checkout_says_its_version(tmp_path: Path) -> None:
    found = run(sys.executable, "-m", "featstore", "--version", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert found == f"featstore {PROJECT['version']}\n"
