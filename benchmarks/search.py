"""A whole search, extraction included: cached against end to end, and when caching wins.

Everything is measured on a sample in one process and scaled to the study's
data set. What is left out is end to end's: it would also decode its photos in
every epoch, and read its rows.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import extraction
from benchmarks.loop import new_training, patient
from benchmarks.measuring import seconds_of
from benchmarks.sizes import STUDY, Size
from benchmarks.steps import end_to_end, release
from benchmarks.synthetic import SyntheticProject, encoders_of, random_sentences
from benchmarks.tables import table
from featstore.config import StoreConfig
from featstore.encoders.spec import text_spec
from featstore.encoders.tower import TextEncoder
from featstore.extract.claims import writing
from featstore.extract.extract import extract_alone
from featstore.extract.plan import Job, make_plan
from featstore.project import Project
from trainer.config import TrainConfig
from trainer.features import prepare
from trainer.run.fit import fit

WAYS = {"end_to_end": "end to end", "end_to_end_xla": "end to end, XLA"}


@dataclass(frozen=True)
class Study:
    """The search that is scaled to.

    Attributes:
        images: Photos of both splits, all extracted.
        train_rows, val_rows: Rows on them; as many distinct sentences at most.
        trials: Trials of each k_txt.
        epochs: Epochs of a trial.
    """

    images: int = 15_658 + 1_957
    train_rows: int = 31_340
    val_rows: int = 3_922
    trials: tuple[tuple[int, int], ...] = ((2, 3), (3, 3))
    epochs: int = 2

    def steps(self, batch_size: int) -> tuple[int, int]:
        """Return training steps and validation batches of an epoch."""
        return math.ceil(self.train_rows / batch_size), math.ceil(self.val_rows / batch_size)

    @property
    def rows(self) -> int:
        """Rows of both splits."""
        return self.train_rows + self.val_rows


A2 = Study()


def _text(root: Path, size: Size, k_txt: int, sentences: Sequence[str]) -> dict[str, float]:
    """Extract sentences; return how fast, and the seconds of loading and compiling before."""
    encoders = encoders_of(root, size)
    store = StoreConfig(root=str(root / f"text-{k_txt}"))
    spec = text_spec(encoders, store, k_txt)
    started = time.perf_counter()
    encoder = TextEncoder(encoders.text, encoders.sequence_length)
    token_ids, mask = encoder.tokenize(sentences[: store.encode_batch_size])
    encoder.encode(token_ids, mask, k_txt)
    loaded = time.perf_counter() - started
    plan = make_plan(Job(spec, encoders.text, store, sentences, load=lambda: encoder))
    with writing(plan.folder):
        summary = extract_alone(plan)
    return {"load_seconds": loaded, "sentences_per_second": summary.rows_per_second}


def _cached(project: Project, train: TrainConfig, root: Path, name: str) -> dict[str, float]:
    """Train over the sample; return the seconds of its parts.

    Returns:
        `step` and `val_step` of the last epoch, loop included; `setup`:
        building, and what the first epoch took longer, which is tracing;
        `rest`: saving and reports, of two epochs.
    """
    started = time.perf_counter()
    training = new_training(root, name, project, train)
    built = time.perf_counter() - started
    fit(training)
    whole = time.perf_counter() - started
    first, last = training.progress.history
    extra = sum(max(0.0, first[key] - last[key]) for key in ("seconds", "val_seconds"))
    inside = sum(record["seconds"] + record["val_seconds"] for record in (first, last))
    val_batches = len(training.val_rows.in_order(train.batch_size))
    return {
        "step": last["seconds"] / last["steps"],
        "val_step": last["val_seconds"] / val_batches,
        "setup": built + extra,
        "rest": max(0.0, whole - built - inside),
    }


def _end_to_end(
    k_txt: int, compiled: bool, size: Size, steps: int, predicts: bool
) -> dict[str, float]:
    """Return the seconds of a step, of building and compiling it, and of a forward step."""
    started = time.perf_counter()
    model = end_to_end(k_txt, size.rows, compiled, size)
    model.train()
    first = time.perf_counter() - started
    step = statistics.median(seconds_of(model.train) for _ in range(steps))
    found = {"step": step, "setup": max(0.0, first - step)}
    if predicts:
        first = seconds_of(model.predict)
        found["val_step"] = statistics.median(seconds_of(model.predict) for _ in range(steps))
        found["val_setup"] = max(0.0, first - found["val_step"])
    del model
    release()
    return found


def measure(
    rows: int = 640,
    images: int = 320,
    photos: int = 64,
    sentences: int = 256,
    steps: int = 1,
    layers: Sequence[int] = (0, 2, 3),
    size: Size = STUDY,
    study: Study = A2,
    scratch: str | None = None,
) -> dict[str, Any]:
    """Measure every part of a search on a sample.

    Args:
        rows, images: Of the synthetic store that the cached runs train over.
        photos: Photos to extract.
        sentences: Sentences to extract for each k_txt.
        steps: End-to-end steps timed after the first.
        layers: Values of k_txt; those of the study's trials and others to
            find the break-even of.
        size: Of the encoders.
        study: The search to scale to.
        scratch: Folder for the stores; None takes the system's temporary one.

    Returns:
        Seconds of every part by k_txt and way. End to end without XLA is
        measured for the k_txt of the study's trials, and its forward step
        once, as it is the same for all.
    """
    trials = dict(study.trials)
    extracted = extraction.measure(None, None, photos, size.rows, passes=1, size=size)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        root = Path(folder)
        project = SyntheticProject(root, size, rows, images)
        texts = random_sentences(size, sentences)
        forward: dict[str, Any] = {}
        for k_txt in layers:
            prepare(project, k_txt)
            sides: dict[str, Any] = {
                **_text(root, size, k_txt, texts),
                "cached": _cached(project, patient(size, k_txt, 2), root, f"k{k_txt}"),
            }
            release()
            for way in WAYS:
                compiled = way == "end_to_end_xla"
                if not compiled and k_txt not in trials:
                    continue
                sides[way] = _end_to_end(k_txt, compiled, size, steps, way not in forward)
                forward.setdefault(way, sides[way])
                for part in ("val_step", "val_setup"):
                    sides[way][part] = forward[way][part]
            found[str(k_txt)] = sides
    return {
        "size": size.name,
        "sample": {"rows": rows, "images": images, "photos": photos, "sentences": sentences},
        "batch_size": size.rows,
        "study": vars(study) | {"trials": [list(pair) for pair in study.trials]},
        "images_per_second": extracted["extraction_images_per_second"],
        "k_txt": found,
    }


def parts(figures: dict[str, Any]) -> dict[str, list[tuple[str, float, float]]]:
    """Return what each way of searching is made of.

    Args:
        figures: From `measure`.

    Returns:
        Way to (what, seconds of one, how many).
    """
    study = figures["study"]
    train, val = _study(study).steps(figures["batch_size"])
    epochs = study["epochs"]
    cached = [("extract a photo", 1 / figures["images_per_second"], float(study["images"]))]
    ways: dict[str, list[tuple[str, float, float]]] = {way: [] for way in WAYS}
    for k_txt, trials in study["trials"]:
        sides = figures["k_txt"][str(k_txt)]
        name = f"k_txt {k_txt}: "
        one = sides["cached"]
        cached += [
            (name + "load and compile the text encoder", sides["load_seconds"], 1),
            (
                name + "extract a sentence",
                1 / sides["sentences_per_second"],
                float(_study(study).rows),
            ),
            (name + "build and trace a trial", one["setup"], trials),
            (name + "training step", one["step"], trials * epochs * train),
            (name + "validation step", one["val_step"], trials * epochs * val),
            (name + "save and report an epoch", one["rest"] / 2, trials * epochs),
        ]
        for way, lines in ways.items():
            one = sides[way]
            lines += [
                (name + "build and compile a trial", one["setup"] + one["val_setup"], trials),
                (name + "training step", one["step"], trials * epochs * train),
                (name + "validation step", one["val_step"], trials * epochs * val),
            ]
    return {"cached": cached, **ways}


def _study(values: dict[str, Any]) -> Study:
    trials = tuple((int(k_txt), int(count)) for k_txt, count in values["trials"])
    return Study(**{**values, "trials": trials})


def break_even(figures: dict[str, Any]) -> dict[str, float]:
    """Return after how many epochs caching wins over end to end with XLA, by k_txt.

    Extraction of all photos and sentences is paid first, by one run alone.
    Infinite where an end-to-end epoch is the shorter.
    """
    study = _study(figures["study"])
    train, val = study.steps(figures["batch_size"])
    found = {}
    for k_txt, sides in figures["k_txt"].items():

        def epoch(way: str, sides: dict[str, Any] = sides) -> float:
            return float(train * sides[way]["step"] + val * sides[way]["val_step"])

        paid = study.images / figures["images_per_second"]
        paid += sides["load_seconds"] + study.rows / sides["sentences_per_second"]
        gain = epoch("end_to_end_xla") - epoch("cached")
        found[k_txt] = paid / gain if gain > 0 else math.inf
    return found


def report(figures: dict[str, Any]) -> str:
    """Return every measured number, its multiplier, the sums and their ratios."""
    ways = parts(figures)
    sums = {way: sum(one * count for _, one, count in lines) for way, lines in ways.items()}
    rows = []
    for way, lines in ways.items():
        title = WAYS.get(way, way)
        rows += [
            [title, what, f"{1e3 * one:,.1f} ms", f"{count:,.0f}", f"{one * count / 3600:.2f} h"]
            for what, one, count in lines
        ]
        ratio = "" if way == "cached" else f", {sums[way] / sums['cached']:.1f}× of cached"
        rows.append([f"{title}: all{ratio}", "", "", "", f"{sums[way] / 3600:.2f} h"])
    study = figures["study"]
    trials = sum(count for _, count in study["trials"])
    even = [
        [k_txt, f"{epochs:.2f}" if math.isfinite(epochs) else "never"]
        for k_txt, epochs in break_even(figures).items()
    ]
    text = [
        f"A search of {trials} trials × {study['epochs']} epochs over {study['train_rows']:,}"
        f" training and {study['val_rows']:,} validation rows on {study['images']:,} images,"
        f" batches of {figures['batch_size']}; each number measured on"
        " a sample and multiplied. End to end does not pay for reading its photos.",
        table(["way", "part", "one takes", "times", "in all"], rows),
        "Epochs after which caching has won over end to end with XLA, when one run alone pays for"
        " all of the extraction:",
        table(["k_txt", "epochs"], even),
    ]
    return "\n\n".join(text)
