"""`python -m benchmarks NAME`: measure, print, and keep the figures of this machine.

One file, as it is a list: a command a benchmark, which says its options and calls its module.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

# Said before TensorFlow or JAX is imported: they read them then, as the product has them.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

Command = TypeVar("Command", bound=Callable[..., Any])

ALL_K_TXT = (0, 2, 3, 6)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--results",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(__file__).parent / "results",
    help="Folder of the results files; default: benchmarks/results.",
)
@click.pass_context
def benchmarks(context: click.Context, results: Path) -> None:
    """Measure the figures that the README quotes."""
    context.obj = results


def kept_option(command: Command) -> Command:
    """Add `--keep/--no-keep`."""
    help = "Write the results file."
    return click.option("--keep/--no-keep", "kept", default=True, help=help)(command)


def size_option(command: Command) -> Command:
    """Add `--size`."""
    option = click.option(
        "--size",
        "size_name",
        type=click.Choice(["study", "tiny"]),
        default="study",
        show_default=True,
        help="tiny: a trial of the benchmark itself, whose figures mean nothing.",
    )
    return option(command)


def config_option(command: Command) -> Command:
    """Add `--config`."""
    option = click.option(
        "--config",
        "config_file",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        required=True,
        help="Settings of your rows, photos and presets.",
    )
    return option(command)


def scratch_option(command: Command) -> Command:
    """Add `--scratch`."""
    help = "Folder for the files; default: the system's temporary one."
    return click.option("--scratch", help=help)(command)


def finish(name: str, figures: dict[str, Any], kept: bool) -> None:
    """Print a benchmark's tables and keep its figures."""
    from benchmarks.results_file import keep

    click.echo(report_of(name, figures))
    if kept:
        click.echo(f"kept in {keep(name, figures, click.get_current_context().obj)}")


def report_of(name: str, figures: dict[str, Any]) -> str:
    """Return the tables of figures, by the `report` of the module of that name."""
    return str(importlib.import_module(f"benchmarks.{name}").report(figures))


@benchmarks.command()
@click.option("--vit", help="Preset; default: ViT-B/16 at 224 with random weights.")
@click.option("--photos", help="Folder of photos; default: synthetic 500×375 JPEGs.")
@click.option("--count", default=256, show_default=True, help="Photos to extract.")
@click.option("--batch-size", default=32, show_default=True)
@click.option("--pipeline", is_flag=True, help="What feeds an encoder alone, on 1 and all cores.")
@size_option
@kept_option
def extraction(
    vit: str | None,
    photos: str | None,
    count: int,
    batch_size: int,
    pipeline: bool,
    size_name: str,
    kept: bool,
) -> None:
    """Extraction against the bare compiled forward pass, and what feeds it against Pillow alone."""
    from benchmarks import extraction, feeding
    from benchmarks.sizes import SIZES

    if not pipeline:
        size = SIZES[size_name]
        finish("extraction", extraction.measure(vit, photos, count, batch_size, size=size), kept)
    given = {"count": count, "rounds": 5} if size_name == "study" else {"count": 8, "rounds": 1}
    finish("feeding", feeding.measure(photos, **given), kept)


@benchmarks.command()
@click.option("--rows", default=4096, show_default=True, help="Rows of 196×768 float16.")
@click.option("--rounds", default=7, show_default=True, help="Rounds with each peer.")
@scratch_option
@size_option
@kept_option
def loader(rows: int, rounds: int, scratch: str | None, size_name: str, kept: bool) -> None:
    """Random batches of rows against memcpy and other formats; disk: the rows three times."""
    from benchmarks.loader import measure
    from benchmarks.sizes import SIZES

    size = SIZES[size_name]
    shape: dict[str, Any] = {"row_shape": (size.tokens, size.width), "batch_size": size.rows}
    finish("loader", measure(rows, rounds=rounds, scratch=scratch, **shape), kept)


@benchmarks.command()
@click.option("--k-txt", "layers", multiple=True, type=int, default=ALL_K_TXT, show_default=True)
@click.option("--rows", default=32, show_default=True, help="Rows of a step.")
@click.option(
    "--length", type=int, help="Tokens of every cached batch; default: as an epoch of hypotheses."
)
@click.option("--rounds", default=3, show_default=True)
@size_option
@kept_option
def steps(
    layers: tuple[int, ...],
    rows: int,
    length: int | None,
    rounds: int,
    size_name: str,
    kept: bool,
) -> None:
    """One training step, cached against end to end."""
    from benchmarks.sizes import SIZES
    from benchmarks.steps import measure

    lengths = [length] if length else None
    figures = measure(layers, rows, lengths, rounds, size=SIZES[size_name])
    finish("steps", figures, kept)


