"""Templates into pages: one file, no request, read in any browser."""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featstore.publish import package_versions, write_text

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"
MISSING = "–"
_BROKEN = re.compile(r"(?<=\d) %")


def share(value: float | None, digits: int = 1) -> str:
    """Return a share as per cent, a dash where there is none."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{100 * value:.{digits}f} %"


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with so many decimals (a whole one with none), a dash for none."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def duration(seconds: float | None) -> str:
    """Return seconds as people say them: "0.4 s", "2 min 5 s", "3 h 20 min"."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 60:
        return f"{seconds:.{1 if seconds < 10 else 0}f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if minutes else f"{hours:,} h"


def size(num_bytes: float | None) -> str:
    """Return bytes in the unit that has one to three digits before the point."""
    if num_bytes is None:
        return MISSING
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(share=share, number=number, duration=duration, size=size)
    return environment


def render(template: str, title: str, **content: Any) -> str:
    """Return a page.

    Args:
        template: Name in `templates/`; it extends `base.html`.
        title: Of the page.
        content: What the template names. Text is escaped; what `drawing.svg` returns is
            put in by the macro `figure`.
    """
    versions: Mapping[str, str] = package_versions()
    found = _environment().get_template(template)
    # A number and its sign stay on one line.
    return _BROKEN.sub(
        "\N{NO-BREAK SPACE}%", found.render(title=title, versions=versions, **content)
    )


def write_page(path: str | os.PathLike[str], template: str, title: str, **content: Any) -> int:
    """Write a page, whole or not at all; see `render`.

    Returns:
        Its bytes.

    Raises:
        FeatstoreError: The file cannot be written.
    """
    text = render(template, title, **content)
    write_text(Path(path), text)
    return len(text.encode())
