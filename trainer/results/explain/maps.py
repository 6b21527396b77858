"""What a run looks at in one row, by three methods that can be held against each other.

Attention: the weights of the head's cross-attention, as the model computes them.

Gradient × input (Shrikumar et al. 2016, arXiv:1605.01713; gradients alone: Simonyan et al. 2013,
arXiv:1312.6034): of each token the product of its numbers with the gradient of the log odds,
summed over the width. To first order it is what the token adds to the log odds.

Occlusion (Zeiler and Fergus 2014, arXiv:1311.2901): the log odds minus those without a window of
patches. Zeiler and Fergus grey the pixels; here the tokens of the window are zeros, as the
hypothesis-only control has them, so that no encoder runs. A patch's neighbours still know of it:
the encoder has mixed them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.model.apart import Apart, Entering, log_odds
from trainer.results.explain.patches import WINDOWS, Patches

FloatArray = NDArray[np.float32]

SHARES = (0.05, 0.1, 0.2, 0.5)
"""Of the cells that are hidden together in the deletion check."""
RANDOM_ORDERS = 8


@dataclass(frozen=True, eq=False)
class Maps:
    """What was found of one row.

    Attributes:
        logits: float32 of shape (outputs,).
        label: int: what the row is called.
        log_odds: Of entailment; of three classes that of `label`.
        attention: float32 of shape (layers, heads, queries, tokens): of each fusion layer, summing
            to 1 over the tokens. One query; where every text token asks, one of each.
        token_parts: float32 of shape (tokens,): gradient × input of the image's tokens.
        text_parts: float32 of shape (length,): gradient × input of the text states that enter the
            layers that train; where only one token's state is read, of that alone.
        occlusion: float32 of shape (windows, cells): `log_odds` minus that without the window
            around each cell, for each side of `WINDOWS`. As gradient × input, it is positive
            where the patches speak for entailment (of three classes for `label`).
    """

    logits: FloatArray
    label: int
    log_odds: float
    attention: FloatArray
    token_parts: FloatArray
    text_parts: FloatArray
    occlusion: FloatArray

    @property
    def mean_attention(self) -> FloatArray:
        """The attention of each layer over its heads and queries: (layers, tokens)."""
        return np.asarray(self.attention.mean(axis=(1, 2)))


@dataclass(frozen=True, eq=False)
class Deleted:
    """How far the log odds move without the cells that a map names first.

    Attributes:
        moved: Name of the map to float64 of shape (shares,): the absolute change.
    """

    moved: dict[str, NDArray[np.float64]]


class Explainer:
    """Makes the maps of rows.

    Args:
        apart: The model.
        patches: Its image tokens.
    """

    def __init__(self, apart: Apart, patches: Patches) -> None:
        self.apart, self.patches = apart, patches
        self.windows = [patches.windows(side) for side in WINDOWS]
        hidden = np.concatenate(self.windows)
        self._kept = patches.kept(np.concatenate([np.zeros_like(hidden[:1]), hidden]))

    def maps(self, row: Entering, label: int) -> Maps:
        """Return the maps of a row that is called `label`."""
        logits, attention, states = self.apart.look(row)
        odds = log_odds(self.apart.without(row, states, self._kept), label)
        of_tokens, of_hidden = self.apart.gradients(row, label)
        real = int(row.mask.sum())
        return Maps(
            logits,
            label,
            float(log_odds(logits[None], label)[0]),
            attention,
            (of_tokens * row.tokens).sum(axis=-1)[0],
            (of_hidden * row.hidden).sum(axis=-1)[0, :real],
            (odds[0] - odds[1:]).reshape(len(WINDOWS), -1).astype(np.float32),
        )

    def by_cell(self, values: NDArray[Any]) -> NDArray[Any]:
        """Add up numbers of tokens (..., tokens) by cell, leading tokens left out."""
        return values[..., self.patches.leading :] @ self.windows[0].T.astype(np.float32)

    def deleted(self, row: Entering, maps: Maps, rng: np.random.Generator) -> Deleted:
        """Hide more and more cells, those first that a map names first (Petsiuk et al. 2018,
        arXiv:1806.07421), and as many at random.

        Args:
            row: The row.
            maps: Its maps.
            rng: Decides the random ones.
        """
        states = self.apart.look(row)[2]
        ranked = {
            "occlusion": np.abs(maps.occlusion[0]),
            "attention": self.by_cell(maps.mean_attention[-1]),
            "gradient": np.abs(self.by_cell(maps.token_parts)),
        }
        cells = len(self.windows[0])
        orders = [np.argsort(-values, kind="stable") for values in ranked.values()]
        orders += [rng.permutation(cells) for _ in range(RANDOM_ORDERS)]
        counts = [max(1, round(share * cells)) for share in SHARES]
        hidden = np.stack(
            [self.windows[0][order[:count]].any(axis=0) for order in orders for count in counts]
        )
        odds = log_odds(self.apart.without(row, states, self.patches.kept(hidden)), maps.label)
        moved = np.abs(maps.log_odds - odds).reshape(len(orders), len(counts))
        named = dict(zip(ranked, moved, strict=False))
        return Deleted({**named, "random": moved[len(ranked) :].mean(axis=0)})
