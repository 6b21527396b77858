"""Attack a small store and count: flipped bytes, kills, broken photos, a full disk.

    python tests/campaign.py [--flips 2000 --kills 100 --trainings 12 --searches 6 --starts 20]

Every extraction, training and repair is the real command in a process of its
own, and so is every third search; the others are a worker without its driver.
The processes are forked from one that has imported TensorFlow and run nothing
of it: its only threads are those of the allocator, which takes care of forks
itself (`check_forkable`). `--disks N` tries each N-th of the points at which a
disk may refuse.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import importlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Before NumPy is imported: a pool of threads would not survive a fork.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    os.environ["MPLBACKEND"] = "Agg"
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import h5py
import numpy as np
from PIL import Image
from tiny_runs import tiny_config

from featstore import publish
from featstore.care.info import open_folder
from featstore.care.verify import verify_folder
from featstore.config import StoreConfig
from featstore.errors import FeatstoreError
from featstore.project import Project
from featstore.publish import TEMPORARY
from featstore.store.folder import shard_paths, write_manifest
from featstore.store.shard import INDEX_DATASETS
from featstore.store.store import VisionStore
from trainer.commands import console
from trainer.config import Config, render_config

LISTS = ("spec.json", "manifest.json", "quarantine.json")
SHARD_ROWS = 4
# Threads of jemalloc, which takes its locks before a fork and starts them again after.
HARMLESS_THREADS = {"jemalloc_bg_thd"}


@dataclass
class Figures:
    """What a campaign tried and found.

    Attributes:
        name: Of the campaign.
        tried: Attacks.
        outcomes: Outcome to its count.
        wrong: What should never be; empty where the store kept its promise.
    """

    name: str
    tried: int = 0
    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, outcome: str, wrong: str = "") -> None:
        self.tried += 1
        self.outcomes[outcome] += 1
        if wrong:
            self.wrong.append(wrong)

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "outcomes": dict(self.outcomes)}


# --- the store's contents ---------------------------------------------------------------


def live_values(folder: Path) -> dict[str, bytes]:
    """Return key to the bytes of its features, read as a training reads them."""
    store = open_folder(folder)
    names = store.keys()
    if not names:
        return {}
    positions = store.lookup(names)
    if isinstance(store, VisionStore):
        parts = [[row.tobytes() for row in a] for a in store.gather_stored(positions).arrays]
        rows = [b"".join(row) for row in zip(*parts, strict=True)]
    else:
        hidden, mask = store.gather(positions, 24)
        rows = [row[valid].tobytes() for row, valid in zip(hidden, mask, strict=True)]
    return dict(zip(names, rows, strict=True))


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in shard_paths(folder)}


# --- a. flipped bytes -------------------------------------------------------------------


@dataclass(frozen=True)
class Region:
    """A part of a file that has one meaning."""

    label: str
    path: Path
    offsets: np.ndarray


def regions(folder: Path) -> list[Region]:
    """Cut each file of a folder into its datasets and the rest."""
    found = []
    for path in shard_paths(folder):
        rest = np.ones(path.stat().st_size, bool)
        with h5py.File(path) as file:
            spans = [
                (name, file[name].id.get_offset(), file[name].id.get_storage_size())
                for name in (*INDEX_DATASETS[folder.parent.name], "features", "scales")
                if name in file
            ]
            signature = file.userblock_size
        for name, start, size in spans:
            rest[start : start + size] = False
            found.append(Region(f"/{name}", path, np.arange(start, start + size)))
        header = np.flatnonzero(rest)
        content = np.frombuffer(path.read_bytes(), np.uint8)
        used = header[content[header] != 0]
        found.append(Region("superblock", path, np.arange(signature, signature + 96)))
        found.append(Region("headers and attributes", path, used))
        found.append(Region("headers and padding", path, header))
    for name in LISTS:
        if (folder / name).exists():
            size = (folder / name).stat().st_size
            found.append(Region(name, folder / name, np.arange(size)))
    return found


def is_unused(path: Path, before: bytes, after: bytes) -> bool:
    """Tell whether a change of a list is of a part that no reader uses."""
    try:
        one, two = (json.loads(text.decode()) for text in (before, after))
    except ValueError:
        return False
    if path.name == "spec.json":
        one, two = one.get("spec"), two.get("spec")
    return bool(one == two)


def judge(folder: Path, path: Path, before: bytes, after: bytes, good: dict[str, bytes]) -> Any:
    """Return what became of a change, and what is wrong about that."""
    try:
        named = {problem.path.name for problem in verify_folder(folder).problems}
    except Exception as error:
        return "traceback of verify", f"verify: {error!r}"
    try:
        same = live_values(folder) == good
        read = "same values" if same else "other values"
    except FeatstoreError as error:
        read = "refused"
        if "\n" in str(error):
            return "long error", str(error)
    except Exception as error:
        return "traceback of a reader", f"{error!r}"
    if read == "other values":
        return "SILENT", "a reader gave other values"
    if path.name in named or (named and path.suffix == ".json"):
        return f"found, {read} by readers", ""
    if read == "same values" and is_unused(path, before, after):
        return "unused text", ""
    return "NOT FOUND", "verify found nothing"


def flips(folders: list[Path], count: int, seed: int = 0) -> Figures:
    """Flip `count` bytes, spread evenly over every part of every file, one at a time."""
    figures = Figures("flipped bytes")
    rng = np.random.default_rng(seed)
    for folder in folders:
        good, parts = live_values(folder), regions(folder)
        # In any order: a count below the number of parts must not leave the lists out.
        rng.shuffle(parts)
        for number in range(count // len(folders)):
            part = parts[number % len(parts)]
            before = part.path.read_bytes()
            after = bytearray(before)
            at = int(rng.choice(part.offsets))
            change = 1 << int(rng.integers(8)) if rng.random() < 0.7 else int(rng.integers(1, 256))
            after[at] ^= change
            part.path.write_bytes(after)
            outcome, wrong = judge(folder, part.path, before, bytes(after), good)
            where = f"{part.path.parent.parent.name}/{part.path.name} {part.label} byte {at}"
            figures.add(outcome, wrong and f"{where} ^ {change:#x}: {wrong}")
            figures.outcomes[f"in {part.label}"] += 1
            part.path.write_bytes(before)
        if verify_folder(folder).problems or live_values(folder) != good:
            figures.wrong.append(f"{folder}: not as before the campaign")
    return figures


def cuts(folders: list[Path], count: int, seed: int = 0) -> Figures:
    """Cut files short at `count` lengths, and take each file away."""
    figures = Figures("files cut short or taken away")
    rng = np.random.default_rng(seed)
    for folder in folders:
        good = live_values(folder)
        paths = [*shard_paths(folder), *(folder / name for name in LISTS)]
        for path in [path for path in paths if path.exists()]:
            before = path.read_bytes()
            lengths: list[int | None] = [None, 0, len(before) - 1]
            each = max(1, count // (len(paths) * len(folders)))
            lengths += rng.integers(1, len(before), each).tolist()
            for length in lengths:
                path.unlink() if length is None else path.write_bytes(before[:length])
                after = b"" if length is None else before[:length]
                outcome, wrong = judge(folder, path, before, after, good)
                figures.add(outcome, wrong and f"{path.name} cut to {length}: {wrong}")
                path.write_bytes(before)
    return figures


# --- commands in processes of their own -------------------------------------------------


@dataclass
class Ended:
    """A command that ended."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """The error lines."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


