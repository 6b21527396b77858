"""How long hypotheses are, and what training batches of them are padded to."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainer.batches import epoch_batches

# Tokens with [CLS] and [SEP] to how many of 6,649 hypotheses of SNLI-VE on Flickr8k photos, by
# BERT's uncased vocabulary and cut at 24; 9.8 on average.
# fmt: off
HYPOTHESES_OF_TOKENS = {
    4: 14, 5: 97, 6: 368, 7: 877, 8: 949, 9: 1143, 10: 1102, 11: 680, 12: 455, 13: 318, 14: 222,
    15: 140, 16: 99, 17: 59, 18: 37, 19: 33, 20: 14, 21: 13, 22: 10, 23: 4, 24: 15,
}
# fmt: on
STUDY_TRAIN_ROWS = 31_340


def token_counts(count: int, longest: int, seed: int = 1) -> NDArray[np.int64]:
    """Return the tokens of sentences, as hypotheses have them.

    Args:
        count: How many sentences.
        longest: Longer ones are cut to it.
        seed: Of their order.

    Returns:
        int64 of shape (count,), in the proportions of `HYPOTHESES_OF_TOKENS`.
    """
    lengths = np.repeat(list(HYPOTHESES_OF_TOKENS), list(HYPOTHESES_OF_TOKENS.values()))
    places = (np.arange(count) + 0.5) / count * len(lengths)
    chosen = np.minimum(lengths[places.astype(np.int64)], longest)
    return np.random.default_rng(seed).permutation(chosen).astype(np.int64)


def padded_lengths(
    sequence_length: int, batch_size: int, batches: int, rows: int = STUDY_TRAIN_ROWS
) -> list[int]:
    """Return what the batches of an epoch of the study are padded to.

    Args:
        sequence_length: The longest sentence.
        batch_size: Rows of a batch.
        batches: How many to return: every so-manieth of the epoch's, by length.
        rows: Rows of the epoch.

    Returns:
        Lengths, ascending.
    """
    lengths = token_counts(rows, sequence_length)
    steps = epoch_batches(lengths, batch_size, seed=0, epoch=0, group=True)
    longest = np.sort([lengths[step].max() for step in steps])
    return [int(longest[len(steps) * (2 * i + 1) // (2 * batches)]) for i in range(batches)]
