"""Pages: figures, tables and numbers as every page has them, in a real browser."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from browser import check_page, opened_browser
from jinja2 import DictLoader, StrictUndefined, UndefinedError
from PIL import Image

from trainer.pages import page
from trainer.pages.drawing import bars, new_figure, photo_uri, svg, write_png

TRIED = """{% extends "base.html" %}
{% block content %}
<section id="a"><h2>Figures</h2>{{ parts.facts([("accuracy", 0.791 | share, "of <val>")]) }}
{{ parts.figure(one, "Bars") }}{{ parts.figure(two) }}<img src="{{ photo }}" alt="Red"></section>
<section id="b"><h2>Table</h2>
{{ parts.table([("name", ""), ("value", "number")], rows, "Values", true) }}
{{ parts.command("python cli.py train --k-txt 3") }}</section>
{% endblock %}"""
ROWS = [["x", "10"], ["y", "1,200"], ["z", "–"], ["<b>", "9"]]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    environment = page._environment().overlay()
    assert environment.undefined is StrictUndefined
    found = page.TEMPLATES
    environment.loader = DictLoader(
        {"tried.html": TRIED} | {file.name: file.read_text() for file in found.iterdir()}
    )
    monkeypatch.setattr(page, "_environment", lambda: environment)
    curve = new_figure()
    axes = curve.subplots()
    axes.plot([1, 2, 3], [3, 1, 2], label="val loss")
    axes.axvline(2, color="black", linestyle=":")
    axes.legend()
    with pytest.raises(UndefinedError):
        page.render("tried.html", "Lacks its figures")
    size = page.write_page(
        tmp_path / "tried.html",
        "tried.html",
        "A <title>",
        one=svg(bars(["one", "two"], [1, 3], "rows"), 'Bars: "two" is the longest'),
        two=svg(curve, "A curve"),
        photo=photo_uri(Image.new("RGB", (900, 300), "red")),
        rows=ROWS,
    )
    assert size == (tmp_path / "tried.html").stat().st_size
    return tmp_path / "tried.html"


@pytest.mark.slow
def test_a_page_opens_offline_at_any_width(written: Path) -> None:
    check_page(written)


@pytest.mark.slow
def test_tables_sort_as_numbers_do(written: Path) -> None:
    with opened_browser() as browser:
        tab = browser.new_page()
        tab.goto(written.as_uri())
        tab.get_by_role("button", name="value").click()
        cells = "[...document.querySelectorAll('tbody td')].map(cell => cell.textContent)"
        assert tab.evaluate(cells) == ["9", "10", "1,200", "–"]
        tab.keyboard.press("Enter")
        assert tab.evaluate(cells) == ["1,200", "10", "9", "–"]
        tab.get_by_role("button", name="name").click()
        names = "[...document.querySelectorAll('tbody th')].map(cell => cell.textContent)"
        assert tab.evaluate(names) == ["<b>", "x", "y", "z"]


def test_figures_of_a_page_share_no_names_and_take_its_ink(written: Path) -> None:
    text = written.read_text()
    names = re.findall(r'\bid="([^"]+)"', text)
    assert len(names) == len(set(names))
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text)) - {"content"}
    assert used
    assert used <= set(names)
    assert "currentColor" in text
    assert "#000000" not in text
    assert "<title>A &lt;title&gt;</title>" in text
    assert 'aria-label="Bars: &quot;two&quot; is the longest"' in text


def test_a_figure_is_also_a_file(tmp_path: Path) -> None:
    write_png(bars(["one", "two"], [1, 3], "rows"), tmp_path / "bars.png")
    with Image.open(tmp_path / "bars.png") as image:
        assert image.getpixel((0, 0))[:3] == (255, 255, 255)
