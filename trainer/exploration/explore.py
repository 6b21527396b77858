"""The whole of it: collect what a project's rows and photos show, and write it down."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from featstore.config import SPLITS, runs_folder
from featstore.encoders.presets import resolve_preset
from featstore.errors import FeatstoreError, UsageError, WriteError, counted
from featstore.extract.lengths import WARNING_SHARE
from featstore.progress import SHOWN, Show, says, shows_work, working
from featstore.project import Project
from featstore.publish import command_line, may_write, package_versions
from featstore.quantities import share
from trainer.buckets import SHIPPED, load_buckets
from trainer.exploration import baseline
from trainer.exploration.duplicates import DISTANCE, has_features, near_duplicates
from trainer.exploration.kinds import SPATIAL, kinds, source_of
from trainer.exploration.photos import HASH_BITS, Looks, look_at
from trainer.exploration.sentences import (
    labels_by_split,
    lengths,
    repeats,
    rows_an_image,
    words_of,
)
from trainer.exploration.words import log_odds

FORMAT = 1
FOLDER = "eda"
SAMPLES = 8
NAMED_UNREADABLE = 100


@shows_work
@says("looking at the rows")
def eda(
    project: Project,
    out: str | os.PathLike[str] | None = None,
    *,
    buckets: str | os.PathLike[str] | None = None,
    spatial: str | os.PathLike[str] | None = None,
    distance: int = DISTANCE,
    samples: int = SAMPLES,
    draws: int = 2000,
    seed: int = 0,
    show: Show = SHOWN,
) -> dict[str, Any]:
    """Show what the rows and photos of a project are like, before anything is trained.

    No encoder is loaded. Stored features confirm near-duplicate photos where there are some;
    tokens are those of the stored sentences, or else are counted by the text encoder's
    tokenizer.

    Args:
        project: The rows and photos.
        out: Folder for `eda.html`, `eda.json` and the figures; None: `eda` in the folder of
            the runs.
        buckets: Bucket file; None: the study's ten.
        spatial: File of spatial keywords; None: the study's eleven.
        distance: Most bits of 64 in which the hashes of near-duplicate photos differ.
        samples: Photos shown of each label.
        draws: Draws of the bootstrap over images.
        seed: Of the draws, and of the photos shown.
        show: Shows the work.

    Returns:
        What `eda.json` has, described in docs/EDA.md, and `folder` and `files`.

    Raises:
        ConfigError, RowError, DataError, SplitError: The rows cannot be read.
        UsageError: The folder is a run's, or an option is out of bounds.
        WriteError: A file cannot be written.
    """
    folder = _folder(project, out)
    if not 0 <= distance < HASH_BITS // 2:
        raise UsageError(
            f"distance: expected 0 to {HASH_BITS // 2 - 1} bits, found {distance}; unrelated"
            f" photos differ in about {HASH_BITS // 2}"
        )
    patterns = {"buckets": load_buckets(buckets), "spatial": load_buckets(spatial or SPATIAL)}
    named = {"buckets": source_of(buckets, SHIPPED), "spatial": source_of(spatial, SPATIAL)}
    dataset, classes = project.dataset, project.config.data.classes
    examples = dataset.examples
    train = examples.select(dataset.rows("train"))
    train = train if len(train) else examples
    words = [len(words_of(sentence)) for sentence in examples.hypotheses]
    looks = _looks(project, show)
    found: dict[str, Any] = {
        "format": FORMAT,
        "command": command_line(),
        "versions": package_versions(),
        "rows": project.config.data.rows or "built-in demo",
        "rows_digest": examples.digest(),
        "split_digest": dataset.splits.digest(),
        "classes": classes,
        "settings": {"distance": distance, "samples": samples, "draws": draws, "seed": seed},
        "labels": labels_by_split(dataset, classes),
        "left_out": dataset.counts()["dropped"],
        "words": lengths(words, examples.labels, classes),
        "tokens": _tokens(project, classes, show),
        "rows_a_photo": rows_an_image(examples),
        "repeats": repeats(dataset),
    }
    with working("counting kinds of sentences"):
        for name, part in (("spatial", examples), ("buckets", train)):
            of_kind = kinds(patterns[name], part, classes, draws, seed)
            found[name] = {"file": named[name], "rows": len(part), "kinds": of_kind}
    found |= {
        "photos": _photos(looks),
        "duplicates": near_duplicates(project, looks, distance),
        "log_odds": {"rows": len(train), **log_odds(train, classes)},
        "hypothesis_only": baseline.hypothesis_only(dataset, classes, draws, seed),
    }
    found["hypothesis_only"]["meaning"] = baseline.sentence_of(found["hypothesis_only"])
    found["warnings"] = warnings_of(found)
    from trainer.exploration.report import write_report

    with working("drawing the page"):
        files = write_report(folder, project, found, looks.ids, samples, seed)
    return {**found, "folder": str(folder), "files": files}


def _folder(project: Project, out: str | os.PathLike[str] | None) -> Path:
    folder = Path(runs_folder(project.file), FOLDER) if out is None else Path(out)
    if (folder / "manifest.json").exists() or (folder / "search.json").exists():
        raise UsageError(f"{folder}: is a run's or a search's; name another folder with --out")
    # Before minutes of work whose result could not be kept.
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: is a file; name a folder with --out")
    if not may_write(folder):
        raise WriteError(f"{folder}: cannot be written; name another folder with --out")
    return folder


def _looks(project: Project, show: Show) -> Looks:
    images, ids = project.dataset.images, project.keys("vit")
    threads = project.config.store.threads
    paths = [images.lookup(image_id) for image_id in ids]
    return look_at(ids, paths, project.root, images.folder, threads, show)


def _photos(looks: Looks) -> dict[str, Any]:
    """Describe sizes and formats of photos, and name those that cannot be read."""
    sizes = Counter(map(tuple, looks.sizes.tolist()))
    sides = {
        name: {
            "least": int(values.min()),
            "median": float(np.median(values)),
            "most": int(values.max()),
        }
        for name, values in (
            ("width", looks.sizes[:, 0]),
            ("height", looks.sizes[:, 1]),
            ("shorter_side", looks.sizes.min(axis=1, initial=1 << 32)),
        )
        if len(values)
    }
    return {
        "readable": len(looks.ids),
        "unreadable": len(looks.unreadable),
        "reasons": dict(list(looks.unreadable.items())[:NAMED_UNREADABLE]),
        "formats": dict(Counter(looks.formats).most_common()),
        "pixels": sides,
        "sizes": [
            {"width": width, "height": height, "photos": photos}
            for (width, height), photos in sizes.most_common()
        ],
    }


def _tokens(project: Project, classes: int, show: Show) -> dict[str, Any]:
    """Describe the tokens of sentences, from the store or by the tokenizer.

    Returns:
        As `lengths`, with `sequence_length`, the rows that are `cut` there, their `share`, and
        the `source`; or `reason`, where the tokenizer cannot be had.
    """
    limit, sentences = project.config.encoders.sequence_length, project.keys("text")
    source = "stored features"
    counts = _stored_tokens(project, sentences)
    if counts is None:
        source = "tokenizer"
        try:
            show.loading()
            from featstore.encoders.tokens import token_counts

            preset = resolve_preset(project.config.encoders.text)
            counts = dict(zip(sentences, token_counts(preset, sentences), strict=True))
        except FeatstoreError as error:
            return {"sequence_length": limit, "source": None, "reason": error.message}
    examples = project.dataset.examples
    of_row = np.array([counts[sentence] for sentence in examples.hypotheses], np.int64)
    cut = int((of_row > limit).sum())
    return {
        "sequence_length": limit,
        "source": source,
        "reason": None,
        "cut": cut,
        "share": cut / len(of_row),
        **lengths(of_row, examples.labels, classes),
    }


def _stored_tokens(project: Project, sentences: list[str]) -> dict[str, int] | None:
    """Return the tokens of sentences that all have features, None where one has none."""
    if not has_features(project.root, "text"):
        return None
    try:
        store = project.sentences()
        positions = store.lookup(np.array(sentences, dtype=object))
        if (positions < 0).any():
            return None
        cut = project.cut_sentences()
    except FeatstoreError:
        return None
    if cut.uncounted:
        return None
    counts = dict(zip(sentences, store.lengths(positions).tolist(), strict=True))
    return counts | cut.tokens


def warnings_of(found: dict[str, Any]) -> list[str]:
    """Return what someone should know before training on these rows, the worst first."""
    lines = []
    duplicates, photos = found["duplicates"], found["photos"]
    if pairs := duplicates["across_splits"]:
        between = ", ".join(f"{count} {name}" for name, count in duplicates["by_splits"].items())
        sure = duplicates["across_confirmed"]
        known = "none" if not sure else "all" if sure == pairs else str(sure)
        lines.append(
            f"{'leak' if sure else 'possible leak'}: {counted(pairs, 'pair')} of near-duplicate"
            f" photos across splits ({between}; {known} confirmed); keep such photos in one split"
            " with a split_file"
        )
    blind = found["hypothesis_only"]
    gaps = [at["above_majority"]["low"] for at in blind["splits"].values()]
    if any(low > 0 for low in gaps):
        lines.append(blind["meaning"])
    for split, seen in found["repeats"]["seen"].items():
        if seen["share"] > WARNING_SHARE and seen["learnable"]:
            lines.append(
                f"{share(seen['share'])} of {split} rows have a sentence that train has too;"
                f" {seen['agreeing']} of these {seen['rows']} have the label it mostly has there,"
                " which can be learnt by heart"
            )
    if conflicts := found["repeats"]["conflicts"]:
        lines.append(
            f"{counted(conflicts, 'pair')} of photo and sentence with rows of different labels"
        )
    if unreadable := photos["unreadable"]:
        first, reason = next(iter(photos["reasons"].items()))
        lines.append(f"{counted(unreadable, 'photo')} cannot be read (first {first}: {reason})")
    tokens = found["tokens"]
    if tokens["reason"]:
        lines.append(f"tokens are not counted: {tokens['reason']}")
    elif tokens["share"] > WARNING_SHARE:
        lines.append(
            f"{share(tokens['share'])} of the sentences are longer than sequence_length"
            f" {tokens['sequence_length']} and are cut; a larger one keeps more"
        )
    for split in SPLITS:
        at = found["labels"][split]
        if at["rows"] and not all(at[name] for name in list(at)[2:]):
            lines.append(f"{split} lacks rows of a class")
    return lines
