"""A Ray cluster: reached, asked what fits on it, and left.

`featstore.extract.ray` extracts on it; a search's trials run on it too.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from featstore.errors import UsageError

REACH_SECONDS = 10.0
GPU_ACTOR_CPUS = 2.0
# What decides how a process computes, taken along to the actors.
ENVIRONMENT = (
    "KERAS_BACKEND",
    "TF_CPP_MIN_LOG_LEVEL",
    "TF_ENABLE_ONEDNN_OPTS",
    "TF_FORCE_GPU_ALLOW_GROWTH",
    "TF_XLA_FLAGS",
    "XLA_FLAGS",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
)
# Read when Ray is imported or started: no report of use, no upload of the working folder, no hint.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@contextlib.contextmanager
def connect(address: str) -> Iterator[Any]:
    """Be the driver of a Ray cluster.

    Nothing is uploaded, reported or printed, and no dashboard is started.
    Ctrl-C and SIGTERM keep the handlers that they had.

    Args:
        address: `host:port` of a running cluster, `auto` for the one that this
            machine belongs to, or `local` to start one here, which ends with
            the block.

    Yields:
        The `ray` module, connected.

    Raises:
        UsageError: Ray is not installed, or nothing answers at the address.
    """
    os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
    check_address(address)
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    here = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
            **here,
        )
    except Exception as error:
        ray.shutdown()
        raise UsageError(
            f"--ray {address}: cannot be connected to ({one_line(error)}); give the host:port"
            " that `ray start --head` printed, or local"
        ) from error
    try:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)
        yield ray
    finally:
        ray.shutdown()


def check_address(address: str) -> None:
    """Refuse at once what Ray would try to reach for minutes.

    Raises:
        UsageError: Ray is not installed, it is no address, or nothing answers there.
    """
    if importlib.util.find_spec("ray") is None:
        raise UsageError("--ray needs the package ray; run `python -m pip install -e '.[ray]'`")
    if address in ("local", "auto"):
        return
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "/" in host:
        raise UsageError(
            f"--ray {address}: expected host:port, auto or local; start the command on a machine"
            " of the cluster"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"--ray {address}: nothing answers there ({error}); is `ray start --head` running?"
        ) from error


def one_line(error: BaseException) -> str:
    """Return the last line of what Ray says, which has the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


@dataclass(frozen=True)
class Actors:
    """The actors of a job.

    Attributes:
        count: How many; None: as many as fit, at most one for each shard or
            trial.
        num_gpus: GPUs of each, fractions allowed; None: 1 where the cluster
            has any.
        num_cpus: CPUs of each; None: 2 beside a GPU, and otherwise all of the
            smallest node, so that each node has one encoder.
        return_shards: The bytes of every extracted shard are sent to the driver.
    """

    count: int | None = None
    num_gpus: float | None = None
    num_cpus: float | None = None
    return_shards: bool = False


def resources_of(ray: Any, wanted: Actors, most: int) -> tuple[int, float, float]:
    """Return the number of actors, at most `most`, and the GPUs and CPUs of each."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus, cpus = wanted.num_gpus, wanted.num_cpus
    if gpus is None:
        gpus = 1.0 if any(node.get("GPU") for node in nodes) else 0.0
    if cpus is None:
        smallest = min((node["CPU"] for node in nodes if node.get("CPU")), default=1.0)
        cpus = GPU_ACTOR_CPUS if gpus else smallest
    needs = {"GPU": gpus, "CPU": cpus}
    fitting = sum(
        min((int(node.get(name, 0) / need) for name, need in needs.items() if need), default=1)
        for node in nodes
    )
    return max(1, min(wanted.count or fitting, most)), gpus, cpus
