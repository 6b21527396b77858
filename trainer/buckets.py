"""Buckets of hypotheses by the words they have: which kinds of sentence a run is good at.

A bucket file is TOML, one bucket a line, and may be edited freely:

    colors = ["red", "blue", "light green"]     # words and phrases
    counting = 'one|two|three|\\d+'              # or one regular expression

Both match whole words only, and case is ignored; an apostrophe may be straight or
curly, and a blank of a phrase any white space. A hypothesis may be in several buckets.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.errors import ConfigError, short
from featstore.settings import read_toml

SHIPPED = Path(__file__).with_name("buckets.toml")
"""The ten buckets of the reference study."""


def load_buckets(path: str | os.PathLike[str] | None = None) -> dict[str, re.Pattern[str]]:
    """Read a bucket file.

    Args:
        path: The file; None: the ten buckets that ship.

    Returns:
        Name to pattern, in the order of the file; a hypothesis is in a bucket where
        `pattern.search` finds something.

    Raises:
        ConfigError: The file cannot be read, has no bucket, or one of them is neither a
            list of words nor a regular expression.
    """
    file = SHIPPED if path is None else Path(path)
    found = read_toml(file)
    if not found:
        raise ConfigError(
            f"{file}: no bucket in it; expected lines such as colors = ['red', 'blue']"
        )
    return {name: _pattern(f"{file}: bucket {name!r}", value) for name, value in found.items()}


def bucket_rows(
    buckets: Mapping[str, re.Pattern[str]], hypotheses: Sequence[str] | NDArray[np.object_]
) -> dict[str, NDArray[np.bool_]]:
    """Find the rows of each bucket.

    Args:
        buckets: Of `load_buckets`.
        hypotheses: str, of shape (rows,).

    Returns:
        Name to bool of shape (rows,), in the order of the buckets.
    """
    return {
        name: np.fromiter((bool(pattern.search(text)) for text in hypotheses), np.bool_)
        for name, pattern in buckets.items()
    }


def _pattern(where: str, value: Any) -> re.Pattern[str]:
    if isinstance(value, str):
        expression = value
    elif isinstance(value, list) and all(isinstance(item, str) for item in value):
        if not value or not all(item.strip() for item in value):
            raise ConfigError(f"{where}: expected at least one word, and none that is empty")
        expression = "|".join(_phrase(item) for item in value)
    else:
        raise ConfigError(
            f"{where}: expected a list of words such as ['red', 'light green'], or a regular"
            rf" expression such as 'one|two|\d+'; found {short(value)}"
        )
    try:
        # Alone first: within the group, unbalanced brackets could close it.
        bare = re.compile(expression)
        whole = re.compile(rf"(?<!\w)(?:{expression})(?!\w)", re.IGNORECASE)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(
            f"{where}: {short(value)} is not a regular expression ({error})"
        ) from error
    if bare.fullmatch(""):
        raise ConfigError(f"{where}: {short(value)} matches no letter at all: in every hypothesis")
    return whole


def _phrase(words: str) -> str:
    return r"\s+".join(re.sub("['’]", "['’]", re.escape(word)) for word in words.split())
