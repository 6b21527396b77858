"""TensorFlow and JAX on this machine: the same steps and the same encoder on both.

Each side runs in processes of its own, in turns, so that a machine that slows down meanwhile slows
both. `python -m benchmarks.backends` is one such process.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.measuring import ratios, spread, written
from benchmarks.sizes import STUDY, Size
from benchmarks.study_search import ROOT
from benchmarks.tables import table

BACKENDS = ("tensorflow", "jax")
# About as the demo's encoders: a step is bound by calls there, not by arithmetic.
SMALL = Size("small", 96, 12, 64, 4, 4, 6, 512, 24, 512, 32)


def one_side(size: Size, layers: Sequence[int], steps: int, photos: int) -> dict[str, Any]:
    """Time steps and the vision encoder on the backend of this process.

    Args:
        size: Of the encoders.
        layers: Values of k_txt.
        steps: Cached steps that are timed.
        photos: Of one forward pass; four are timed. 0: none.

    Returns:
        Seconds of a step, and of everything until one of each padded length was taken (building,
        tracing or compiling), by k_txt; photos a second.
    """
    import numpy as np

    from benchmarks.sentences import padded_lengths
    from benchmarks.steps import cached_step, release
    from featstore.encoders.compiled import compile_forward
    from featstore.encoders.framework import pinned_framework
    from featstore.encoders.tower import Tower

    found: dict[str, Any] = {"steps": {}, "first_step": {}}
    lengths = padded_lengths(size.sequence_length, size.rows, steps)
    with pinned_framework():
        for k_txt in layers:
            started = time.perf_counter()
            step = cached_step(k_txt, size.rows, lengths, size)
            found["first_step"][str(k_txt)] = time.perf_counter() - started
            for _ in range(steps):
                step()
            started = time.perf_counter()
            for _ in range(steps):
                step()
            found["steps"][str(k_txt)] = (time.perf_counter() - started) / steps
            release()
        if photos:
            tower = Tower(size.vision_backbone(), "vision")
            encode = compile_forward(tower.lower(0), tower.backbone.variables)
            rng = np.random.default_rng(0)
            pixels = rng.standard_normal((photos, size.image, size.image, 3), np.float32)
            np.asarray(encode(pixels))
            started = time.perf_counter()
            for _ in range(4):
                np.asarray(encode(pixels))
            found["photos_per_second"] = 4 * photos / (time.perf_counter() - started)
    return found


def measure(
    layers: Sequence[int] = (0, 3, 6),
    rounds: int = 3,
    steps: int = 32,
    photos: int = 8,
    sizes: Sequence[Size] = (STUDY, SMALL),
) -> dict[str, Any]:
    """Run both sides in turns.

    Args:
        layers: Values of k_txt; more than an encoder has layers are left out.
        rounds: In each, either side runs once.
        steps: Cached steps that are timed.
        photos: Of one forward pass of the vision encoder.
        sizes: Of the encoders.

    Returns:
        By size: spreads of seconds and of photos a second on both, and JAX's over TensorFlow's.
    """
    figures: dict[str, Any] = {"rounds": rounds, "sizes": {}}
    for size in sizes:
        own = [k for k in layers if k <= size.text_layers]
        sides: dict[str, list[dict[str, Any]]] = {backend: [] for backend in BACKENDS}
        for _ in range(rounds):
            for backend in BACKENDS:
                chosen = {"KERAS_BACKEND": backend}
                sides[backend].append(process(chosen, size, own, steps, photos))
        figures["sizes"][size.name] = _compared(sides, own)
    return figures


def process(
    chosen: Mapping[str, str], size: Size, layers: Sequence[int], steps: int, photos: int
) -> dict[str, Any]:
    """Return what `one_side` finds in a process of its own.

    Args:
        chosen: Of its environment.
        size, layers, steps, photos: As `one_side` takes them.
    """
    given = {"layers": list(layers), "steps": steps, "photos": photos}
    # What an earlier round compiled is not found: a first step is one.
    environment = {**os.environ, **chosen, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.backends", json.dumps([asdict(size), given])],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{chosen}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _compared(sides: dict[str, list[dict[str, Any]]], layers: Sequence[int]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for what in ("steps", "first_step"):
        for k_txt in map(str, layers):
            values = {name: [one[what][k_txt] for one in runs] for name, runs in sides.items()}
            found.setdefault(what, {})[k_txt] = _pair(values)
    rates = {
        name: [one.get("photos_per_second", 0.0) for one in runs] for name, runs in sides.items()
    }
    if all(map(all, rates.values())):
        found["photos_per_second"] = _pair(rates)
    return found


def _pair(values: dict[str, list[float]]) -> dict[str, Any]:
    digits = 5 if statistics.median(values["jax"]) < 1 else 2
    return {
        **{name: spread(own, digits) for name, own in values.items()},
        "ratio": ratios(values["jax"], values["tensorflow"]),
    }


def report(figures: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    rows = []
    for size, found in figures["sizes"].items():
        for k_txt, pair in found["steps"].items():
            rows.append([f"step, {size}'s size, k_txt {k_txt}", *_cells(pair, " ms", 1, 1e3)])
        for k_txt, pair in found["first_step"].items():
            rows.append(
                [f"until the first of each length, k_txt {k_txt}", *_cells(pair, " s", 1, 1.0)]
            )
        if "photos_per_second" in found:
            pair = found["photos_per_second"]
            rows.append(["ViT, photos a second", *_cells(pair, "", 1, 1.0)])
    return table(["", "TensorFlow", "JAX", "JAX / TensorFlow"], rows)


def _cells(pair: dict[str, Any], unit: str, digits: int, factor: float) -> list[str]:
    sides = [written(pair[name], unit, digits, factor) for name in BACKENDS]
    return [*sides, written(pair["ratio"], "×", 2)]


if __name__ == "__main__":
    its_size, asked = json.loads(sys.argv[1])
    print(json.dumps(one_side(Size(**its_size), **asked)))
