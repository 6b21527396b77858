"""A map of rows: what the head makes of them before its last layer, in two dimensions."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from featstore.data.labels import UNLABELLED
from featstore.encoders.framework import pinned_framework
from trainer.results.score import Scorer
from trainer.run.step import make_predictor

LAYER = "mlp_1"
MOST_ROWS, FEWEST_ROWS = 2000, 10
PERPLEXITY, SEED = 30.0, 0


@pinned_framework()
def activations(
    scorer: Scorer, split: str, control: str, count: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return what `mlp_1` gives for a draw of a split's labelled rows.

    Args:
        scorer: The run.
        split: "train", "val" or "test".
        control: As it was trained.
        count: Rows that were measured, which are the split's labelled ones.

    Returns:
        int64 of shape (n,): places among the measured rows, in order, at most `MOST_ROWS`;
        float32 of shape (n, `mlp_dim`).

    Raises:
        FeatstoreError: The features are not there.
        ValueError: The rows are not those that were measured.
    """
    rows = scorer.rows(split, control)
    labelled = np.flatnonzero(rows.labels != UNLABELLED)
    if len(labelled) != count:
        raise ValueError(f"expected {count} labelled rows, found {len(labelled)}")
    drawn = np.random.default_rng(SEED).permutation(count)[:MOST_ROWS]
    drawn.sort()
    model = scorer.model
    inner = keras.Model({x.name: x for x in model.inputs}, model.get_layer(LAYER).output)
    predictor, size = make_predictor([inner]), scorer.train.batch_size
    order = np.argsort(rows.lengths[labelled[drawn]], kind="stable")
    found = np.empty((len(drawn), inner.output.shape[-1]), np.float32)
    for start in range(0, len(order), size):
        part = order[start : start + size]
        values = predictor.predict(rows.batch(labelled[drawn[part]], size))[0]
        found[part] = values.reshape(len(part), -1)
    return drawn, found


def in_two_dimensions(values: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """Return maps of rows: t-SNE, and UMAP where it is installed.

    Args:
        values: float32 of shape (n, width), at least `FEWEST_ROWS` rows.

    Returns:
        Name of the method to float32 of shape (n, 2).
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    tsne = TSNE(perplexity=perplexity(len(values)), init=_start(values), random_state=SEED)
    # Of several threads the sums differ from time to time, and on a busy machine they wait for
    # each other: five times as long was measured.
    with threadpool_limits(1):
        found = {"t-SNE": np.asarray(tsne.fit_transform(values), np.float32)}
    try:
        from umap import UMAP
    except ImportError:
        return found
    reducer: Any = UMAP(n_neighbors=min(15, len(values) - 1), random_state=SEED, n_jobs=1)
    return {**found, "UMAP": np.asarray(reducer.fit_transform(values), np.float32)}


def perplexity(count: int) -> float:
    """Return t-SNE's perplexity for so many rows: 30, or a third of the rows, of few."""
    return min(PERPLEXITY, (count - 1) / 3)


def _start(values: NDArray[np.float32]) -> str:
    """Return where t-SNE starts: its principal components, where there are two."""
    return (
        "pca" if min(values.shape) >= 2 and values.std(axis=0).astype(bool).sum() > 1 else "random"
    )