@dataclass
class Running:
    """A command in a forked process."""

    process: int
    folder: Path

    def wait(self) -> Ended:
        code = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        out, err = ((self.folder / name).read_text() for name in ("out", "err"))
        shutil.rmtree(self.folder)
        return Ended(code, out, err)


def check_forkable() -> None:
    """Refuse to fork from a process that has threads of its own."""
    if not Path("/proc/self/task").is_dir():
        return
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    own = [name for name in names if name not in HARMLESS_THREADS]
    if len(own) != 1:
        raise RuntimeError(f"cannot fork: there are threads {own}")


def start(work: Callable[[], Any]) -> Running:
    """Run a function in a forked process, its output kept in files."""
    check_forkable()
    folder = Path(tempfile.mkdtemp(prefix="campaign-"))
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return Running(process, folder)
    code = 1
    try:
        os.setpgid(0, 0)
        for name, descriptor in (("out", 1), ("err", 2)):
            file = os.open(folder / name, os.O_WRONLY | os.O_CREAT)
            os.dup2(file, descriptor)
        code = work() or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def command(*args: str, attack: Callable[[], Any] = lambda: None) -> Running:
    """Start a command of the product; `attack` runs in its process before it."""
    from trainer.commands.main import cli

    def work() -> None:
        attack()
        cli.main(list(args), prog_name="python cli.py")

    return start(work)


def import_framework() -> None:
    """Import what every command needs, once, before anything is forked."""
    console.import_framework()
    for name in (
        "featstore.care.repair",
        "trainer.results.evaluate",
        "trainer.run.fit",
        "trainer.tuning.trials",
    ):
        importlib.import_module(name)


# --- b. kills ---------------------------------------------------------------------------

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# How often a run of 12 epochs reaches a point, where that is less often than 30 times.
MOST_REACHED = {"half-written": 12, "before manifest": 12}
POINTS = ("half-written", "before flush", "before rename", "before folder flush", "before manifest")


def dies_at(point: str, number: int, sent: int) -> Callable[[], None]:
    """Return an attack: at the `number`-th time that a point is reached, send itself a signal."""
    left = [number]

    def reached() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), sent)

    def attack() -> None:
        sync, replace, create = publish._sync, os.replace, h5py.File.create_dataset
        savez = np.savez

        def own_sync(path: Path) -> None:
            if point == ("before folder flush" if path.is_dir() else "before flush"):
                reached()
            if point == "before manifest" and path.name.endswith("-manifest.json"):
                reached()
            sync(path)

        def own_replace(source: Any, target: Any) -> None:
            if point == "before rename":
                reached()
            replace(source, target)

        def own_create(file: Any, name: str, *args: Any, **kwargs: Any) -> Any:
            if point == "half-written" and name == "checksums":
                reached()
            return create(file, name, *args, **kwargs)

        def own_savez(file: Any, **arrays: Any) -> None:
            if point == "half-written":
                file.write(bytes(1000))
                file.flush()
                reached()
                file.seek(0)
                file.truncate()
            savez(file, **arrays)

        publish._sync, os.replace = own_sync, own_replace
        h5py.File.create_dataset, np.savez = own_create, own_savez

    return attack