@benchmarks.command()
@click.option("--k-txt", "layers", multiple=True, type=int, default=ALL_K_TXT, show_default=True)
@click.option("--length", default=12, show_default=True, help="Tokens of a batch.")
@click.option("--rounds", default=5, show_default=True)
@size_option
@kept_option
def roofline(layers: tuple[int, ...], length: int, rounds: int, size_name: str, kept: bool) -> None:
    """A cached step against what its arithmetic and memory traffic allow."""
    from benchmarks.roofline import measure
    from benchmarks.sizes import SIZES

    size = SIZES[size_name]
    finish("roofline", measure(layers, size.rows, length, rounds, size=size), kept)


@benchmarks.command()
@click.option(
    "--stores",
    multiple=True,
    type=int,
    default=(1024, 4096, 16384, 65536),
    show_default=True,
    help="Rows of a store, ascending.",
)
@click.option("--tokens-side", default=7, show_default=True, help="Root of a row's tokens.")
@click.option("--width", default=192, show_default=True, help="Numbers of a token.")
@click.option("--many", default=1_000_000, show_default=True, help="Rows of the store to open.")
@click.option("--rounds", default=5, show_default=True)
@scratch_option
@size_option
@kept_option
def growth(
    stores: tuple[int, ...],
    tokens_side: int,
    width: int,
    many: int,
    rounds: int,
    scratch: str | None,
    size_name: str,
    kept: bool,
) -> None:
    """Time and memory of training as the store grows; disk: 1.6 GB at the default size."""
    import dataclasses

    from benchmarks.growth import SMALL_ROWS, measure

    size = dataclasses.replace(SMALL_ROWS, image=tokens_side * SMALL_ROWS.patch, width=width)
    given: dict[str, Any] = {"stores": stores, "many": many, "rounds": rounds}
    if size_name == "tiny":
        given = {"stores": (64, 128), "many": 5000, "rounds": 2, "steps": 5}
    finish("growth", measure(size=size, scratch=scratch, **given), kept)


@benchmarks.command()
@click.option(
    "--steps", "step_count", default=1, show_default=True, help="End-to-end steps timed of each."
)
@scratch_option
@size_option
@kept_option
def search(step_count: int, scratch: str | None, size_name: str, kept: bool) -> None:
    """A whole search, extraction included, scaled from a sample; and the break-even."""
    from benchmarks.search import measure
    from benchmarks.sizes import SIZES

    given: dict[str, Any] = {}
    if size_name == "tiny":
        given = {"rows": 160, "images": 80, "photos": 32, "sentences": 40}
    figures = measure(steps=step_count, size=SIZES[size_name], scratch=scratch, **given)
    finish("search", figures, kept)


@benchmarks.command()
@click.option("--rounds", default=3, show_default=True, help="Runs.")
@scratch_option
@size_option
@kept_option
def loop(rounds: int, scratch: str | None, size_name: str, kept: bool) -> None:
    """What the training loop waits for data, and adds to the bare step."""
    from benchmarks.loop import measure
    from benchmarks.sizes import SIZES

    given = {} if size_name == "study" else {"images": 40, "rows": 80}
    figures = measure(rounds=rounds, size=SIZES[size_name], scratch=scratch, **given)
    finish("loop", figures, kept)


@benchmarks.command()
@click.option("--runs", default=8, show_default=True, help="Runs trained together.")
@click.option("--rounds", default=2, show_default=True)
@scratch_option
@size_option
@kept_option
def together(runs: int, rounds: int, scratch: str | None, size_name: str, kept: bool) -> None:
    """Runs trained together against one at a time."""
    from benchmarks.sizes import SIZES
    from benchmarks.together import measure

    given: dict[str, Any] = {"images": 40, "rows": 80, "heads": (2,)}
    if size_name == "study":
        given = {}
    figures = measure(runs, rounds=rounds, size=SIZES[size_name], scratch=scratch, **given)
    finish("together", figures, kept)


