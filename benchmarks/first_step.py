"""Seconds from typing `train` to the end of its first step, features present.

The command runs as a user types it, in a process of its own that notes the time after its first
step and ends there. Importing Keras, which no command of this kind can do without, is timed beside
it in a process that does nothing else.

This module imports nothing that the command would not: it runs in the command's process too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

TRAIN = "from benchmarks.first_step import train; train()"
KERAS = "import keras, keras_hub, time; print(time.time())"


def train() -> None:
    """Run the command line of this process; print the time after its first step, and end."""
    from featstore.__main__ import main
    from trainer.run import engine

    def stepper(self: Any, engines: Any, made: Any = engine.Engines.stepper) -> Any:
        found = made(self, engines)
        own = found.train

        def step(batch: Any) -> None:
            float(own(batch)[0])
            print(time.time(), flush=True)
            os._exit(0)

        found.train = step
        return found

    engine.Engines.stepper = stepper  # type: ignore[method-assign]
    main()


def seconds_to_end(program: str, *arguments: str) -> float:
    """Run a program that prints the time at its end; return the seconds from its start to then."""
    command = [sys.executable, "-c", program, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = time.time()
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT
    )
    if done.returncode or not done.stdout:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return float(done.stdout.split()[-1]) - started


def timed(config: Path, runs: Path, layers: Sequence[int], rounds: int) -> dict[str, Any]:
    """Time the command at each k_txt, and the import of Keras beside it.

    Args:
        config: A project whose features are stored.
        runs: Folder of the runs.
        layers: Values of k_txt.
        rounds: After one that is not counted, which reads all files into memory.
    """
    from benchmarks.measuring import spread

    found: dict[str, Any] = {}
    for k_txt in layers:
        whole, keras = [], []
        for number in range(rounds + 1):
            given = ["train", "--config", str(config), "--runs", str(runs), "--k-txt", str(k_txt)]
            keras.append(seconds_to_end(KERAS))
            whole.append(seconds_to_end(TRAIN, *given, "--name", f"{config.stem}-{k_txt}-{number}"))
        less = [one - other for one, other in zip(whole, keras, strict=True)]
        found[str(k_txt)] = {
            name: spread(values[1:], 3)
            for name, values in (("whole", whole), ("keras", keras), ("less_keras", less))
        }
    return found


def measure(
    folder: Path,
    config: Path | None = None,
    layers: Sequence[int] = (0, 3),
    rounds: int = 5,
    size: Any = None,
) -> dict[str, Any]:
    """Time the start of a run on few rows with encoders of a size, and on the user's rows.

    Args:
        folder: Empty; holds all that is made.
        config: The user's project, its features stored; None: none.
        layers: Values of k_txt.
        rounds: Of each.
        size: Of the encoders that are made; None: the study's.
    """
    from benchmarks.sizes import STUDY
    from benchmarks.trials import write_project
    from featstore.project import Project

    size = STUDY if size is None else size
    projects = {f"encoders of the {size.name}'s size": write_project(folder, size, layers)}
    if config is not None:
        projects["your own"] = config
    found = {}
    for number, (name, file) in enumerate(projects.items()):
        rows = len(Project.load(file).usable("train")[0])
        timings = timed(file.resolve(), folder / f"runs-{number}", layers, rounds)
        found[name] = {"train_rows": rows, "k_txt": timings}
    return {"rounds": rounds, "projects": found}


def report(figures: dict[str, Any]) -> str:
    """Return the figures as a Markdown table."""
    from benchmarks.measuring import written
    from benchmarks.tables import table

    rows = [
        [
            f"{name}, {project['train_rows']:,} rows",
            k_txt,
            *(written(found[part], " s", 1) for part in ("whole", "keras", "less_keras")),
        ]
        for name, project in figures["projects"].items()
        for k_txt, found in project["k_txt"].items()
    ]
    header = ["project", "k_txt", "to the end of its first step", "importing Keras", "the rest"]
    note = f"From typing `train` to its first step, features present, {figures['rounds']} rounds."
    return f"{note}\n\n{table(header, rows)}"