def attacked(
    point: str,
    sent: int,
    begin: Callable[..., Running],
    number: int,
    seconds: float,
) -> Running:
    """Start something that gets a signal at the `number`-th time of a point, or after `seconds`."""
    if point != "random moment":
        return begin(attack=dies_at(point, number, sent))
    running = begin()
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(running.process, sent)
    return running


@dataclass
class Work:
    """A data set, its settings, and a store and a run that nobody attacked.

    Attributes:
        folder: Of everything.
        config: The settings of the reference store.
        seconds: How long an extraction and a training take.
    """

    folder: Path
    config: Config
    seconds: dict[str, float] = field(default_factory=dict)

    def settings(self, root: Path, **changes: Any) -> str:
        """Write a settings file for a store at `root`; return its path."""
        store = dataclasses.replace(self.config.store, root=str(root))
        data = dataclasses.replace(self.config.data, **changes)
        path = root.parent / f"{root.name}.toml"
        path.write_text(render_config(dataclasses.replace(self.config, store=store, data=data)))
        return str(path)

    def features(self, root: Path, kind: str = "vit") -> Path:
        """Return the one folder of a kind; where there is none, one that is not there."""
        return next((root / kind).glob("*"), root / kind / "none")

    @property
    def reference(self) -> Path:
        return Path(self.config.store.root)

    @property
    def quantised(self) -> Path:
        """Root of a store of int8, with a photo that changed and one that is quarantined."""
        return self.folder / "quantised"


def make_work(folder: Path) -> Work:
    """Make the data and the reference store and run, by uninterrupted commands."""

    def presets() -> None:
        from tiny_presets import write_tiny_text, write_tiny_vision

        write_tiny_vision(folder / "vit")
        write_tiny_text(folder / "text")

    ended = start(presets).wait()
    assert ended.code == 0, ended.err
    config = tiny_config(folder / "data", folder / "vit", folder / "text", epochs=12)
    store = StoreConfig(
        root=str(folder / "reference"), dtype="float32", shard_rows=SHARD_ROWS, encode_batch_size=8
    )
    work = Work(folder, dataclasses.replace(config, store=store))
    file = work.settings(work.reference)
    for name, args in (
        ("extract", ("extract-vit", "--config", file)),
        ("train", ("train", "--config", file, "--runs", str(folder / "runs"), "--name", "whole")),
    ):
        started = time.perf_counter()
        ended = command(*args).wait()
        assert ended.code == 0, ended.err
        work.seconds[name] = time.perf_counter() - started
    images = Path(shutil.copytree(config.data.images, folder / "images"))
    file = work.settings(work.quantised, images=str(images))
    for image_id in ("", "photo001", "photo002"):
        if image_id:
            photo = images / f"{image_id}.png"
            data = photo.read_bytes()
            photo.write_bytes(data[:100] if image_id == "photo002" else data + b"edited")
        ended = command("extract-vit", "--config", file, "--dtype", "int8").wait()
        assert ended.code == 0, ended.err
    return work


def compare_store(work: Work, root: Path) -> str:
    """Return how a store differs from the reference; empty where it does not."""
    found, wanted = work.features(root), work.features(work.reference)
    if shard_bytes(found) != shard_bytes(wanted):
        return "other shards than without the attack"
    if list(found.glob(f"{TEMPORARY}*")):
        return "temporary files are left"
    lines = [json.loads((f / "manifest.json").read_text())["shards"] for f in (found, wanted)]
    if lines[0] != lines[1]:
        return "another manifest than without the attack"
    problems = verify_folder(found).problems
    return f"verify: {problems[0].detail}" if problems else ""


def state_after_kill(work: Work, root: Path) -> str:
    """Return what is wrong with a store between a kill and the next command."""
    folder = work.features(root)
    if not shard_paths(folder):
        return ""
    problems = [p for p in verify_folder(folder).problems if p.what != "unlisted shard"]
    if problems:
        return f"after the kill: {problems[0].what}: {problems[0].detail}"
    good = live_values(work.features(work.reference))
    found = live_values(folder)
    return "" if found.items() <= good.items() else "after the kill: other values"


