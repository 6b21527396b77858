"""What an image id and a hypothesis may be, as a row file or a table has them."""

from __future__ import annotations

import re
from typing import Any

from featstore.errors import short

EMPTY_TEXT = "empty text"
BROKEN_TEXT = "broken text"
NO_IMAGE_ID = "no image id"
UNSAFE_IMAGE_ID = "unsafe image id"

_UNSAFE_ID = re.compile(r"[\x00-\x1f\x7f\\]|^[A-Za-z]:|(?:^|/)\.{0,2}(?:/|$)")
_MAX_ID_CHARACTERS = 1024


def _text_problem(text: str) -> str:
    """Say what keeps a text from being stored, or return nothing."""
    if "\0" in text:
        return "NUL character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "lone surrogate"
    return ""


def read_image_id(value: Any) -> tuple[str, str, str]:
    """Return an image id as text, and the reason and detail why it cannot be used."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if value is None:
        return "", NO_IMAGE_ID, "missing"
    if not isinstance(value, str):
        return "", UNSAFE_IMAGE_ID, f"neither text nor an integer: {short(value)}"
    image_id = value.strip()
    if not image_id:
        return "", NO_IMAGE_ID, "empty"
    if _UNSAFE_ID.search(image_id) or len(image_id) > _MAX_ID_CHARACTERS:
        detail = "expected a name, or a relative path with / and without . or .. in it"
        return image_id, UNSAFE_IMAGE_ID, detail
    if problem := _text_problem(image_id):
        return image_id, UNSAFE_IMAGE_ID, problem
    return image_id, "", ""


def is_missing(value: Any) -> bool:
    """Tell whether a cell has nothing in it."""
    return value is None or (isinstance(value, str) and not value.strip())


def read_hypothesis(value: Any) -> tuple[str, str, str]:
    """Return a hypothesis as text, and the reason and detail why it cannot be used."""
    if value is None:
        return "", EMPTY_TEXT, "missing"
    if not isinstance(value, str):
        return "", BROKEN_TEXT, f"not text: {short(value)}"
    text = value.strip()
    if not text:
        return "", EMPTY_TEXT, "empty"
    if problem := _text_problem(text):
        return text, BROKEN_TEXT, problem
    return text, "", ""
