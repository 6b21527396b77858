"""The notebooks: made of their text, and every cell runs in an empty folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NAMES = ["quickstart", "your_data"]


def test_every_text_is_tested() -> None:
    for suffix in (".py", ".ipynb"):
        assert sorted(path.stem for path in EXAMPLES.glob(f"*{suffix}")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_that_of_its_text(name: str) -> None:
    """After a change: jupytext --to ipynb --update examples/*.py."""
    text = jupytext.read(EXAMPLES / f"{name}.py")
    made = nbformat.read(EXAMPLES / f"{name}.ipynb", nbformat.NO_CONVERT)
    nbformat.validate(made)
    expected = [(cell.cell_type, cell.source) for cell in text.cells]
    assert [(cell.cell_type, cell.source) for cell in made.cells] == expected
    assert made.metadata.kernelspec == text.metadata.kernelspec
    for cell in made.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: Any
) -> None:
    from nbclient import NotebookClient

    # The kernel of this interpreter, whatever is installed for the user.
    for variable in ("JUPYTER_DATA_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(variable, os.fspath(tmp_path_factory.mktemp("jupyter")))
    monkeypatch.setenv("PYTHONPATH", os.fspath(EXAMPLES.parent))
    # What the tests set for themselves, a reader has not.
    for variable in ("TF_CPP_MIN_LOG_LEVEL", "TF_ENABLE_ONEDNN_OPTS", "MPLBACKEND"):
        monkeypatch.delenv(variable, raising=False)
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", nbformat.NO_CONVERT)
    place = {"metadata": {"path": os.fspath(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute()
    outputs: list[Any] = [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]
    said = "".join(output.text for output in outputs if output.output_type == "stream")
    for noise in ("absl", "oneDNN", "cuda", "Warning"):
        assert noise not in said
    pictures = [kind for output in outputs for kind in output.get("data", {}) if "image/" in kind]
    assert len(pictures) == {"quickstart": 5, "your_data": 1}[name]
    assert [path.name for path in tmp_path.iterdir()] == [name]
