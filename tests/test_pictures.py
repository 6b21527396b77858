"""The README's pictures: small, and made again by one command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

import trainer
from docs import pictures
from featstore import Project, demo
from featstore.demo import scenes
from featstore.progress import SILENT
from trainer.run.training import Reporter

ROOT = Path(__file__).resolve().parent.parent


def test_readme_shows_what_the_command_makes() -> None:
    shown = set(re.findall(r"docs/(\w+\.png)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert shown <= set(pictures.PICTURES)
    assert {path.name for path in (ROOT / "docs").glob("*.png")} == set(pictures.PICTURES)
    for name in pictures.PICTURES:
        path = ROOT / "docs" / name
        assert path.stat().st_size < pictures.LIMIT_BYTES
        with Image.open(path) as image:
            assert image.format == "PNG"
            # No ground of the page's own shows through.
            assert image.convert("RGBA").getchannel("A").getextrema() == (255, 255)


def test_times_are_those_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (_, step, cached_step, _), (_, search, cached_search, _) = pictures.times()
    assert f"{1000 * cached_step:.1f} ms" in readme
    assert f"{step:.2f} s" in readme
    assert f"{cached_search:.1f} h" in readme
    assert f"{search:.0f} h" in readme


@pytest.mark.slow
def test_the_command_draws_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "IMAGES", 120)
    monkeypatch.setattr(pictures, "SURE", 0)
    project = Project(root=str(tmp_path / "cache"))
    project.extract("vit", show=SILENT)
    run = trainer.train(
        project, name="first", runs=tmp_path, epochs=2, show=SILENT, reporter=Reporter()
    )
    told = list(pictures.telling(run.project, 6))
    truth_of = {statement.text: statement for statement in scenes.STATEMENTS}
    drawn = scenes.draw_questions(120, demo.SEED)[0]
    for image_id, holds, fails in told:
        scene = drawn[int(image_id.removeprefix("scene-"))]
        assert scenes.truth(truth_of[holds], scene) == 1
        assert scenes.truth(truth_of[fails], scene) == 0
    assert len({text for _, *both in told for text in both}) == 12
    monkeypatch.setattr(pictures.draw_demo, "__defaults__", (3, 2))
    args = ["--run", str(run.folder), "--out", str(tmp_path / "made")]
    done = CliRunner().invoke(pictures.main, args, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert {path.name for path in (tmp_path / "made").iterdir()} == set(pictures.PICTURES)
    assert (tmp_path / "made" / "curves.png").read_bytes() == run.curves_path.read_bytes()
    for name in pictures.PICTURES:
        with Image.open(tmp_path / "made" / name) as image:
            image.load()