@benchmarks.command()
@click.option("--k-txt", "layers", multiple=True, type=int, default=ALL_K_TXT, show_default=True)
@click.option(
    "--batch-size",
    "batch_sizes",
    multiple=True,
    type=int,
    default=(32, 128, 512),
    show_default=True,
)
@click.option(
    "--policy",
    "policies",
    multiple=True,
    type=click.Choice(["float32", "mixed_bfloat16"]),
    default=("float32", "mixed_bfloat16"),
    show_default=True,
)
@click.option("--photos", default=1024, show_default=True, help="Photos to extract; 0: none.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--steps", "step_count", default=50, show_default=True, help="Steps of a round.")
@size_option
@kept_option
def accelerator(
    layers: tuple[int, ...],
    batch_sizes: tuple[int, ...],
    policies: tuple[str, ...],
    photos: int,
    rounds: int,
    step_count: int,
    size_name: str,
    kept: bool,
) -> None:
    """Steps and extraction under KERAS_BACKEND=jax.

    What an earlier run on the same device measured and this one does not is
    kept, so that a long measurement can be made in parts.
    """
    from benchmarks.accelerator import device, measure, merged
    from benchmarks.results_file import file_of, keep
    from benchmarks.results_file import kept as earlier_of
    from benchmarks.sizes import SIZES

    results = click.get_current_context().obj
    earlier = earlier_of(file_of({}, device(), results)).get("accelerator", {}) if kept else {}

    def measured(name: str, figures: dict[str, Any]) -> None:
        click.echo(f"measured {name}", err=True)
        if kept:
            keep("accelerator", merged(earlier, figures), results)

    figures = measure(
        layers,
        batch_sizes,
        policies,
        rounds=rounds,
        steps=step_count,
        photos=photos,
        size=SIZES[size_name],
        progress=measured,
    )
    finish("accelerator", merged(earlier, figures), kept)


