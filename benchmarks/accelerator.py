"""Steps and extraction on an accelerator, with JAX: features on the host, or on the device.

Run with `KERAS_BACKEND=jax`; TensorFlow need not be installed. An accelerator
works behind the caller's back, so steps are timed many at once, as the training
loop takes them: it waits for none but the last.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from benchmarks import extraction
from benchmarks.measuring import ratios, spread, written
from benchmarks.sizes import STUDY, Size
from benchmarks.steps import cached_stepper, end_to_end, random_batch, release
from benchmarks.tables import table
from featstore.encoders.framework import pinned_framework
from featstore.errors import UsageError
from featstore.store.numbers import Numbers
from trainer.batches import Batch
from trainer.resident import OnDevice
from trainer.run.step import Stepper

POLICIES = {"float32": "float32", "mixed_bfloat16": "bfloat16"}
BATCH_SIZES = (32, 128, 512)
ENCODED = 256
"""Photos of one forward pass of the encoder."""

Steps = Callable[[int], Any]


def _steps(stepper: Stepper, batches: Iterable[Any]) -> Steps:
    """Return a call that takes so many steps and waits for the last."""

    def take(count: int) -> Any:
        losses = [stepper.train(batch)[0] for batch in itertools.islice(batches, count)]
        return float(np.asarray(losses[-1]))

    return take


class _Images:
    """Those of some batches, as a store has them."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._values = np.concatenate([batch.features.values for batch in batches])
        self.spec = {"dtype": str(self._values.dtype)}
        _, tokens, width = self._values.shape
        self.row_shape = (tokens, width)

    def gather_stored(self, positions: Any) -> Numbers:
        return Numbers(self._values[positions])

    def will_need(self, positions: Any) -> None:
        pass


def resident_batches(batches: Sequence[Batch]) -> Iterable[Batch]:
    """Yield batches without end whose image features are gathered on the device.

    Args:
        batches: Their features are put there; each is given random rows of them.
    """
    rows = len(batches[0].labels)
    every = np.arange(len(batches) * rows)
    images = OnDevice(_Images(batches), every)
    generator = np.random.default_rng(0)
    for batch in itertools.cycle(batches):
        positions = generator.choice(every, rows)
        yield dataclasses.replace(batch, features=images.gather_stored(positions))


def _seconds(take: Steps, count: int) -> float:
    started = time.perf_counter()
    take(count)
    return (time.perf_counter() - started) / count