def kill_extractions(work: Work, count: int, seed: int = 0) -> Figures:
    """Kill `count` extractions, then let the same command end; up to three kills in a row."""
    figures = Figures("extractions killed")
    rng = np.random.default_rng(seed)
    shards = len(shard_paths(work.features(work.reference)))
    number = 0
    while number < count:
        root = work.folder / f"killed-{number}"
        args = ("extract-vit", "--config", work.settings(root))
        told, wrong = [], ""
        for _ in range(min(count - number, int(rng.integers(1, 4)))):
            sent = SIGNALS[number % 3]
            point = ("random moment", *POINTS)[number % (len(POINTS) + 1)]
            running = attacked(
                point,
                sent,
                functools.partial(command, *args),
                number=int(rng.integers(1, 2 + shards // 2)),
                seconds=rng.uniform(0, work.seconds["extract"]),
            )
            ended = running.wait()
            expected = {0, -9} if sent == signal.SIGKILL else {0, 130, -sent}
            if ended.code not in expected or "Traceback" in ended.err:
                wrong = wrong or f"{point}, {sent.name}: exit {ended.code}: {ended.err[-300:]}"
            wrong = wrong or state_after_kill(work, root)
            told.append(f"{sent.name} {point}")
            hit = "ended before" if ended.code == 0 else "hit"
            figures.add(f"{sent.name} {hit}")
            figures.outcomes[f"at {point}"] += 1
            number += 1
        ended = command(*args).wait()
        if ended.code:
            wrong = wrong or f"the next command: exit {ended.code}: {ended.err[-300:]}"
        wrong = wrong or compare_store(work, root)
        if wrong:
            figures.wrong.append(f"{', '.join(told)}: {wrong}")
        shutil.rmtree(root)
    return figures


def run_result(folder: Path) -> tuple[Any, dict[str, bytes]]:
    """Return a run's metrics and best weights."""
    weights: dict[str, bytes] = {}

    def collect(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            weights[name] = item[...].tobytes()

    with h5py.File(folder / "best.weights.h5", "r") as file:
        file.visititems(collect)
    return json.loads((folder / "metrics.json").read_text()), weights


def kill_trainings(work: Work, count: int, seed: int = 0) -> Figures:
    """Kill `count` trainings at random moments and named points, then let the command end."""
    figures = Figures("trainings killed")
    rng = np.random.default_rng(seed)
    runs, file = work.folder / "runs", work.settings(work.reference)
    wanted = run_result(runs / "whole")
    number = 0
    while number < count:
        name = f"killed-{number}"
        args = ("train", "--config", file, "--runs", str(runs), "--name", name)
        wrong = ""
        for _ in range(min(count - number, int(rng.integers(1, 4)))):
            sent = SIGNALS[number % 3]
            point = ("random moment", *POINTS)[number % (len(POINTS) + 1)]
            running = attacked(
                point,
                sent,
                functools.partial(command, *args),
                number=int(rng.integers(1, MOST_REACHED.get(point, 30))),
                seconds=rng.uniform(0.2, 0.8) * work.seconds["train"],
            )
            ended = running.wait()
            figures.outcomes[f"at {point}"] += 1
            if ended.code == 0:
                figures.add(f"{sent.name} ended before")
                number += 1
                break
            if ended.code not in (-9, 130, -sent) or "Traceback" in ended.err:
                wrong = f"{sent.name}: exit {ended.code}: {ended.err[-300:]}"
            figures.add(f"{sent.name} hit")
            number += 1
        else:
            ended = command(*args).wait()
        if ended.code:
            wrong = wrong or f"the next command: exit {ended.code}: {ended.err[-300:]}"
        elif run_result(runs / name) != wanted:
            wrong = wrong or "other metrics or weights than without the kill"
        if wrong:
            figures.wrong.append(f"{name}: {wrong}")
        shutil.rmtree(runs / name)
    return figures


SPACE = """
[search]
trials = 3
sampler = "random"
pruner = "none"
metric = "val_loss"
together = 1

[train]
lr = {log_uniform = [1e-3, 1e-2]}
dropout = {uniform = [0.0, 0.5], step = 0.125}
epochs = 4
"""


def search_worker(work: Work, name: str, attack: Callable[[], Any] = lambda: None) -> Running:
    """Start a search's only worker, without a driver."""

    def run() -> int:
        from featstore.data.dataset import load_dataset
        from trainer.tuning.search_file import start_search
        from trainer.tuning.space import read_space
        from trainer.tuning.trials import work as work_on

        attack()
        try:
            dataset = load_dataset(work.config.data, work.reference)
            space = read_space(work.folder / "space.toml", {}, {})
            base = space.base(work.config)
            folder = work.folder / "runs" / name
            with console.stop_request() as stopping:
                work_on(start_search(folder, base, space, None, None, dataset), dataset, stopping)
        except FeatstoreError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt:
            return 130
        return 0

    return start(run)


def search_command(work: Work, name: str, attack: Callable[[], Any] = lambda: None) -> Running:
    """Start the real command: a driver, and a worker in a process of its own."""
    return command(
        "search", "--config", work.settings(work.reference), "--runs", str(work.folder / "runs"),
        "--space", str(work.folder / "space.toml"), "--name", name, attack=attack,
    )  # fmt: skip


def trials_of(work: Work, name: str) -> list[Any]:
    """Return what a search found, trial by trial, read in a process of its own."""
    folder = work.folder / "runs" / name

    def read() -> None:
        from trainer.tuning.search_file import open_search
        from trainer.tuning.table import trial_rows

        rows = trial_rows(open_search(folder))
        # One that was killed while it was drawn leaves a number that is not used.
        keys = ("state", "params", "value", "epoch")
        print(json.dumps([[row[key] for key in keys] for row in rows]))

    ended = start(read).wait()
    return list(json.loads(ended.out)) if not ended.code else [ended.err[-300:]]


def kill_searches(work: Work, count: int, seed: int = 0) -> Figures:
    """Kill `count` searches, then let the same search go on; every third is the real command."""
    figures = Figures("searches killed")
    rng = np.random.default_rng(seed)
    (work.folder / "space.toml").write_text(SPACE)
    ways = {"worker": search_worker, "command": search_command}
    wanted, seconds = {}, {}
    for way, begin in ways.items():
        started = time.perf_counter()
        ended = begin(work, f"whole-{way}").wait()
        seconds[way] = time.perf_counter() - started
        wanted[way] = trials_of(work, f"whole-{way}")
        if ended.code or len(wanted[way]) != 3:
            figures.wrong.append(f"whole {way}: exit {ended.code}: {ended.err[-300:]}")
            return figures
    number = attempt = 0
    while number < count:
        attempt += 1
        name, way = f"killed-{number}", "command" if attempt % 3 == 0 else "worker"
        told, wrong = [], ""
        # A trial that ended its worker three times in an epoch is given up, which is no loss.
        for _ in range(min(count - number, int(rng.integers(1, 3)))):
            sent = SIGNALS[number % 3]
            # The driver publishes next to nothing: it is killed at moments.
            points = ("random moment", *POINTS) if way == "worker" else ("random moment",)
            point = points[number % len(points)]
            running = attacked(
                point,
                sent,
                functools.partial(ways[way], work, name),
                number=int(rng.integers(1, MOST_REACHED.get(point, 30))),
                seconds=rng.uniform(0.1, 0.9) * seconds[way],
            )
            ended = running.wait()
            if ended.code not in (0, -9, 130, -sent) or "Traceback" in ended.err:
                wrong = wrong or f"{point}, {sent.name}: exit {ended.code}: {ended.err[-300:]}"
            told.append(f"{sent.name} {way} {point}")
            figures.add(f"{sent.name} {way} {'ended before' if ended.code == 0 else 'hit'}")
            figures.outcomes[f"at {point}"] += 1
            number += 1
        # A worker whose driver was killed saves its trial first; until then it is its own.
        for _ in range(20):
            ended = ways[way](work, name).wait()
            found = trials_of(work, name)
            if ended.code or (len(found) == 3 and all(row[0] != "running" for row in found)):
                break
            time.sleep(1)
        if ended.code:
            wrong = wrong or f"the next command: exit {ended.code}: {ended.err[-300:]}"
        elif found != wanted[way]:
            wrong = wrong or f"other trials than without the kill: {found}"
        if wrong:
            figures.wrong.append(f"{', '.join(told)}: {wrong}")
        shutil.rmtree(work.folder / "runs" / name, ignore_errors=True)
    return figures


# --- c. starts at the same time ---------------------------------------------------------


def concurrent_starts(work: Work, count: int, seed: int = 0) -> Figures:
    """Start commands at once: two or three extractions, a reader beside one, two trainings."""
    figures = Figures("commands started at once")
    rng = np.random.default_rng(seed)
    wanted = run_result(work.folder / "runs" / "whole")
    for number in range(count):
        root, runs = work.folder / f"starts-{number}", work.folder / "runs"
        file = work.settings(root)
        extract = ("extract-vit", "--config", file, "--json")
        wrong = ""
        if number % 4 < 2:
            running = [command(*extract) for _ in range(2 + number % 2)]
            ended = [one.wait() for one in running]
            done = [json.loads(one.out)["extracted"] for one in ended if one.code == 0]
            whole = len(live_values(work.features(work.reference)))
            if sum(done) != whole or len(done) < len(ended):
                wrong = f"extracted {done}: {[one.err[-200:] for one in ended if one.code]}"
            wrong = wrong or compare_store(work, root)
            outcome = f"{len(ended)} extractions, the work done once"
        else:
            shutil.copytree(work.reference, root)
            train = ("train", "--config", file, "--runs", str(runs), "--name", f"starts-{number}")
            if number % 4 == 2:
                # The test split's photos are of no run: their shards go and come beside it.
                folder = work.features(root)
                gone = [path.name for path in shard_paths(folder)[11:]]
                manifest = json.loads((folder / "manifest.json").read_text())
                lines = [line for line in manifest["shards"] if line["name"] not in gone]
                for name in gone:
                    (folder / name).unlink()
                write_manifest(folder, folder.name, lines)
                running = [command(*train)]
                time.sleep(rng.uniform(0, work.seconds["train"] / 2))
                running.append(command(*extract))
                ended = [one.wait() for one in running]
                codes, outcome = [one.code for one in ended], "extraction beside a training"
                if codes != [0, 0]:
                    wrong = f"exit {codes}: {[one.err[-200:] for one in ended]}"
                wrong = wrong or compare_store(work, root)
            else:
                ended = [one.wait() for one in [command(*train), command(*train)]]
                loser = max(ended, key=lambda one: one.code)
                outcome = "two trainings of one name, one wins"
                if sorted(one.code != 0 for one in ended) != [False, True]:
                    wrong = f"exit {[one.code for one in ended]}"
                elif len(loser.lines) != 1 or "--name" not in loser.lines[0]:
                    wrong = f"the loser said {loser.err[-300:]!r}"
            if not wrong and run_result(runs / f"starts-{number}") != wanted:
                wrong = "other metrics or weights"
            shutil.rmtree(runs / f"starts-{number}", ignore_errors=True)
        figures.add(outcome, wrong and f"{outcome}: {wrong}")
        shutil.rmtree(root, ignore_errors=True)
    return figures


# --- d. photos --------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def odd_photos(rng: np.random.Generator) -> dict[str, tuple[str, bytes | None, bool]]:
    """Return name to suffix, content (None: a folder) and whether it can be decoded."""
    image = Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8))
    jpeg, png = encoded(image, "JPEG"), encoded(image, "PNG")
    bomb = bytearray(encoded(Image.new("1", (8, 8)), "PNG"))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    grey16 = Image.fromarray(rng.integers(0, 65536, (30, 30)).astype(np.uint16))
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    many = {"save_all": True, "append_images": frames[1:]}
    return {
        "truncated JPEG": (".jpg", jpeg[: len(jpeg) // 2], False),
        "truncated PNG": (".png", png[: len(png) // 2], False),
        "empty": (".jpg", b"", False),
        "zeros": (".png", bytes(3000), False),
        "text": (".jpg", b"a photo of a dog\n" * 9, False),
        "GIF": (".png", encoded(image, "GIF"), False),
        "bomb": (".png", bytes(bomb), False),
        "flipped PNG": (".png", png[:60] + bytes(40) + png[100:], False),
        "folder": (".jpg", None, False),
        "PNG named .jpg": (".jpg", png, True),
        "1×1": (".png", encoded(image.resize((1, 1)), "PNG"), True),
        "20000×1": (".png", encoded(image.resize((20_000, 1)), "PNG"), True),
        "CMYK": (".jpg", encoded(image.convert("CMYK"), "JPEG"), True),
        "16 bits": (".png", encoded(grey16, "PNG"), True),
        "animated": (".webp", encoded(frames[0], "WEBP", **many), True),
        "palette": (".png", encoded(image.convert("P"), "PNG"), True),
        "transparent": (".png", encoded(image.convert("RGBA"), "PNG"), True),
    }


def alone(config: Config, keys: list[str], out: Path) -> None:
    """Encode each photo in a batch of its own, and keep the values in a file."""
    from featstore.extract.encode import encoding_of

    project = Project(config)
    spec = project.vision_spec
    encoding = encoding_of(spec, project.encoder(spec), config.store)
    values = {}
    for number, key in enumerate(keys):
        path = project.dataset.images.lookup(key)
        assert path is not None
        (photo,) = encoding.rows([key], [path])
        assert photo.numbers is not None
        values[str(number)] = photo.numbers.values
    np.savez(out, **values)


def broken_photos(work: Work, count: int, seed: int = 0) -> Figures:
    """Extract `count` photos of which a tenth is broken and as many are odd."""
    figures = Figures("photos, a tenth of them broken")
    rng = np.random.default_rng(seed)
    folder = work.folder / "photos"
    (folder / "images").mkdir(parents=True)
    kinds = odd_photos(rng)
    bad = [name for name, (_, _, fine) in kinds.items() if not fine]
    odd = [name for name, (_, _, fine) in kinds.items() if fine]
    broken, good, lines = {}, {}, []
    for number in range(count):
        key, kind = f"p{number:04d}", "plain"
        if number % 10 == 3:
            kind = broken[key] = bad[number // 10 % len(bad)]
        else:
            kind = good[key] = odd[number // 10 % len(odd)] if number % 10 == 7 else "plain"
        pixels = rng.integers(0, 256, (int(rng.integers(20, 60)), 48, 3), np.uint8)
        suffix, content, _ = kinds.get(kind, (".png", encoded(Image.fromarray(pixels), "PNG"), 1))
        path = folder / "images" / (key + suffix)
        path.mkdir() if content is None else path.write_bytes(content)
        lines.append({"Image_ID": key, "Hypothesis": "a dog", "Label": "entailment"})
        lines.append({"Image_ID": key, "Hypothesis": "a cat", "Label": "contradiction"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    root = folder / "store"
    data = {"rows": str(folder / "rows.jsonl"), "images": str(folder / "images"), "split_file": ""}
    file = work.settings(root, **data)
    ended = command("extract-vit", "--config", file, "--json").wait()
    if ended.code:
        figures.wrong.append(f"exit {ended.code}: {ended.err[-500:]}")
        return figures
    said = json.loads(ended.out)
    listed = {key for key, kind in broken.items() if kind != "folder"}
    if said["failed"].keys() != listed or not all(said["failed"].values()):
        figures.wrong.append(f"quarantined: {sorted(said['failed'].keys() ^ listed)}")
    folders = [key for key, kind in broken.items() if kind == "folder"]
    if folders and f"{2 * len(folders)} no photo" not in ended.err:
        figures.wrong.append(f"rows of folders are not reported: {ended.err[-300:]}")
    for kind in broken.values():
        figures.add(f"{kind} {'left out' if kind == 'folder' else 'quarantined'}")
    store = open_folder(work.features(root))
    keys = sorted(good)
    out = folder / "alone.npz"
    config = dataclasses.replace(
        work.config, data=dataclasses.replace(work.config.data, **data, fractions=(1.0, 0.0, 0.0))
    )
    ended = start(lambda: alone(config, keys, out)).wait()
    if ended.code:
        figures.wrong.append(f"alone: {ended.err[-500:]}")
        return figures
    positions = store.lookup(keys)
    with np.load(out, allow_pickle=False) as file:
        for number, (key, position) in enumerate(zip(keys, positions.tolist(), strict=True)):
            found = store.gather(np.array([position]))[0] if position >= 0 else np.zeros(0)
            same = found.tobytes() == file[str(number)].tobytes()
            near = found.shape == file[str(number)].shape and np.allclose(
                found, file[str(number)], atol=1e-5
            )
            figures.add(
                "extracted, the bits that it has alone" if same else "extracted, within 1e-5",
                "" if near else f"{key} ({good[key]}): another row than alone",
            )
    return figures


# --- e. the file system -----------------------------------------------------------------


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    subprocess.run(["mount", *options, str(folder)], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True, capture_output=True)


def no_replace(number: int) -> Callable[[], None]:
    """Fail the `number`-th rename and all after it."""

    def attack() -> None:
        left, replace = [number], os.replace

        def failing(source: Any, target: Any) -> None:
            left[0] -= 1
            if left[0] <= 0:
                raise PermissionError(1, "Operation not permitted", str(target))
            replace(source, target)

        os.replace = failing

    return attack


def slow_fsync() -> None:
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(0.2)
        fsync(descriptor)

    os.fsync = slow


def no_fsync(number: int) -> Callable[[], None]:
    """Fail the `number`-th flush and all after it."""

    def attack() -> None:
        left, fsync = [number], os.fsync

        def failing(descriptor: int) -> None:
            left[0] -= 1
            if left[0] <= 0:
                raise OSError(5, "Input/output error")
            fsync(descriptor)

        os.fsync = failing

    return attack


def small_files(size: int) -> Callable[[], None]:
    def attack() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return attack


def file_systems(work: Work, every: int = 1) -> Figures:
    """Extract onto disks that are full, read-only, slow, or refuse to rename.

    Args:
        work: What is extracted.
        every: Of the points at which each kind of refusal begins, each so-manieth is tried.
    """
    figures = Figures("disks that refuse")
    root = work.folder / "disk"
    file = work.settings(root)
    args = ("extract-vit", "--config", file)

    def refused(name: str, attack: Callable[[], Any] = lambda: None) -> None:
        before = shard_bytes(work.features(root))
        ended = command(*args, attack=attack).wait()
        after = shard_bytes(work.features(root))
        wrong = ""
        if ended.code != 1 or len(ended.lines) != 1 or "Traceback" in ended.err:
            wrong = f"exit {ended.code}: {ended.err[-400:]}"
        elif not before.items() <= after.items():
            wrong = "the old shards are not as they were"
        figures.add(f"{name}: one line, exit 1", wrong and f"{name}: {wrong}")

    def ends(name: str, attack: Callable[[], Any] = lambda: None) -> None:
        ended = command(*args, attack=attack).wait()
        wrong = ended.err[-400:] if ended.code else compare_store(work, root)
        figures.add(f"{name}: same bytes", wrong and f"{name}: {wrong}")
        shutil.rmtree(root, ignore_errors=True)

    for number in (1, 2, 3, 6, 9, 14)[::every]:
        refused("a rename that fails", no_replace(number))
        ends("the command after it")
    for number in (1, 2, 4, 5, 8, 13)[::every]:
        refused("a flush that fails", no_fsync(number))
        ends("the command after it")
    for size in (100, 2000, 6000)[::every]:
        refused("files of a limited size", small_files(size))
        ends("the command after it")
    ends("slow flushes", slow_fsync)
    if os.geteuid() or not shutil.which("mount"):
        return figures
    for size in (48, 64, 80, 96, 112, 128)[::every]:
        root.mkdir()
        try:
            with mounted(root, "-t", "tmpfs", "-o", f"size={size}k", "tmpfs"):
                refused("a full disk")
                kept = Path(shutil.copytree(root, work.folder / "kept"))
        except subprocess.CalledProcessError:
            root.rmdir()
            return figures
        root.rmdir()
        kept.rename(root)
        ends("the command with space again")
    root.mkdir()
    (root / "vit").mkdir()
    with mounted(root, "--bind", str(root)):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(root)], check=True)
        refused("a read-only disk")
    shutil.rmtree(root)
    return figures


# --- repairs ----------------------------------------------------------------------------


def repairs(work: Work, count: int, seed: int = 0) -> Figures:
    """Damage a copy of the store in several ways at once, repair it, and compare the values."""
    figures = Figures("stores repaired")
    rng = np.random.default_rng(seed)
    wanted = {kind: live_values(work.features(work.reference, kind)) for kind in ("vit", "text")}
    for number in range(count):
        root = Path(shutil.copytree(work.reference, work.folder / f"repair-{number}"))
        told = []
        for kind in ("vit", "text"):
            folder = work.features(root, kind)
            parts = regions(folder)
            for _ in range(int(rng.integers(1, 4))):
                part = parts[int(rng.integers(len(parts)))]
                if not part.path.exists():
                    continue
                content = bytearray(part.path.read_bytes())
                how = ("flip", "cut", "gone")[int(rng.choice(3, p=[0.7, 0.2, 0.1]))]
                told.append(f"{how} {kind} {part.path.name} {part.label}")
                if how == "gone":
                    part.path.unlink()
                    continue
                if how == "cut":
                    content = content[: int(rng.integers(len(content)))]
                else:
                    # An earlier cut may have left fewer bytes.
                    at = int(rng.choice(part.offsets)) % max(1, len(content))
                    content[at : at + 1] = bytes(byte ^ 0x55 for byte in content[at : at + 1])
                part.path.write_bytes(content)
        args = ("store", "repair", "--config", work.settings(root), "--k-txt", "0")
        wrong = ""
        if number % 2:
            point = POINTS[number // 2 % len(POINTS)]
            attack = dies_at(point, int(rng.integers(1, 6)), SIGNALS[number % 3])
            ended = command(*args, attack=attack).wait()
            if "Traceback" in ended.err:
                wrong = f"killed {point}: {ended.err[-300:]}"
            told.append(f"repair killed {point}")
            figures.outcomes["killed in the repair" if ended.code else "ended before"] += 1
        ended = command(*args).wait()
        wrong = wrong or (ended.err[-300:] if ended.code else "")
        outcome = "repaired, the values that it had"
        for kind in ("vit", "text"):
            folder = work.features(root, kind)
            if not wrong and verify_folder(folder).problems:
                wrong = f"{kind}: not sound"
            if not wrong and live_values(folder).keys() < wanted[kind].keys():
                # What went together with the manifest is missing, as never extracted.
                outcome = "repaired, what was lost with its manifest extracted"
                k_txt = ("--k-txt", "0") if kind == "text" else ()
                command(f"extract-{kind}", "--config", args[3], *k_txt).wait()
            if not wrong and live_values(folder) != wanted[kind]:
                wrong = f"{kind}: other values"
        figures.add(outcome, wrong and f"{', '.join(told)}: {wrong}")
        shutil.rmtree(root)
    return figures


def forked(campaign: Callable[..., Figures], *args: Any) -> Figures:
    """Run a campaign in a process of its own: a crash of a library is a figure, not the end."""
    ended = start(lambda: print(json.dumps(campaign(*args).to_dict()))).wait()
    if ended.code:
        return Figures(campaign.__name__, 1, wrong=[f"exit {ended.code}: {ended.err[-500:]}"])
    found = json.loads(ended.out)
    return Figures(**{**found, "outcomes": collections.Counter(found["outcomes"])})


def show(figures: Figures, seconds: float) -> None:
    print(f"{figures.name}: {figures.tried} tried, {len(figures.wrong)} wrong ({seconds:.0f} s)")
    for outcome, number in sorted(figures.outcomes.items()):
        print(f"    {number:6d}  {outcome}")
    for line in figures.wrong[:10]:
        print(f"    WRONG   {line}")
    sys.stdout.flush()


def main(arguments: list[str] | None = None) -> int:
    """Run the campaigns; return how many results were wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("flips", 2000),
        ("cuts", 200),
        ("kills", 100),
        ("trainings", 12),
        ("searches", 6),
        ("images", 300),
        ("starts", 20),
        ("repairs", 12),
        ("disks", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help="0: none")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    import_framework()
    tried = wrong = 0
    with tempfile.TemporaryDirectory(prefix="campaign-") as name:
        work = make_work(Path(name))
        folders = [work.features(work.reference, kind) for kind in ("vit", "text")]
        folders.append(work.features(work.quantised))
        seed = chosen.seed
        for count, campaign in (
            (chosen.flips, lambda n: forked(flips, folders, n, seed)),
            (chosen.cuts, lambda n: forked(cuts, folders, n, seed)),
            (chosen.images, lambda n: broken_photos(work, n, seed)),
            (chosen.repairs, lambda n: repairs(work, n, seed)),
            (chosen.disks, lambda n: file_systems(work, n)),
            (chosen.starts, lambda n: concurrent_starts(work, n, seed)),
            (chosen.kills, lambda n: kill_extractions(work, n, seed)),
            (chosen.trainings, lambda n: kill_trainings(work, n, seed)),
            (chosen.searches, lambda n: kill_searches(work, n, seed)),
        ):
            if count:
                started = time.perf_counter()
                figures = campaign(count)
                show(figures, time.perf_counter() - started)
                tried += figures.tried
                wrong += len(figures.wrong)
    print(f"{tried} tried, {wrong} wrong in all")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