@benchmarks.command()
@click.option("--k-txt", "layers", multiple=True, type=int, default=(0, 3, 6), show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--steps", "step_count", default=32, show_default=True, help="Steps of a round.")
@click.option("--photos", default=8, show_default=True, help="Of a forward pass; 0: none.")
@size_option
@kept_option
def backends(
    layers: tuple[int, ...],
    rounds: int,
    step_count: int,
    photos: int,
    size_name: str,
    kept: bool,
) -> None:
    """The same steps and the same encoder on TensorFlow and on JAX."""
    from benchmarks.backends import SMALL, measure
    from benchmarks.sizes import SIZES

    size = SIZES[size_name]
    sizes = (size, SMALL) if size_name == "study" else (size,)
    finish("backends", measure(layers, rounds, step_count, photos, sizes), kept)


@benchmarks.command()
@click.option("--rounds", default=3, show_default=True)
@click.option("--steps", "step_count", default=32, show_default=True, help="Steps of a round.")
@size_option
@kept_option
def threads(rounds: int, step_count: int, size_name: str, kept: bool) -> None:
    """Steps of small models by one thread and by all."""
    from benchmarks import threads
    from benchmarks.sizes import SIZES

    sizes = threads.SIZES if size_name == "study" else [SIZES[size_name]]
    finish("threads", threads.measure(rounds=rounds, steps=step_count, sizes=sizes), kept)


@benchmarks.command(name="study-search")
@click.option(
    "--workers", multiple=True, type=int, default=(1, 2), show_default=True, help="Of a search."
)
@config_option
@kept_option
def study_search(workers: tuple[int, ...], config_file: Path, kept: bool) -> None:
    """The study's search on your rows, by as many workers, against end to end."""
    from benchmarks.study_search import measure

    finish("study_search", measure(config_file, workers), kept)


@benchmarks.command(name="trials")
@click.option(
    "--search",
    "searches",
    multiple=True,
    type=(int, int),
    default=((0, 24), (2, 24), (3, 24), (2, 100)),
    show_default=True,
    help="k_txt and number of trials of a search.",
)
@size_option
@scratch_option
@kept_option
def trials(
    searches: tuple[tuple[int, int], ...], size_name: str, scratch: str | None, kept: bool
) -> None:
    """What a trial costs beside its steps: seconds, bytes on disk, memory of its worker."""
    import tempfile

    from benchmarks.sizes import SIZES
    from benchmarks.trials import measure

    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        finish("trials", measure(Path(folder), searches, SIZES[size_name]), kept)


@benchmarks.command(name="first-step")
@click.option("--k-txt", "layers", multiple=True, type=int, default=(0, 3), show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Settings of rows of yours, whose features are stored, beside the made ones.",
)
@size_option
@scratch_option
@kept_option
def first_step(
    layers: tuple[int, ...],
    rounds: int,
    config_file: Path | None,
    size_name: str,
    scratch: str | None,
    kept: bool,
) -> None:
    """Seconds from the command `train` to the end of its first step, features present."""
    import tempfile

    from benchmarks.first_step import measure
    from benchmarks.sizes import SIZES

    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        figures = measure(Path(folder), config_file, layers, rounds, SIZES[size_name])
    finish("first_step", figures, kept)


@benchmarks.command(name="search-quality")
@click.option("--seeds", default=3, show_default=True, help="Searches of each kind.")
@click.option("--seconds", default=120.0, show_default=True, help="Of all trials of a search.")
@click.option("--epochs", default=4, show_default=True, help="Most epochs of a trial.")
@click.option("--trials", default=1000, show_default=True, help="Most trials of a search.")
@config_option
@kept_option
def search_quality(
    seeds: int, seconds: float, epochs: int, trials: int, config_file: Path, kept: bool
) -> None:
    """Best value for equal wall time on your rows: random, TPE with pruning, halving."""
    from benchmarks.search_quality import measure

    finish("search_quality", measure(config_file, seeds, seconds, epochs, trials), kept)


@benchmarks.command(name="named-objects")
@click.option("--run", required=True, help="Folder of a run on the demo.")
@click.option("--rows", default=300, show_default=True, help="Rows of its test split.")
def named_objects(run: str, rows: int) -> None:
    """Where a run on the demo looks: at the shapes that a sentence names; keeps no figures."""
    from benchmarks.named_objects import measure, report

    click.echo(report(measure(Path(run), rows)))


@benchmarks.command(name="number-formats")
@config_option
@click.option("--rounds", default=7, show_default=True, help="Rounds of reading.")
@scratch_option
@kept_option
def number_formats(config_file: Path, rounds: int, scratch: str | None, kept: bool) -> None:
    """Size, speed and accuracy of float32, float16, bfloat16 and int8 stores of your rows."""
    from benchmarks.number_formats import measure

    finish("number_formats", measure(config_file, rounds=rounds, scratch=scratch), kept)


@benchmarks.command()
@click.pass_context
def scale(context: click.Context) -> None:
    """What 1 million to 1 billion photos would take, from what was measured on this machine."""
    from benchmarks.results_file import file_of, machine
    from benchmarks.results_file import kept as kept_of
    from benchmarks.scale import report

    path = file_of(machine(), results=context.obj)
    try:
        click.echo(report(kept_of(path)))
    except KeyError as error:
        raise click.ClickException(
            f"{path} has no {error}; run `python -m benchmarks all` first"
        ) from error


NEED_MORE = ("accelerator", "named-objects", "study-search", "search-quality", "number-formats")
NOT_IN_ALL = ("all", "tables", "scale", *NEED_MORE)


@benchmarks.command(name="all")
@click.argument("names", nargs=-1)
@size_option
@click.pass_context
def run_all(context: click.Context, names: tuple[str, ...], size_name: str) -> None:
    """Run NAMES, or everything that needs no accelerator and no data of yours, one by one."""
    known = [name for name in benchmarks.commands if name not in NOT_IN_ALL]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise click.UsageError(f"no benchmark {unknown[0]!r}; choose of {', '.join(known)}")
    failed = []
    for name in names or known:
        click.echo(f"\n{name}", err=True)
        command = [sys.executable, "-m", "benchmarks", "--results", str(context.obj), name]
        if any(parameter.name == "size_name" for parameter in benchmarks.commands[name].params):
            command += ["--size", size_name]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    if failed:
        raise click.ClickException(f"failed: {', '.join(failed)}; run each alone to see why")


@benchmarks.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path, exists=True))
@click.pass_context
def tables(context: click.Context, files: tuple[Path, ...]) -> None:
    """Print all tables of FILES, or of every results file, as Markdown."""
    from benchmarks.results_file import kept

    paths = files or tuple(sorted(context.obj.glob("*.json")))
    if not paths:
        raise click.UsageError(f"no results in {context.obj}; run `python -m benchmarks all`")
    for path in paths:
        content = kept(path)
        about = content.pop("machine")
        devices = [figures["device"] for figures in content.values() if "device" in figures]
        title = ", ".join([*devices[:1], about["processor"]])
        click.echo(f"## {title}, {about['cores']} cores, {about['memory_gb']} GB\n")
        # Figures are kept under the name of the module that measures them.
        modules = [command.replace("-", "_") for command in benchmarks.commands]
        modules.insert(modules.index("extraction") + 1, "feeding")
        for name in [module for module in modules if module in content]:
            figures = content[name]
            versions = ", ".join(f"{key} {value}" for key, value in figures["versions"].items())
            click.echo(f"### {name}\n\n`{figures['command']}`; {versions}\n")
            try:
                click.echo(report_of(name, figures) + "\n")
            except KeyError as error:
                raise click.ClickException(
                    f"{path}: {name} has no {error}; it is of another version: run"
                    f" `python -m benchmarks {name}`"
                ) from error


def main() -> None:
    """Run the command line; what went wrong is one line."""
    from featstore.errors import FeatstoreError

    try:
        benchmarks(prog_name="python -m benchmarks")
    except FeatstoreError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