def measure_steps(
    policy: str, rows: int, k_txt: int, length: int, rounds: int, steps: int, size: Size
) -> dict[str, Any]:
    """Time a cached step both ways and an end-to-end step.

    Returns:
        Seconds of a step of each, the ratio of end to end to the cached steps,
        and that of the host's features to the device's; seconds until the first cached step
        was taken, most of which XLA takes to compile it.
    """
    train = size.train(k_txt, dtype_policy=policy, batch_size=rows)
    batches = [random_batch(rows, length if k_txt else 1, seed, size) for seed in range(3)]
    _, stepper = cached_stepper(train, size)
    whole = end_to_end(k_txt, rows, True, size, policy)
    sides: dict[str, Steps] = {
        "host": _steps(stepper, itertools.cycle(batches)),
        "device": _steps(stepper, resident_batches(batches)),
        "end_to_end": lambda count: [whole.train() for _ in range(count)],
    }
    compiling = _seconds(sides["host"], 1)
    for take in sides.values():
        take(2)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, take in sides.items():
            count = max(1, steps // 10) if name == "end_to_end" else steps
            seconds[name].append(_seconds(take, count))
    found: dict[str, Any] = {name: spread(taken, 6) for name, taken in seconds.items()}
    found["end_to_end_to_host"] = ratios(seconds["end_to_end"], seconds["host"], 1)
    found["end_to_end_to_device"] = ratios(seconds["end_to_end"], seconds["device"], 1)
    found["host_to_device"] = ratios(seconds["host"], seconds["device"])
    found["first_step"] = round(compiling, 2)
    found["rows_per_second"] = round(rows / statistics.median(seconds["device"]), 1)
    return found


def device() -> str:
    """Return the name of the device that JAX runs on.

    Raises:
        UsageError: Keras runs on another backend.
    """
    if keras.backend.backend() != "jax":
        raise UsageError(
            f"Keras runs on {keras.backend.backend()}, this benchmark needs JAX; type"
            " `KERAS_BACKEND=jax python -m benchmarks accelerator`"
        )
    import jax

    return str(jax.devices()[0].device_kind)


@pinned_framework()
def measure(
    layers: Sequence[int] = (0, 2, 3, 6),
    batch_sizes: Sequence[int] = BATCH_SIZES,
    policies: Sequence[str] = tuple(POLICIES),
    length: int = 12,
    rounds: int = 5,
    steps: int = 50,
    photos: int = 1024,
    size: Size = STUDY,
    progress: Callable[[str, dict[str, Any]], None] = lambda name, figures: None,
) -> dict[str, Any]:
    """Measure steps and extraction on the device that JAX runs on.

    Args:
        layers: Values of k_txt.
        batch_sizes: Rows of a step.
        policies: Keras dtype policies.
        length: Tokens that a cached batch is padded to.
        rounds: In each, every side runs once.
        steps: Cached steps of a round; end to end a tenth as many.
        photos: Photos to extract; 0 leaves the extraction out.
        size: Of the encoders.
        progress: Called with what has just been measured, and with all figures so far: on a
            machine that is lent, what was measured is to be kept at once.

    Returns:
        Figures by "policy/batch size/k_txt", and extraction by precision.

    Raises:
        UsageError: Keras runs on another backend than JAX.
    """
    figures: dict[str, Any] = {
        "device": device(),
        "size": size.name,
        "tokens": length,
        "rounds": rounds,
        "steps": {},
        "extraction": {},
    }
    for policy, rows, k_txt in itertools.product(policies, batch_sizes, layers):
        name = f"{policy}/{rows}/{k_txt}"
        figures["steps"][name] = measure_steps(policy, rows, k_txt, length, rounds, steps, size)
        release()
        progress(name, figures)
    with tempfile.TemporaryDirectory() as scratch:
        if photos:
            folder = str(extraction.write_photos(Path(scratch) / "photos", photos))
        for policy in policies if photos else ():
            precision = POLICIES[policy]
            figures["extraction"][precision] = extraction.measure(
                None, folder, photos, min(ENCODED, photos), size=size, precision=precision
            )
            release()
            progress(f"extraction, {precision}", figures)
    return figures


def merged(earlier: dict[str, Any], figures: dict[str, Any]) -> dict[str, Any]:
    """Return figures with those of an earlier run on the same device that they do not replace.

    So one long measurement can be made in several short ones.
    """
    same = all(earlier.get(key) == figures[key] for key in ("device", "size", "tokens"))
    if not same:
        return figures
    parts = {part: {**earlier[part], **figures[part]} for part in ("steps", "extraction")}
    return {**figures, **parts}


def report(figures: dict[str, Any]) -> str:
    """Return the figures as Markdown tables."""
    rows = []
    for name, found in figures["steps"].items():
        policy, batch_size, k_txt = name.split("/")
        rows.append(
            [
                policy,
                batch_size,
                k_txt,
                written(found["host"], " ms", 2, 1e3),
                written(found["device"], " ms", 2, 1e3),
                written(found["host_to_device"], "×", 2),
                written(found["end_to_end"], " ms", 1, 1e3),
                written(found["end_to_end_to_device"], "×", 1),
                f"{found['first_step']:.1f} s",
            ]
        )
    header = [
        "policy",
        "batch",
        "k_txt",
        "features on the host",
        "on the device",
        "ratio",
        "end to end",
        "to the device's",
        "to the first step",
    ]
    parts = [
        f"{figures['device']}, JAX; {figures['tokens']} tokens where text layers train.",
        table(header, rows),
        *(extraction.report(found) for found in figures["extraction"].values()),
    ]
    return "\n\n".join(parts)
