"""How well a map of a row predicts what hiding its patches does: rank correlations.

Jain and Wallace 2019 (arXiv:1902.10186) asked this of attention over words; here it is asked of
attention and of gradient × input over patches, against occlusion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from trainer.results.explain.maps import SHARES, Deleted, Explainer, Maps
from trainer.results.explain.patches import WINDOWS
from trainer.statistics import LEVEL, Clustered, percentiles

Values = NDArray[np.float64]


def spearman(maps: NDArray[Any], target: NDArray[Any]) -> Values:
    """Return Spearman's rank correlation of maps with a target, over the last axis.

    Args:
        maps: Float of shape (..., n).
        target: Float of shape (n,).

    Returns:
        float64 of shape (...,); NaN where a map or the target is constant.
    """
    a, b = (rankdata(values, axis=-1) for values in (maps, target))
    a, b = (values - values.mean(axis=-1, keepdims=True) for values in (a, b))
    scale = np.sqrt((a**2).sum(axis=-1) * (b**2).sum())
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(scale > 0, (a * b).sum(axis=-1) / scale, np.nan))


def map_names(layers: int, heads: int) -> list[str]:
    """Return the names of the maps of `correlations`, in their order."""
    of_layer = [f" of layer {layer}" if layers > 1 else "" for layer in range(1, layers + 1)]
    return [
        *(f"attention{layer}" for layer in of_layer),
        *(f"head {head}{layer}" for layer in of_layer for head in range(1, heads + 1)),
        "gradient × input",
    ]


def correlations(explainer: Explainer, maps: Maps) -> Values:
    """Return how each map of a row is correlated with the absolute changes of occlusion.

    Returns:
        float64 of shape (windows, maps), the maps as `map_names` has them: of each layer the mean
        attention, then each head's, then the absolute gradient × input. What a map says of a
        window is its sum over the window's patches.
    """
    leading = explainer.patches.leading
    of_heads = maps.attention.mean(axis=2).reshape(-1, maps.attention.shape[-1])
    attention = np.concatenate([maps.mean_attention, of_heads])[:, leading:]
    gradient = maps.token_parts[leading:]
    found = []
    for patches, changes in zip(explainer.windows, maps.occlusion, strict=True):
        of_window = patches.T.astype(np.float64)
        every = np.concatenate([attention @ of_window, np.abs(gradient @ of_window)[None]])
        found.append(spearman(every, np.abs(changes)))
    return np.stack(found)


def signed_correlation(maps: Maps, explainer: Explainer) -> Values:
    """Return how gradient × input, with its sign, is correlated with occlusion: (windows,)."""
    gradient = maps.token_parts[explainer.patches.leading :].astype(np.float64)
    pairs = zip(explainer.windows, maps.occlusion, strict=True)
    return np.array([spearman(gradient @ own.T, changes) for own, changes in pairs])


def agreement(
    explainer: Explainer, maps: Sequence[Maps], image_ids: Sequence[str], seed: int
) -> dict[str, Any]:
    """Return how well the maps of some rows predict occlusion.

    Args:
        explainer: What made the maps.
        maps: Of each row.
        image_ids: Of each row: intervals are bootstrapped over images.
        seed: Of the draws, and of the halves between which the best head is chosen.

    Returns:
        `rows`, `images`, `level`, `draws`, `best_head` (the head, from 1, and its `layer`, whose
        correlation is the highest over all rows and single cells), `windows`: of each side of a
        window the mean `spearman` of each map with its `interval` and the `rows` where it is
        defined. "best head" is measured on rows that did not choose it: the images are halved,
        and each half is measured with the head that is the best of the other.
        "attention of another row" is a row's occlusion against another photo's attention: what
        of the correlation does not come from this photo.
    """
    clustered = Clustered(list(image_ids), seed=seed)
    layers, heads = maps[0].attention.shape[:2]
    names = map_names(layers, heads)
    rho = np.stack([correlations(explainer, one) for one in maps])
    # Chosen on the other half of the images.
    order = np.random.default_rng(seed).permutation(clustered.images)
    half = order[clustered.image_of_row] % 2
    single = slice(layers, layers + layers * heads)
    best = np.full((len(maps), len(WINDOWS)), np.nan)
    for own in (0, 1):
        if (half != own).any() and (half == own).any():
            chosen = _best(rho[half != own, 0, single])
            best[half == own] = rho[half == own][:, :, layers + chosen]
    signed = np.stack([signed_correlation(one, explainer) for one in maps])
    other = _of_other_rows(explainer, maps, clustered)
    top = _best(rho[:, 0, single])
    shown = {
        **{name: rho[:, :, i] for i, name in enumerate(names[:layers])},
        "best head": best,
        "gradient × input": rho[:, :, -1],
        "gradient × input, signed": signed,
        "attention of another row": other,
    }
    return {
        "rows": len(maps),
        "images": clustered.images,
        "seed": seed,
        "level": LEVEL,
        "draws": clustered.draws,
        "best_head": {"layer": top // heads + 1, "head": top % heads + 1},
        "windows": [
            {
                "patches": side * explainer.patches.cell,
                "maps": {name: mean_of(found[:, i], clustered) for name, found in shown.items()},
            }
            for i, side in enumerate(WINDOWS)
        ],
    }


def _best(rho: Values) -> int:
    """Return which map has the highest mean; the first where none is defined."""
    known = ~np.isnan(rho)
    sums = np.where(known, rho, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    return int(np.argmax(np.where(known.any(axis=0), sums, -np.inf)))


def _of_other_rows(explainer: Explainer, maps: Sequence[Maps], clustered: Clustered) -> Values:
    """Return the correlation of each row's occlusion with the last attention of another photo's
    row, (rows, windows); NaN where there is one photo.
    """
    found = np.full((len(maps), len(WINDOWS)), np.nan)
    if clustered.images < 2:
        return found
    # The first row of the next photo.
    _, first = np.unique(clustered.image_of_row, return_index=True)
    for i, image in enumerate(clustered.image_of_row.tolist()):
        other = maps[first[(image + 1) % clustered.images]].mean_attention[-1]
        values = other[explainer.patches.leading :].astype(np.float64)
        for j, patches in enumerate(explainer.windows):
            found[i, j] = spearman(values @ patches.T, np.abs(maps[i].occlusion[j]))
    return found


def mean_of(values: Values, clustered: Clustered) -> dict[str, Any]:
    """Return the mean of a figure of rows, NaN left out, with its interval over images.

    Returns:
        `mean` (None where no row has the figure), `interval`, `rows` that have it.
    """
    known = ~np.isnan(values)
    if not known.any():
        return {"mean": None, "interval": None, "rows": 0}
    table = np.where(known, values, 0)
    sums = clustered.sums(clustered.by_image(table))[:, 0]
    counts = clustered.sums(clustered.by_image(known))[:, 0]
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = np.where(counts > 0, sums / counts, np.nan)
    return {
        "mean": float(values[known].mean()),
        "interval": percentiles(drawn, clustered),
        "rows": int(known.sum()),
    }


def deletion(
    deleted: Sequence[Deleted], image_ids: Sequence[str], seed: int
) -> list[dict[str, Any]]:
    """Return how far the log odds move without the patches that each map names first.

    Returns:
        Of each share of `SHARES`: `share`, and by map ("occlusion", "attention" of the last
        layer, "gradient", "random") the mean absolute change, with its interval.
    """
    clustered = Clustered(list(image_ids), seed=seed)
    return [
        {
            "share": share,
            **{
                name: mean_of(np.array([one.moved[name][i] for one in deleted]), clustered)
                for name in deleted[0].moved
            },
        }
        for i, share in enumerate(SHARES)
    ]
