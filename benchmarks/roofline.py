"""A cached step against what its arithmetic and its memory traffic allow on this machine.

The peaks are measured in the same process and in the same rounds as the steps:
the fastest float32 matrix product through the same compiler, on all cores, and
the fastest copy of a block that no cache holds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import keras
import numpy as np

from benchmarks.arithmetic import bytes_moved, operations
from benchmarks.measuring import ratios, seconds_of, spread, written
from benchmarks.sizes import STUDY, Size
from benchmarks.steps import cached_step, release
from benchmarks.tables import table
from featstore.config import usable_cores

GEMM_SIZES = (512, 1024, 2048, 3072)
COPIED_BYTES = 1 << 28


def compiled_product(order: int) -> Callable[[], Any]:
    """Return a call that multiplies two float32 matrices under XLA and waits for the result."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((order, order), np.float32) for _ in range(2))
    if keras.backend.backend() == "jax":
        import jax

        on_device = jax.device_put((a, b))
        product = jax.jit(jax.numpy.matmul)
        return lambda: product(*on_device).block_until_ready()
    import tensorflow as tf

    tensors = tf.constant(a), tf.constant(b)
    multiply = tf.function(tf.matmul, jit_compile=True)
    # One number is read back, which waits for all.
    return lambda: float(multiply(*tensors)[0, 0])


def gemm_peak(calls: dict[int, Callable[[], Any]]) -> float:
    """Return the most operations a second of square products, the best of their sizes."""
    return max(2 * n**3 / min(seconds_of(call) for _ in range(2)) for n, call in calls.items())


class Copier:
    """Copies a block of memory with all cores.

    Args:
        block_bytes: Its size; greater than any cache.
    """

    def __init__(self, block_bytes: int = COPIED_BYTES) -> None:
        self.threads = usable_cores()
        self.source = np.ones(block_bytes, np.uint8)
        self.target = np.zeros(block_bytes, np.uint8)

    def rate(self) -> float:
        """Return the bytes read and written a second, the best of three copies."""
        pieces = [np.array_split(block, self.threads) for block in (self.target, self.source)]
        with ThreadPoolExecutor(self.threads) as pool:
            best = min(seconds_of(lambda: list(pool.map(np.copyto, *pieces))) for _ in range(3))
        return 2 * len(self.source) / best


def measure(
    layers: Sequence[int],
    rows: int = 32,
    length: int = 12,
    rounds: int = 5,
    steps: int = 5,
    size: Size = STUDY,
    gemm_sizes: Sequence[int] = GEMM_SIZES,
    copied_bytes: int = COPIED_BYTES,
) -> dict[str, Any]:
    """Count and time a cached step for each number of trained text layers.

    Args:
        layers: Values of k_txt.
        rows: Rows of a step.
        length: Tokens that the batch is padded to; one where no layer trains.
        rounds: In each, peaks and steps are measured once.
        steps: Steps of a round.
        size: Of the encoders.
        gemm_sizes: Orders of the matrices whose product gives the peak.
        copied_bytes: Block whose copy gives the memory's rate.

    Returns:
        Operations and bytes by part, both peaks, and for each k_txt the time
        taken and its ratio to what the peaks imply: `bound` where arithmetic
        and traffic overlap, `sum` where they do not.
    """
    products = {order: compiled_product(order) for order in gemm_sizes}
    for call in products.values():
        call()
    copier = Copier(copied_bytes)
    peaks: list[float] = []
    rates: list[float] = []
    found: dict[str, Any] = {}
    for k_txt in layers:
        tokens = length if k_txt else 1
        work = operations(size, k_txt, rows, tokens)
        moved = bytes_moved(size, k_txt, rows, tokens)
        step = cached_step(k_txt, rows, [length], size)
        step()
        taken, bound, both = [], [], []
        for _ in range(rounds):
            peak, rate = gemm_peak(products), copier.rate()
            peaks.append(peak)
            rates.append(rate)
            arithmetic, traffic = sum(work.values()) / peak, sum(moved.values()) / rate
            taken.append(statistics.median(seconds_of(step) for _ in range(steps)))
            bound.append(max(arithmetic, traffic))
            both.append(arithmetic + traffic)
        found[str(k_txt)] = {
            "operations": work,
            "bytes": moved,
            "seconds": spread(taken, 6),
            "bound_seconds": spread(bound, 6),
            "sum_seconds": spread(both, 6),
            "taken_to_bound": ratios(taken, bound),
            "taken_to_sum": ratios(taken, both),
        }
        release()
    return {
        "size": size.name,
        "batch_size": rows,
        "tokens": length,
        "rounds": rounds,
        "gemm_gigaflops": spread([peak / 1e9 for peak in peaks], 1),
        "copy_gigabytes_per_second": spread([rate / 1e9 for rate in rates], 2),
        "copy_threads": copier.threads,
        "k_txt": found,
    }


def report(figures: dict[str, Any]) -> str:
    """Return what is counted, and what it takes, as Markdown tables."""
    by_part, timed = [], []
    for k_txt, found in figures["k_txt"].items():
        work, moved = found["operations"], found["bytes"]
        by_part.append(
            [
                k_txt,
                *(f"{value / 1e9:.3f}" for value in work.values()),
                f"{sum(work.values()) / 1e9:.2f}",
                *(f"{value / 1e6:.1f}" for value in moved.values()),
                f"{sum(moved.values()) / 1e6:.0f}",
            ]
        )
        timed.append(
            [
                k_txt,
                written(found["bound_seconds"], " ms", 1, 1e3),
                written(found["sum_seconds"], " ms", 1, 1e3),
                written(found["seconds"], " ms", 1, 1e3),
                written(found["taken_to_bound"], "×", 2),
                written(found["taken_to_sum"], "×", 2),
            ]
        )
    any_k = next(iter(figures["k_txt"].values()))
    counted = [
        "k_txt",
        *(f"{part}, GFLOP" for part in any_k["operations"]),
        "all, GFLOP",
        *(f"{part}, MB" for part in any_k["bytes"]),
        "all, MB",
    ]
    header = [
        "k_txt",
        "bound: the longer",
        "bound: both in turn",
        "taken",
        "taken to the longer",
        "taken to both",
    ]
    head = (
        f"Float32 matrix products reach {written(figures['gemm_gigaflops'], ' GFLOP/s', 0)},"
        f" copies {written(figures['copy_gigabytes_per_second'], ' GB/s', 1)} read and written, on"
        f" {figures['copy_threads']} cores. One step of {figures['batch_size']} rows,"
        f" {figures['tokens']} tokens where text layers train."
    )
    return f"{head}\n\n{table(counted, by_part)}\n\n{table(header, timed)}"
