"""Templates into pages: one file, no request, read in any browser."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featstore.publish import package_versions, write_text
from featstore.quantities import duration, number, share, size

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"
_BROKEN = re.compile(r"(?<=\d) %")


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
