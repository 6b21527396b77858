"""The features that a run reads: a project's rows, each with its place in both stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xxhash

from featstore.config import SPLITS
from featstore.data.examples import Examples, class_counts, require_every_class
from featstore.data.labels import labels_of
from featstore.encoders.spec import blocks_left, view_of
from featstore.errors import Command, ConfigError, MissingFeaturesError, counted
from featstore.extract.extract import estimate
from featstore.extract.plan import Job, Plan
from featstore.progress import SILENT, Show, says
from featstore.project import Project, Split
from featstore.quantities import duration, size
from featstore.settings import suggest
from featstore.store.store import VisionStore
from featstore.store.views import ViewedImages
from trainer.batches import CachedRows, Emphasis
from trainer.buckets import bucket_rows, load_buckets
from trainer.config import TrainConfig

QUARANTINED = "photo in quarantine"


@says("looking at the stored features")
def prepare(
    project: Project, k_txt: int, show: Show = SILENT, compare: bool = True, views: int = 1
) -> None:
    """See that a run on a project can start; encode sentences that are missing.

    Photos are left to `extract-vit`: they take long, and are asked for by name.

    Args:
        project: Its rows and stores.
        k_txt: Last text layers that train.
        show: Shows the encoding of sentences.
        compare: Compare the photos with what was extracted; not for what does so row by row.
        views: Photometric views that training rows are drawn from.

    Raises:
        MissingFeaturesError: A photo of the train or val split was not extracted.
        StaleFeaturesError: One was replaced since; see `Project.compare_photos`.
        StaleFeaturesError: What was extracted is of other specs.
        DataError: The train or val split lacks rows of a class.
    """
    fingerprint = project.text_spec(k_txt).fingerprint
    vision = [project.view_spec(view).fingerprint for view in range(views)]
    key = f"prepared {project.root} {fingerprint} {vision} {project.config.data!r}"
    project.once(key, lambda: _prepare(project, k_txt, show, compare, views))
    if compare:
        # Where the project was prepared long ago, and its photos were forgotten since.
        _compare(project, show, views)


def read_by_training(views: int) -> list[tuple[str, Split, int]]:
    """Return what features a training reads: of each their kind, split and photometric view.

    The test split is no training's business, and of val it reads the plain photos alone.

    Args:
        views: Photometric views that training rows are drawn from.
    """
    plain: list[tuple[str, Split, int]] = [("vit", ("train", "val"), 0)]
    return [*plain, *(("vit", "train", view) for view in range(1, views)), ("text", "all", 0)]


def extract_missing(project: Project, k_txt: int, show: Show = SILENT, views: int = 1) -> None:
    """Extract what a run on a project reads and the store lacks, after saying what it takes.

    Args:
        project: Its rows and stores.
        k_txt: Last text layers that train.
        views: Photometric views that training rows are drawn from.
        show: Its notes have sizes and times; its bars show the work.

    Raises:
        StoreError: The store cannot be written or read, or the disk is too small.
        PresetError: An encoder cannot be loaded.
    """
    wanted = [
        project.job(kind, split, k_txt, view=view) for kind, split, view in read_by_training(views)
    ]
    for plan in plan_jobs(wanted, show):
        project.extract_planned(plan, show)


def plan_jobs(jobs: Sequence[Job], show: Show = SILENT) -> list[Plan]:
    """Say what of some jobs has to be extracted, and what it takes; change nothing.

    Args:
        jobs: Each is looked for once.
        show: Its notes have sizes and times, by the real encoders on this machine.

    Returns:
        What is missing, of each job that is not done.
    """
    found: list[Plan] = []
    total = 0.0
    # All views of the photos take as long.
    rates: dict[str, float] = {}
    for job in jobs:
        encoder = job.spec.plain.fingerprint
        plan, rate = estimate(job, rates.get(encoder))
        if not plan.keys:
            continue
        rates[encoder] = rate
        seconds = len(plan.keys) / rate
        total += seconds
        k, boundary = blocks_left(job.spec.to_dict()), ""
        if k or job.spec.kind == "text":
            boundary = f" at {'k_txt' if job.spec.kind == 'text' else 'k_vit'} {k}"
        if view := view_of(job.spec.to_dict()):
            boundary += f" under view {view}"
        show.note(
            f"to extract: {counted(len(plan.keys), job.unit.removesuffix('s'))}{boundary},"
            f" about {duration(seconds)},"
            f" {size(plan.todo_bytes)} in {plan.folder}"
        )
        found.append(plan)
    if len(found) > 1:
        show.note(f"to extract in all: about {duration(total)}")
    return found


def _compare(project: Project, show: Show, views: int) -> None:
    for split in ("train", "val"):
        project.compare_photos(split, show, views_of(split, views))


def views_of(split: str, views: int) -> int:
    """Return how many of the photometric views of a run are read of a split."""
    return views if split == "train" else 1


def _prepare(project: Project, k_txt: int, show: Show, compare: bool, views: int) -> None:
    for split in ("train", "val"):
        rows = project.dataset.rows(split)
        examples = project.dataset.examples.select(rows)
        require_every_class(examples, f"split {split!r}", project.config.data.classes)
    for split in ("train", "val"):
        # Before the sentences are encoded, which would be for nothing.
        project.usable(split, views_of(split, views))
    if compare:
        _compare(project, show, views)
    project.extract("text", k_txt=k_txt, show=show)
    project.forget_encoders()


def cached_rows(
    project: Project,
    train: TrainConfig,
    split: str,
    control: str = "none",
    trained_on: bool = False,
) -> CachedRows:
    """Return the rows of a split that have features, ready to be read in batches.

    Args:
        project: Its rows and stores.
        train: `k_txt`, `queries`, `seed` and, of rows that are trained on, `views` are used.
        split: "train", "val" or "test".
        control: See `CachedRows`.
        trained_on: Draw, weigh and view the rows as `train` says; see `emphasis`. All other
            reading is of view 0.

    Raises:
        MissingFeaturesError: A photo or a sentence was never extracted.
        DataError: No row is left.
    """
    views = train.views if trained_on else 1
    rows, _ = project.usable(split, views)
    classes = project.config.data.classes
    examples = project.dataset.examples.select(rows)
    text = project.sentences(train.k_txt)
    vision: VisionStore | ViewedImages = project.images()
    if views > 1:
        vision = ViewedImages([project.images(view) for view in range(views)])
    sentences = text.lookup(examples.hypotheses)
    if (sentences < 0).any():
        missing = examples.hypotheses[sentences < 0][0]
        raise MissingFeaturesError(
            f"{text.folder}: no features of {counted(int((sentences < 0).sum()), 'sentence')} of"
            f" split {split!r} (first: {missing!r})",
            Command("extract-text", split=split, k_txt=train.k_txt),
        )
    return CachedRows(
        vision,
        text,
        vision.lookup(examples.image_ids),
        sentences,
        examples.labels,
        whole=train.reads_sentences,
        classes=classes,
        control=control,
        control_seed=train.seed,
        emphasis=emphasis(train, examples, classes) if trained_on else None,
    )


def emphasis(train: TrainConfig, examples: Examples, classes: int = 2) -> Emphasis:
    """Return how often rows are drawn and how much they weigh.

    A row of several buckets gets the surplus of each: 1 + Σ (factor - 1). So gender 1.2 and
    counting 1.3 add 0.2 of the rows of one and 0.3 of the other, as the reference study did.
    Balanced weights are inverse to the draws of each class, times the weights of its rows.

    Args:
        train: `oversample`, `buckets`, `class_weights` and `label_smoothing` are used.
        examples: The rows, with the weights of their files.
        classes: 2 or 3.

    Raises:
        ConfigError: A bucket or a label is unknown, or the bucket file cannot be read.
    """
    draws, weights = None, None
    recorded: dict[str, Any] = {}
    labels, names = np.asarray(examples.labels), labels_of(classes)
    rows_weigh = examples.weights
    is_weighed = bool((rows_weigh != 1).any())
    if isinstance(train.oversample, dict) and train.oversample:
        patterns = load_buckets(train.buckets or None)
        _check_names("oversample", train.oversample, patterns, "bucket")
        chosen = {name: patterns[name] for name in train.oversample}
        members = bucket_rows(chosen, examples.hypotheses)
        draws = np.ones(len(labels))
        for name, factor in sorted(train.oversample.items()):
            draws += members[name] * (factor - 1)
        recorded["oversample"] = {
            "rows_of_bucket": {name: int(rows.sum()) for name, rows in members.items()},
            "rows": len(labels),
            "draws_an_epoch": round(float(draws.sum()), 3),
            "digest": xxhash.xxh3_128_hexdigest(draws.tobytes()),
        }
    if train.class_weights:
        if isinstance(train.class_weights, dict):
            _check_names("class_weights", train.class_weights, names, "label")
            given = [train.class_weights.get(name, 1.0) for name in names]
        else:
            said = rows_weigh if draws is None else draws * rows_weigh
            of_class = np.bincount(labels, weights=said, minlength=len(names))
            given = list(of_class.sum() / (len(names) * of_class))
        weights = np.array(given, np.float32)
        recorded["class_weights"] = dict(zip(names, map(float, given), strict=True))
    if not is_weighed:
        return Emphasis(draws, weights, train.label_smoothing, recorded)
    values, counts = np.unique(rows_weigh, return_counts=True)
    recorded["rows_of_weight"] = {f"{v:g}": int(n) for v, n in zip(values, counts, strict=True)}
    return Emphasis(draws, weights, train.label_smoothing, recorded, rows_weigh)


def _check_names(
    setting: str, given: Mapping[str, float], known: Mapping[str, Any], what: str
) -> None:
    for name in given:
        if name not in known:
            raise ConfigError(
                f"[train] {setting}: unknown {what} {name!r}{suggest(name, known)};"
                f" known: {', '.join(known)}"
            )


def row_counts(
    project: Project, k_txt: int, read: Sequence[str] = (), views: int = 1
) -> dict[str, dict[str, Any]]:
    """Return rows, images and class counts of each split that has rows.

    Args:
        project: Its rows and stores.
        k_txt: Last text layers that train.
        read: Splits that are read: of these, `rows`, `images` and the classes are what is
            read, `rows_of_split` all of the split's rows, `rows_left_out` reason to rows of
            the others, and `rows_cut` the rows read whose sentence is longer than
            `sequence_length`. The photos of other splits need not be there.
        views: Photometric views that training rows are drawn from.

    Raises:
        MissingFeaturesError: A photo of a split that is read was not extracted.
    """
    counts: dict[str, dict[str, Any]] = {}
    for split in SPLITS:
        rows = of_split = project.dataset.rows(split)
        if not len(rows):
            continue
        if split in read:
            rows, _ = project.usable(split, views_of(split, views))
        examples = project.dataset.examples.select(rows)
        counts[split] = {
            "rows": len(rows),
            "images": len(set(examples.image_ids)),
            **class_counts(examples.labels, project.config.data.classes),
        }
        if split in read:
            left_out = len(of_split) - len(rows)
            cut = project.cut_sentences(split, k_txt).tokens
            counts[split] |= {
                "rows_of_split": len(of_split),
                "rows_left_out": {QUARANTINED: left_out} if left_out else {},
                "rows_cut": sum(text in cut for text in examples.hypotheses),
            }
    return counts


def oversample_line(recorded: Mapping[str, Any]) -> str:
    """Say how often rows are drawn, in one line.

    Args:
        recorded: `oversample` of a run's manifest.
    """
    found = ", ".join(f"{name} {count}" for name, count in recorded["rows_of_bucket"].items())
    return (
        f"oversampling: {recorded['draws_an_epoch']:.0f} draws an epoch of"
        f" {counted(recorded['rows'], 'row')}; of buckets {found}"
    )


def rows_line(data: Mapping[str, Any]) -> str:
    """Say which rows a run reads and which not, in one line.

    Args:
        data: `data` of its manifest.
    """
    parts = []
    for split, counts in data["counts"].items():
        if "rows_of_split" not in counts:
            continue
        part = f"{split} {counts['rows']}"
        if left_out := counts["rows_left_out"]:
            reasons = ", ".join(f"{count} left out: {why}" for why, count in left_out.items())
            part += f" of {counts['rows_of_split']} ({reasons})"
        parts.append(part)
    line = f"rows: {', '.join(parts)}"
    if dropped := data["rows_left_out"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        line += f"; left out of the row file: {reasons}"
    return line
