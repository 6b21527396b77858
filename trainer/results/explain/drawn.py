"""The page of an explanation, and its pictures."""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from featstore.data.labels import LABEL_NAMES, UNLABELLED
from featstore.errors import counted
from featstore.quantities import MISSING, number, share
from trainer.logits import sigmoid
from trainer.pages.drawing import (
    CLASS_COLORS,
    COLORS,
    data_uri,
    legend_below,
    new_figure,
    photo_uri,
    svg,
    write_png,
)
from trainer.pages.page import write_page
from trainer.results.explain.patches import WINDOWS
from trainer.results.explain.row import Explained, ShownPhoto

if TYPE_CHECKING:
    from trainer.results.explain.explain import Explanation

FOR, AGAINST = CLASS_COLORS["entailment"], CLASS_COLORS["contradiction"]
LOW_ALPHA, HIGH_ALPHA = 0.25, 0.8
# Of a line above a map of `write_pngs`.
TITLE_LETTERS = 42


def percent(value: float, digits: int = 0) -> str:
    """Return a share as per cent that no line breaks."""
    return share(value, digits).replace(" ", "\N{NO-BREAK SPACE}")


class Map(NamedTuple):
    """A map over a photo.

    Attributes:
        title: What it is.
        values: Float of shape (rows, columns).
        alt: What it shows, for those who do not see it.
        caption: Its title and its largest numbers.
        signed: Two colours, by the sign.
    """

    title: str
    values: NDArray[Any]
    alt: str
    caption: str
    signed: bool = False


