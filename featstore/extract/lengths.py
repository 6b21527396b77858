"""Which sentences are cut: how many tokens those have that fill every place of a row.

The store keeps the valid tokens of a sentence, `sequence_length` at most. One
that fills all of them either just fits or was cut; only the tokenizer can tell.
It is asked once, and what it says is kept beside the shards:

    lengths.json      sentence to its tokens, of those with `sequence_length` or more

A list that is missing or damaged is made anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from featstore.encoders.presets import resolve_preset
from featstore.encoders.tokens import token_counts
from featstore.errors import FeatstoreError, counted, short
from featstore.publish import read_checked, write_checked
from featstore.quantities import share
from featstore.store.store import TextStore

LENGTHS = "lengths.json"
FORMAT = 1
WARNING_SHARE = 0.05
"""Where more of the sentences are cut, the line that says so is a warning."""


@dataclass(frozen=True)
class Cut:
    """Sentences longer than a row of the store.

    Attributes:
        path: The list that names them all.
        sequence_length: Most tokens of a row, start and end included.
        sentences: Distinct sentences looked at.
        tokens: Sentence to the tokens that it has, of those that were cut, longest first.
        uncounted: Sentences that fill their row and were not counted yet: cut, or just fitting.
    """

    path: Path
    sequence_length: int
    sentences: int
    tokens: dict[str, int] = field(default_factory=dict)
    uncounted: int = 0

    @property
    def share(self) -> float:
        """The share of the sentences that were cut, 0 to 1."""
        return len(self.tokens) / self.sentences if self.sentences else 0.0

    def line(self) -> str:
        """Say how many were cut, in one line; "" where none was."""
        if not self.tokens:
            return ""
        longest, tokens = next(iter(self.tokens.items()))
        warning = "warning: " if self.share > WARNING_SHARE else ""
        verb = "is" if len(self.tokens) == 1 else "are"
        return (
            f"{warning}{len(self.tokens)} of {counted(self.sentences, 'sentence')}"
            f" ({share(self.share)}) {verb}"
            f" cut at sequence_length {self.sequence_length}; the longest has {tokens} tokens:"
            f" {short(longest)}; all in {self.path}; a larger [encoders] sequence_length keeps more"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the counts and the five longest, JSON-able."""
        return {
            "sequence_length": self.sequence_length,
            "sentences": self.sentences,
            "cut": len(self.tokens),
            "uncounted": self.uncounted,
            "longest": dict(list(self.tokens.items())[:5]),
            "file": str(self.path),
        }


def _listed(folder: Path, sequence_length: int) -> dict[str, int]:
    """Return what `lengths.json` says; nothing where it cannot be read."""
    try:
        found = read_checked(folder / LENGTHS)
        if (found["format"], found["fingerprint"]) != (FORMAT, folder.name):
            return {}
        tokens = found["tokens"]
        sound = all(type(n) is int and n >= sequence_length for n in tokens.values())
        return dict(tokens) if sound else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _filling(opened: TextStore, sentences: Sequence[str]) -> list[str]:
    """Return the sentences that fill every place of their row."""
    positions = opened.lookup(sentences)
    there = np.flatnonzero(positions >= 0)
    lengths = opened.lengths(positions[there])
    filling = there[lengths >= int(opened.spec["sequence_length"])]
    return [sentences[i] for i in filling.tolist()]


def _cut(
    opened: TextStore, sentences: Sequence[str], filling: Sequence[str], known: Mapping[str, int]
) -> Cut:
    limit = int(opened.spec["sequence_length"])
    tokens = {key: known[key] for key in filling if known.get(key, 0) > limit}
    tokens = dict(sorted(tokens.items(), key=lambda item: -item[1]))
    uncounted = sum(key not in known for key in filling)
    return Cut(opened.folder / LENGTHS, limit, len(sentences), tokens, uncounted)


def find_cut(opened: TextStore, sentences: Sequence[str]) -> Cut:
    """Say which of some distinct sentences were cut, as far as they were counted.

    Cost: no tokenizer and no framework.
    """
    known = _listed(opened.folder, int(opened.spec["sequence_length"]))
    return _cut(opened, sentences, _filling(opened, sentences), known)


def count_cut(opened: TextStore, sentences: Sequence[str], preset: str) -> Cut:
    """Say which of some distinct sentences were cut; count those that were not counted yet.

    Args:
        opened: Their features.
        sentences: Distinct; those without features are passed over.
        preset: The text encoder's, as the user named it.

    Raises:
        PresetError: Its tokenizer cannot be loaded.
    """
    limit = int(opened.spec["sequence_length"])
    known, filling = _listed(opened.folder, limit), _filling(opened, sentences)
    if new := [key for key in filling if key not in known]:
        known |= zip(new, token_counts(resolve_preset(preset), new), strict=True)
        content = {"format": FORMAT, "fingerprint": opened.folder.name, "tokens": known}
        # In a store that may not be written, they are counted again each time.
        with contextlib.suppress(FeatstoreError):
            write_checked(opened.folder / LENGTHS, content)
    return _cut(opened, sentences, filling, known)
