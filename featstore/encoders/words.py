"""Word pieces put together again: which tokens of a sentence make a word.

A tokenizer's pieces say themselves where a word starts or ends, in one of four ways:

    ##ing     WordPiece (BERT, DistilBERT): goes on
    Ġword     byte pairs (RoBERTa): starts, after a space; the first of a sentence has no mark
    ▁word     SentencePiece (XLM-RoBERTa, ALBERT): starts
    word</w>  byte pairs of CLIP: ends
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from featstore.encoders.families import FAMILIES
from featstore.encoders.framework import pinned_framework
from featstore.encoders.presets import Preset
from featstore.encoders.tokens import load_preprocessor


class Word(NamedTuple):
    """A word of a sentence.

    Attributes:
        text: As the tokenizer knows it; start and end tokens by their own names.
        start, stop: Its tokens, `start` to `stop - 1`.
    """

    text: str
    start: int
    stop: int


class Words:
    """Token ids to words, by a preset's tokenizer.

    Args:
        preset: A text preset, or one of two towers.

    Raises:
        PresetError: The tokenizer cannot be loaded.
    """

    def __init__(self, preset: Preset) -> None:
        tower = preset.tower("text")
        self.pieces = FAMILIES[tower.class_name].pieces
        self._tokenizer = pinned_framework()(load_preprocessor)(tower, 8).tokenizer

    def of(self, token_ids: NDArray[np.int32]) -> list[Word]:
        """Return the words of a sentence's tokens, every token in one of them."""
        names = [str(self._tokenizer.id_to_token(token)) for token in token_ids.tolist()]
        return merge_pieces(names, self.pieces)


def merge_pieces(names: Sequence[str], pieces: str) -> list[Word]:
    """Put pieces together.

    Args:
        names: A sentence's tokens by their names; the first and the last are those that stand
            for its start and its end.
        pieces: "##", "Ġ", "▁" or "</w>".

    Returns:
        The words; start and end tokens are words of their own.
    """
    last = len(names) - 1
    starts = [
        number
        for number, name in enumerate(names)
        if number in (0, 1, last) or _starts(name, names[number - 1], pieces)
    ]
    stops = [*starts[1:], len(names)]
    found = []
    for start, stop in zip(starts, stops, strict=True):
        special = start in (0, last)
        text = names[start] if special else _text(names[start:stop], pieces)
        found.append(Word(text, start, stop))
    return found


def _starts(name: str, before: str, pieces: str) -> bool:
    """Tell whether a piece starts a word, by itself or by the piece before it."""
    if pieces == "##":
        return not name.startswith("##")
    return before.endswith("</w>") if pieces == "</w>" else name.startswith(pieces)


def _text(names: Sequence[str], pieces: str) -> str:
    if pieces == "##":
        return "".join(name.removeprefix("##") for name in names)
    whole = "".join(names)
    if pieces == "▁":
        return whole.replace("▁", " ").strip() or whole
    whole = whole.replace("</w>", "") if pieces == "</w>" else whole
    known = _bytes_of()
    # A piece that is no bytes, such as the one for what is unknown, is shown as it is.
    if not all(letter in known for letter in whole):
        return whole
    return bytes(known[letter] for letter in whole).decode(errors="replace").strip() or whole


@functools.cache
def _bytes_of() -> dict[str, int]:
    """Return the byte that each letter of a byte-pair vocabulary stands for.

    Bytes that print stand for themselves, the others, in order, for the letters from U+0100
    (Radford et al. 2019, GPT-2).
    """
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    letters = {chr(byte): byte for byte in printed}
    return letters | {chr(0x100 + number): byte for number, byte in enumerate(others)}