def colored(values: NDArray[Any], signed: bool) -> NDArray[np.uint8]:
    """Return a map's colours: the larger, the less of the photo is seen through it.

    Args:
        values: Float of shape (rows, columns).
        signed: Two colours by the sign, else a scale of light from 0 to the largest.

    Returns:
        uint8 of shape (rows, columns, 4): RGBA.
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    top = np.abs(values).max(initial=0)
    part = np.abs(values) / top if top > 0 else np.zeros_like(values)
    if signed:
        first, second = (np.array(to_rgb(color)) for color in (FOR, AGAINST))
        rgb = np.where(values[..., None] > 0, first, second)
        alpha = 0.9 * part
    else:
        rgb = colormaps["inferno"](part)[..., :3]
        alpha = LOW_ALPHA + (HIGH_ALPHA - LOW_ALPHA) * part
    return np.round(255 * np.concatenate([rgb, alpha[..., None]], axis=-1)).astype(np.uint8)


def overlay_uri(values: NDArray[Any], signed: bool) -> str:
    """Return a map as the address of a PNG of one pixel a patch."""
    file = io.BytesIO()
    Image.fromarray(colored(values, signed)).save(file, "PNG", optimize=True)
    return data_uri(file.getvalue(), "image/png")


def _place(values: NDArray[Any], signed: bool) -> str:
    """Say where a map is strongest."""
    at = np.abs(values) if signed else values
    row, column = np.unravel_index(int(at.argmax()), values.shape)
    return f"row {row + 1}, column {column + 1} of {values.shape[0]} × {values.shape[1]}"


def attention_map(title: str, weights: NDArray[Any], explanation: Explanation) -> Map:
    """Return the map of attention weights of one query or a mean: float of shape (tokens,)."""
    patches = explanation.patches
    values = patches.grid(weights[patches.leading :])
    leading = float(weights[: patches.leading].sum())
    caption = f"{title}: at most {percent(float(values.max()), 1)} on a patch"
    if patches.leading:
        name = "class token" if patches.leading == 1 else f"{patches.leading} leading tokens"
        caption += f", {percent(leading, 1)} on the {name}"
    return Map(title, values, f"{caption}; strongest at {_place(values, False)}", caption)


def signed(value: float, form: str = ".2g") -> str:
    """Return a number with its sign, as people write it."""
    text = f"{value:+{form}}".replace("-", "−")
    return text if float(text.replace("−", "-")) else text[1:]


def signed_map(title: str, values: NDArray[Any], what: str = "") -> Map:
    """Return a map of log odds."""
    low, high = float(values.min()), float(values.max())
    caption = f"{title}: {signed(low)} to {signed(high)}{what}"
    return Map(title, values, f"{caption}; strongest at {_place(values, True)}", caption, True)


def maps_of(row: Explained, explanation: Explanation) -> list[Map]:
    """Return the maps that are shown of each row at once."""
    patches, maps = explanation.patches, row.maps
    last = explanation.layers
    title = "Attention, mean of heads" + (f", layer {last} of {last}" if last > 1 else "")
    found = [
        attention_map(title, maps.mean_attention[-1], explanation),
        signed_map("Gradient × input", patches.grid(maps.token_parts[patches.leading :])),
    ]
    for side, values in zip(WINDOWS, maps.occlusion, strict=True):
        size = side * patches.cell
        # As the log odds, so the probability: of entailment, or of what the row is called.
        moved = sigmoid(maps.log_odds - values.astype(np.float64))
        before = float(sigmoid(np.array(maps.log_odds)))
        most = float(moved[np.abs(values).argmax()])
        what = f"; without the strongest the probability goes from {percent(before)} to"
        what += f" {percent(most)}"
        name = "Occlusion" if size == 1 else f"Occlusion of {size} × {size}"
        found.append(signed_map(name, patches.grid(values), what))
    return found


def more_maps(row: Explained, explanation: Explanation) -> list[tuple[str, list[Map]]]:
    """Return further maps by title: of each head, of each layer, of each word that asks."""
    groups = []
    attention = row.maps.attention.mean(axis=2)
    several = explanation.layers > 1
    for layer, heads in enumerate(attention, start=1):
        where = f" of layer {layer}" if several else ""
        maps = [
            attention_map(f"Head {head}", weights, explanation)
            for head, weights in enumerate(heads, start=1)
        ]
        if several:
            mean = attention_map("Mean of heads", heads.mean(axis=0), explanation)
            maps = [mean, *maps]
        groups.append((f"Attention of the {counted(len(heads), 'head')}{where}", maps))
    if explanation.queries == "all":
        for layer, words in enumerate(row.word_attention, start=1):
            where = f", layer {layer}" if several else ""
            pairs = zip(row.words, words, strict=True)
            maps = [attention_map(f"“{word.text}”", own, explanation) for word, own in pairs]
            groups.append((f"Attention of each word, mean of heads{where}", maps))
    return groups


def _said(row: Explained, explanation: Explanation) -> str:
    chances = ", ".join(
        f"{name.removeprefix('probability_')} {percent(value, 1)}"
        for name, value in row.probabilities.items()
    )
    tau = explanation.threshold
    at = "" if tau is None else f" (called so from {percent(tau)})"
    truth = "" if row.label == UNLABELLED else f"; it is {LABEL_NAMES[row.label]}"
    return f"called {LABEL_NAMES[row.called]}{truth}. Probability: {chances}{at}."


def _shown_map(found: Map) -> dict[str, str]:
    return {
        "overlay": overlay_uri(found.values, found.signed),
        "alt": found.alt,
        "caption": found.caption,
    }


def row_content(row: Explained, explanation: Explanation) -> dict[str, Any]:
    """Return what the page shows of a row."""
    style, photo, note, box = "", None, "", "inset: 0; width: 100%; height: 100%"
    geometry = ""
    if isinstance(row.photo, ShownPhoto):
        photo = photo_uri(row.photo.image)
        image = row.photo.image
        style = f"--photo: url({photo}); --shape: {image.width} / {image.height}"
        top, left, high, wide = (round(100 * part, 3) for part in row.photo.box)
        box = f"top: {top}%; left: {left}%; height: {high}%; width: {wide}%"
        if high < 99.5 or wide < 99.5:
            box += "; outline: 1px dashed #fff"
            geometry = "; the encoder sees the part that the maps cover"
    else:
        patches = explanation.patches
        style = f"--shape: {patches.columns} / {patches.rows}"
        note = f"Without its photo, which cannot be read now: {row.photo}."
    parts = row.word_parts
    top_part = float(np.abs(parts).max(initial=0)) or 1.0
    whole = len(row.maps.text_parts) == 1
    return {
        "hypothesis": row.hypothesis,
        "image_id": row.image_id,
        "right": None if row.label == UNLABELLED else row.label == row.called,
        "said": _said(row, explanation),
        "style": style,
        "photo": photo,
        "note": note,
        "box": box,
        "geometry": geometry,
        "maps": [_shown_map(found) for found in maps_of(row, explanation)],
        "words_title": f"Gradient × input of {'the sentence' if whole else 'each word'}",
        "words": [
            {
                "text": word.text,
                "value": signed(float(part), ".2f"),
                "color": FOR if part > 0 else AGAINST,
                "width": round(0.05 + 0.45 * abs(float(part)) / top_part, 2),
            }
            for word, part in zip(row.words, parts, strict=True)
        ],
        "more": [
            {"title": title, "maps": [_shown_map(found) for found in group]}
            for title, group in more_maps(row, explanation)
        ],
    }


def _meaning(explanation: Explanation) -> list[str]:
    """Say what attention is here, and what it is not."""
    patches = explanation.patches
    asks = (
        "each token of the sentence asks, and what they find is averaged"
        if explanation.queries == "all"
        else "one token of the sentence asks"
    )
    layers = (
        ""
        if explanation.layers == 1
        else f" There are {explanation.layers} such layers, each asking with what the one before"
        " found; where nothing else is said, the last is shown."
    )
    tokens = f"{patches.rows} × {patches.columns} patches"
    if patches.leading:
        tokens += f" and {counted(patches.leading, 'leading token')}"
    blocks = (
        f" The tokens are those that leave the {counted(explanation.k_vit, 'vision block')} that"
        " the run has trained."
        if explanation.k_vit
        else ""
    )
    found = [
        f"The run reads an image as {tokens}. In its cross-attention {asks}: each head weighs the"
        " tokens, and the weights sum to 1. They are shown as the model computes them, from the"
        f" stored features and the run's weights: the brighter, the larger.{layers}{blocks} Every"
        " map has its own scale; the largest number stands below it.",
        "A weight says from where a head reads, not what it reads nor what that does to the answer:"
        " a patch with a large weight may change nothing. And a token is not only its patch: the"
        " encoder has mixed into each what it saw elsewhere. So two other maps stand beside it, and"
        " a check below.",
    ]
    if explanation.control != "none":
        found.append(
            f"This run was trained with {explanation.control}. Here each row has its own photo."
        )
    return found


def _methods(explanation: Explanation) -> list[tuple[str, str]]:
    of = "entailment" if explanation.threshold is not None else "what the row is called"
    text = (
        "Of words: the state that enters the text layers that train, the frozen layers below having"
        " mixed the words before."
        if len(explanation.rows[0].maps.text_parts) > 1
        else "Of the sentence, the one state that is read: without text layers that train no word"
        " can be told from another."
    )
    return [
        (
            "Gradient × input",
            f"The product of each token with the gradient of the log odds of {of}, summed over its"
            f" width: blue speaks for {of}, orange against it (Shrikumar et al. 2016; gradients:"
            f" Simonyan et al. 2013). {text}",
        ),
        (
            "Occlusion",
            f"How far the log odds of {of} fall when the tokens of a window of patches are set to"
            " zero, each window in turn (Zeiler and Fergus 2014, who grey the pixels). Blue: the"
            f" patches spoke for {of}.",
        ),
    ]


def minus(text: str) -> str:
    return text.replace("-", "−")


def _with_interval(found: dict[str, Any]) -> str:
    if found["mean"] is None:
        return MISSING
    interval = found["interval"]
    between = ""
    if interval is not None:
        low, high = (minus(f"{interval[end]:.2f}") for end in ("low", "high"))
        between = f" ({low} to {high})"
    return minus(f"{found['mean']:.2f}") + between


def lead(explanation: Explanation) -> str:
    """Say in a sentence how well attention predicts occlusion."""
    found = explanation.agreement
    maps = found["windows"][0]["maps"]
    attention = list(maps)[explanation.layers - 1]
    rows = counted(found["rows"], "row")
    mean, other = maps[attention]["mean"], maps["gradient × input"]["mean"]
    if mean is None or other is None:
        return f"Over {rows} hiding patches, or a map, does not tell one patch from another."
    return (
        f"Attention ranks patches as hiding them does with a correlation of"
        f" {_with_interval(maps[attention])}, gradient × input with"
        f" {_with_interval(maps['gradient × input'])}, over {rows}; 1 is the same"
        " order, 0 is chance."
    )


def _agreement_lines(explanation: Explanation) -> list[str]:
    found, best = explanation.agreement, explanation.agreement["best_head"]
    layer = f" of layer {best['layer']}" if explanation.layers > 1 else ""
    return [
        f"Measured over {counted(found['rows'], 'row')} of {counted(found['images'], 'photo')}"
        f" (a sample, seed {found['seed']}): each row's windows are ranked by a map and by how far"
        " the log odds move without them, up or down. “Signed” compares gradient × input and the"
        " change with their signs.",
        f"The best head (over all rows head {best['head']}{layer}) is measured on photos that did"
        " not choose it. “Attention of another row” ranks a row's patches by the map of another"
        " photo: what is left there is agreement that any photo gives, such as a liking for the"
        " middle.",
    ]


def _deletion_figure(explanation: Explanation) -> tuple[str, str]:
    names = {
        "occlusion": "occlusion",
        "attention": "attention",
        "gradient": "gradient × input",
        "random": "at random",
    }
    figure = new_figure(5.0, 3.2)
    axes = figure.subplots()
    shares = [100 * found["share"] for found in explanation.deletion]
    markers = "osD^"
    for i, (key, name) in enumerate(names.items()):
        means = [found[key]["mean"] for found in explanation.deletion]
        axes.plot(shares, means, label=name, color=COLORS[i], marker=markers[i], markersize=4)
    axes.set_xlabel("patches set to zero (%), those first that are strongest by")
    axes.set_ylabel("mean change of the log odds")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    legend_below(axes, 2)
    at = explanation.deletion[min(2, len(explanation.deletion) - 1)]
    said = ", ".join(f"{names[key]} {number(at[key]['mean'], 2)}" for key in names)
    line = f"Without {percent(at['share'])} of the patches the log odds move by: {said}."
    return svg(figure, line), line


def write_explanation(explanation: Explanation, path: str | os.PathLike[str]) -> int:
    """Write the page of an explanation; return its bytes.

    Raises:
        FeatstoreError: It cannot be written.
    """
    windows = explanation.agreement["windows"]
    sizes = [f"{w['patches']} × {w['patches']} patches" for w in windows]
    sizes = [size.replace("1 × 1 patches", "single patches") for size in sizes]
    deletion, caption = _deletion_figure(explanation)
    return write_page(
        path,
        "explain.html",
        f"What {explanation.run} looks at",
        lead=lead(explanation),
        rows_line=f"{counted(len(explanation.rows), 'row')} of {explanation.source}:"
        f" {explanation.choice}.",
        meaning=_meaning(explanation),
        methods=_methods(explanation),
        agreement_lines=_agreement_lines(explanation),
        agreement_columns=[("map", ""), *((size, "number") for size in sizes)],
        agreement_rows=[
            [name, *(_with_interval(window["maps"][name]) for window in windows)]
            for name in windows[0]["maps"]
        ],
        deletion=deletion,
        deletion_caption=caption,
        rows=[row_content(row, explanation) for row in explanation.rows],
    )


def write_pngs(explanation: Explanation, folder: Path) -> list[Path]:
    """Write one PNG for each row: the photo, and the maps of `maps_of` over it."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for i, row in enumerate(explanation.rows, start=1):
        maps = maps_of(row, explanation)
        figure = new_figure(3 * (len(maps) + 1), 3.6)
        axes: Sequence[Any] = figure.subplots(1, len(maps) + 1)
        figure.suptitle(
            f"{row.hypothesis}\n{_said(row, explanation)}", fontsize="medium", wrap=True
        )
        for axis, title in zip(axes, ["Photo", *(own.caption for own in maps)], strict=True):
            axis.set_axis_off()
            lines = title.replace(": ", ":\n", 1).replace("; ", ";\n").split("\n")
            # As wide as the photo: the next title stands beside it.
            wrapped = "\n".join(textwrap.fill(line, TITLE_LETTERS) for line in lines)
            axis.set_title(wrapped, fontsize=8)
        if isinstance(row.photo, ShownPhoto):
            axes[0].imshow(row.photo.image)
        for axis, own in zip(axes[1:], maps, strict=True):
            width, height = own.values.shape[::-1]
            top, left, high, wide = 0.0, 0.0, 1.0, 1.0
            if isinstance(row.photo, ShownPhoto):
                width, height = row.photo.image.size
                top, left, high, wide = row.photo.box
                axis.imshow(row.photo.image.convert("L"), cmap="gray", vmin=0, vmax=320)
            # left, right, bottom, top
            extent = (
                left * width - 0.5,
                (left + wide) * width - 0.5,
                (top + high) * height - 0.5,
                top * height - 0.5,
            )
            axis.imshow(colored(own.values, own.signed), extent=extent, interpolation="nearest")
            axis.set_xlim(-0.5, width - 0.5)
            axis.set_ylim(height - 0.5, -0.5)
        path = folder / f"row-{i:03d}.png"
        write_png(figure, path)
        found.append(path)
    return found
