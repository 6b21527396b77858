"""Words that give the label away: log-odds with an informative prior.

Monroe, Colaresi and Quinn 2008 (Fightin' Words, doi:10.1093/pan/mpn018, eq. 16 and 22): the
log-odds of a word in one class less those in the others, each with the word's share of all
classes as a Dirichlet prior, over the standard deviation of that difference.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from scipy.stats import norm

from featstore.data.examples import Examples
from featstore.data.labels import labels_of
from trainer.exploration.sentences import words_of

PRIOR_WORDS = 1000.0
"""The prior counts as so many words: rare words are pulled to no difference."""
LEAST_ROWS = 5


def log_odds(examples: Examples, classes: int, top: int = 20) -> dict[str, Any]:
    """Find the words by which classes differ most.

    A word counts once in a row, however often it stands there. Of three classes each is
    compared with the two others.

    Args:
        examples: Labelled rows.
        classes: 2 or 3.
        top: Words of each class that are named.

    Returns:
        `words` with `LEAST_ROWS` rows or more; `limit`: the |z| that one of so many words
        passes by chance with a probability of 5 % (Bonferroni, two-sided); and `classes`: of
        each `beyond`, how many of its words are above that, and `top`: the words of the
        largest z, each with `word`, `z`, `log_odds`, `rows` (with the word) and `share` of
        them that are of this class. A class that has all rows, or none, has no words.
    """
    counters: list[Counter[str]] = [Counter() for _ in range(classes)]
    for sentence, label in zip(examples.hypotheses, examples.labels.tolist(), strict=True):
        counters[label].update(set(words_of(sentence)))
    vocabulary = sorted(set().union(*counters))
    table = np.array(
        [[counter[word] for word in vocabulary] for counter in counters], np.float64
    ).reshape(classes, -1)
    rows, total = table.sum(axis=0), table.sum()
    frequent = rows >= LEAST_ROWS
    words = int(frequent.sum())
    limit = float(norm.isf(0.05 / 2 / words)) if words else None
    prior = PRIOR_WORDS * rows / max(total, 1)
    found = {}
    for name, label in labels_of(classes).items():
        inside, outside = table[label], rows - table[label]
        if not words or not inside.sum() or not outside.sum():
            found[name] = {"beyond": 0, "top": []}
            continue

        def odds(counts: np.ndarray) -> np.ndarray:
            with_prior = counts + prior
            return np.asarray(np.log(with_prior / (with_prior.sum() - with_prior)))

        difference = odds(inside) - odds(outside)
        z = difference / np.sqrt(1 / (inside + prior) + 1 / (outside + prior))
        order = np.argsort(np.where(frequent, -z, np.inf), kind="stable")[: min(top, words)]
        found[name] = {
            "beyond": int(np.sum(frequent & (z > limit))),
            "top": [
                {
                    "word": vocabulary[i],
                    "z": float(z[i]),
                    "log_odds": float(difference[i]),
                    "rows": int(rows[i]),
                    "share": float(inside[i] / rows[i]),
                }
                for i in order.tolist()
                if z[i] > 0
            ],
        }
    return {"words": words, "limit": limit, "classes": found}
