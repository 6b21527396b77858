"""Command line: parse, call, print.

Heavy packages are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from featstore.config import SPLITS, hints
from featstore.errors import FeatstoreError, RunError, StoppedError, UsageError
from trainer.config import CONTROLS, DEFAULT_FILE, SECTIONS, Config, load_config, render_config
from trainer.search_space import SearchConfig, read_space

# Said before TensorFlow is imported: it reads them then.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

Command = Callable[..., Any]

BAR_SECONDS, LOGGED_BAR_SECONDS = 0.1, 30.0


def _import_framework() -> None:
    """Import Keras and its backend without the lines that they print at start.

    They come from compiled code, so the file descriptor itself is turned away;
    where the import fails, what was printed is shown.
    """
    if "keras" in sys.modules:
        return
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as hidden:
        os.dup2(hidden.fileno(), 2)
        try:
            import keras_hub  # noqa: F401
        except Exception:
            hidden.seek(0)
            os.write(kept, hidden.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _print_error(message: str) -> None:
    click.echo(f"error: {' '.join(message.split())}", err=True)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


class Commands(click.Group):
    """Reports every expected error as one line and its exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Parse and run; leave with the exit code."""
        try:
            result = super().main(*args, **{**kwargs, "standalone_mode": False})
        except click.ClickException as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # click 8.2 and later
                error.show()
                sys.exit(error.exit_code)
            context = getattr(error, "ctx", None)
            mend = f"; see `{context.command_path} --help`" if context else ""
            _print_error(error.format_message().rstrip(".") + mend)
            sys.exit(error.exit_code)
        sys.exit(result if isinstance(result, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        earlier = signal.signal(signal.SIGTERM, _interrupt)
        try:
            return super().invoke(ctx)
        except StoppedError as error:
            click.echo(str(error), err=True)
            ctx.exit(error.exit_code)
        except FeatstoreError as error:
            _print_error(str(error))
            ctx.exit(error.exit_code)
        except BrokenPipeError:
            # The reader of our output has seen enough; click leaves quietly.
            raise
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            _print_error(f"{where}{error.strerror or error}")
            ctx.exit(1)
        except (KeyboardInterrupt, click.Abort):
            click.echo("stopped; what was published is kept, the same command goes on", err=True)
            ctx.exit(130)
        finally:
            signal.signal(signal.SIGTERM, earlier)


def settings(*sections: str) -> Callable[[Command], Command]:
    """Give a command `--config` and one flag for each setting of some sections."""

    def add(command: Command) -> Command:
        for name in reversed(sections):
            section = SECTIONS[name]
            types = hints(section)
            for field in reversed(dataclasses.fields(section)):
                meta, kind = field.metadata, types[field.name]
                option_type: Any = kind if kind in (int, float) else str
                if meta["choices"]:
                    option_type = click.Choice(meta["choices"])
                command = click.option(
                    f"--{field.name.replace('_', '-')}",
                    f"{name}__{field.name}",
                    type=option_type,
                    help=f"{meta['help']}  [{name}]",
                )(command)
        return click.option(
            "--config", "config_file", type=click.Path(), help=f"settings  [{DEFAULT_FILE}]"
        )(command)

    return add


def _config(config_file: str | None, flags: dict[str, Any]) -> Config:
    """Read the settings with the flags that were given."""
    overrides: dict[str, dict[str, Any]] = {}
    for key, value in flags.items():
        if value is None:
            continue
        section, _, name = key.partition("__")
        if name == "fractions":
            try:
                value = [float(part) for part in value.split(",")]
            except ValueError as error:
                raise UsageError(
                    f"--fractions {value!r}: expected three numbers, such as 0.8,0.1,0.1"
                ) from error
        overrides.setdefault(section, {})[name] = value
    config = load_config(config_file, overrides)
    if config.is_demo:
        click.echo(
            "no [data] rows set: this is the built-in demo (rendered scenes, its own encoders);"
            " `init` writes a file for your data",
            err=True,
        )
    return config


def _bar_seconds() -> float:
    """Return how often a progress bar is drawn: rarely where it becomes lines of a log."""
    return BAR_SECONDS if sys.stderr.isatty() else LOGGED_BAR_SECONDS


@contextlib.contextmanager
def _bar(total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Show rows done, rows a second and the time that is left, on stderr."""
    from tqdm import tqdm

    with tqdm(total=total, unit=unit, smoothing=0.1, mininterval=_bar_seconds()) as bar:

        def advance(rows: int) -> None:
            bar.update(rows)

        yield advance


def _halved(size: int) -> None:
    click.echo(f"out of memory: going on with batches of {size}", err=True)


def _print_rows(dataset: Any) -> None:
    counts = dataset.counts()
    rows = ", ".join(f"{split} {n}" for split, n in counts["rows"].items())
    click.echo(f"rows: {rows}", err=True)
    for title, reasons in (
        ("left out", counts["dropped"]),
        ("kept with a warning", counts["kept_with_warning"]),
    ):
        if reasons:
            found = ", ".join(f"{n} {reason}" for reason, n in reasons.items())
            click.echo(f"rows {title}: {found} (named in {dataset.report})", err=True)


def _print_plan(plan: dict[str, Any], rate: float, as_json: bool) -> None:
    seconds = plan["todo"] / rate if plan["todo"] else 0.0
    plan = {**plan, "rows_per_second": round(rate, 2), "estimated_seconds": round(seconds, 1)}
    if as_json:
        click.echo(json.dumps(plan))
        return
    click.echo(f"features     {plan['folder']}")
    click.echo(f"asked for    {plan['requested']}")
    changed = f" ({plan['changed']} because the photo changed)" if plan["changed"] else ""
    click.echo(f"stored       {plan['cached']}")
    click.echo(f"quarantined  {plan['quarantined']}")
    click.echo(f"to do        {plan['todo']}{changed}")
    click.echo(
        f"disk         {plan['todo_bytes'] / 1e6:.1f} MB of {plan['free_bytes'] / 1e9:.1f} GB free"
    )
    if plan["todo"]:
        click.echo(f"time         about {seconds / 60:.1f} min at {rate:.1f} rows/s")


def _print_summary(plan: Any, summary: Any, as_json: bool, unit: str) -> None:
    result = {
        **plan.to_dict(),
        "extracted": summary.extracted,
        "failed": summary.failed,
        "seconds": round(summary.seconds, 3),
        "rows_per_second": round(summary.rows_per_second, 2),
        "batch_size": summary.batch_size,
    }
    if as_json:
        click.echo(json.dumps(result))
        return
    done = f"{summary.extracted} {unit} extracted" if plan.keys else f"nothing to do: {unit}"
    speed = f" in {summary.seconds:.1f} s ({summary.rows_per_second:.1f}/s)" if plan.keys else ""
    click.echo(f"{done}{speed}, {plan.cached} were stored already; {plan.folder}")
    for key, reason in list(summary.failed.items())[:5]:
        click.echo(f"quarantined {key}: {reason}", err=True)
    unread = len(summary.failed) + plan.quarantined
    if unread:
        click.echo(f"{unread} quarantined; reasons in {plan.folder / 'quarantine.json'}", err=True)


def _split_option(*choices: str) -> Callable[[Command], Command]:
    return click.option(
        "--split", type=click.Choice(choices), default=choices[0], show_default=True
    )


def _json_option(command: Command) -> Command:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(command)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Pay for the frozen encoders once, then search fast on their features."""


@cli.command()
@click.option("--config", "config_file", default=DEFAULT_FILE, show_default=True)
@click.option("--force", is_flag=True, help="Replace the file if there is one.")
def init(config_file: str, force: bool) -> None:
    """Write a commented settings file."""
    from featstore.publish import write_text

    path = Path(config_file)
    if path.exists() and not force:
        raise UsageError(f"{path}: there already; --force replaces it")
    write_text(path, render_config(Config(), comments=True, defaults=False))
    click.echo(f"{path}: set rows and images in [data], then run `python cli.py extract-vit`")


@cli.command("extract-vit")
@_split_option("all", *SPLITS)
@click.option("--dry-run", is_flag=True, help="Print what there is to do; change nothing.")
@_json_option
@settings("data", "encoders", "store")
def extract_vit(
    split: str, dry_run: bool, as_json: bool, config_file: str | None, **flags: Any
) -> None:
    """Run the frozen vision encoder once for each photo of a split."""
    config = _config(config_file, flags)
    from featstore.dataset import load_dataset
    from featstore.extract import bring_images

    dataset = load_dataset(config.data, Path(config.store.root), save=not dry_run)
    _print_rows(dataset)
    ids = dataset.examples.image_ids[dataset.rows(split)].tolist()
    _import_framework()
    if dry_run:
        from featstore.extract import estimate_images

        plan, rate = estimate_images(config.encoders, config.store, ids, dataset.images)
        _print_plan(plan.to_dict(), rate, as_json)
        return
    plan, summary = bring_images(
        config.encoders,
        config.store,
        ids,
        dataset.images,
        lambda total: _bar(total, " images"),
        _halved,
    )
    _print_summary(plan, summary, as_json, "images")


@cli.command("extract-text")
@_split_option("all", *SPLITS)
@click.option("--k-txt", "train__k_txt", type=int, help="last text layers that will train")
@click.option("--dry-run", is_flag=True, help="Print what there is to do; change nothing.")
@_json_option
@settings("data", "encoders", "store")
def extract_text(
    split: str, dry_run: bool, as_json: bool, config_file: str | None, **flags: Any
) -> None:
    """Run the frozen text layers once for each sentence of a split."""
    config = _config(config_file, flags)
    from featstore.dataset import load_dataset
    from featstore.extract import bring_text

    dataset = load_dataset(config.data, Path(config.store.root), save=not dry_run)
    _print_rows(dataset)
    sentences = dataset.examples.hypotheses[dataset.rows(split)].tolist()
    k_txt = config.train.k_txt
    _import_framework()
    if dry_run:
        from featstore.extract import estimate_text

        plan, rate = estimate_text(config.encoders, config.store, sentences, k_txt)
        _print_plan(plan.to_dict(), rate, as_json)
        return
    plan, summary = bring_text(
        config.encoders,
        config.store,
        sentences,
        k_txt,
        lambda total: _bar(total, " sentences"),
        _halved,
    )
    _print_summary(plan, summary, as_json, "sentences")


def _runs_option(command: Command) -> Command:
    return click.option(
        "--runs", "runs", default="runs", show_default=True, help="Folder of the runs."
    )(command)


def _free_name(runs: Path, k_txt: int) -> str:
    stem = f"k{k_txt}-{time.strftime('%Y%m%d-%H%M%S')}"
    name, number = stem, 1
    while (runs / name).exists():
        number += 1
        name = f"{stem}-{number}"
    return name


@contextlib.contextmanager
def _stop_request() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a question; a second Ctrl-C ends at once."""
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True

    earlier = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _epoch_bar(epoch: int, steps: int) -> Iterator[Any]:
    from tqdm import tqdm

    with tqdm(
        total=steps,
        desc=f"epoch {epoch}",
        unit=" steps",
        leave=False,
        mininterval=_bar_seconds(),
        disable=None,
    ) as bar:
        yield bar


def _print_epoch(record: dict[str, Any]) -> None:
    click.echo(
        f"epoch {record['epoch']}: loss {record['loss']:.4f}, val loss {record['val_loss']:.4f},"
        f" accuracy {record['val_accuracy']:.2%}, macro-F1 {record['val_macro_f1']:.2%}"
        f" at τ {record['threshold']:.2f}; {record['seconds']:.1f} s",
        err=True,
    )


def _print_metrics(result: dict[str, Any]) -> None:
    at, half = result["at_threshold"], result["at_half"]
    auc = "undefined" if result["auc"] is None else f"{result['auc']:.4f}"
    click.echo(
        f"{result['split']}: {result['rows']} rows ({result['entailment']} entailment,"
        f" {result['contradiction']} contradiction), loss {result['loss']:.4f}, AUC {auc}"
    )
    click.echo(f"{'threshold':>16} {'accuracy':>9} {'macro-F1':>9}   tp    fp    fn    tn")
    for name, found in ((f"τ = {result['threshold']:.2f}", at), ("0.50", half)):
        counts = " ".join(f"{found[key]:5d}" for key in ("tp", "fp", "fn", "tn"))
        click.echo(f"{name:>16} {found['accuracy']:9.2%} {found['macro_f1']:9.2%} {counts}")


@cli.command()
@click.option("--name", help="Name of the run; an unfinished run of that name goes on.")
@click.option("--init-from", help="Run to take the head and shared text layers from.")
@click.option("--plain", is_flag=True, help="Plain Keras layers without XLA: slow, same numbers.")
@_runs_option
@_json_option
@settings("data", "encoders", "store", "train")
def train(
    name: str | None,
    init_from: str | None,
    plain: bool,
    runs: str,
    as_json: bool,
    config_file: str | None,
    **flags: Any,
) -> None:
    """Train the fusion head and the last text layers on cached features."""
    config = _config(config_file, flags)
    from trainer.run import Run, find_run, run_folder

    source = find_run(Path(runs), init_from) if init_from else None
    run = Run(
        run_folder(Path(runs), _free_name(Path(runs), config.train.k_txt) if name is None else name)
    )
    from featstore.dataset import load_dataset
    from trainer.features import open_features

    run.check_free_or_same(config)
    dataset = load_dataset(config.data, Path(config.store.root))
    _print_rows(dataset)
    _import_framework()
    features = open_features(config, dataset, lambda total: _bar(total, " sentences"))
    from trainer.fit import Reporter, Training

    with run.writing(), _stop_request() as stopping:
        run.check_free_or_same(config)
        training = Training(
            run,
            features,
            source,
            Reporter(_epoch_bar, _print_epoch, stopping),
            compiled=not plain,
            fast=not plain,
        )
        if not as_json:
            count = training.manifest["parameters"]["trainable"]
            click.echo(f"run {run.folder}: {count:,} trainable parameters", err=True)
        metrics = training.fit()
    if as_json:
        click.echo(json.dumps({"run": str(run.folder), **metrics}))
        return
    click.echo(f"best epoch {metrics['epoch']} by {metrics['monitor']}; {run.folder}")
    _print_metrics(metrics)
    if config.train.control != "none":
        click.echo(f"control: {config.train.control}")


@cli.command()
@click.argument("run")
@_split_option("test", "val", "train")
@click.option(
    "--control", type=click.Choice(CONTROLS), help="What to show it.  [default: as in training]"
)
@_runs_option
@_json_option
def evaluate(run: str, split: str, control: str | None, runs: str, as_json: bool) -> None:
    """Measure a run on a split, at its own threshold."""
    from trainer.run import find_run

    found = find_run(Path(runs), run)
    control = control or found.config().train.control
    _import_framework()
    from trainer.evaluate import evaluate as measure
    from trainer.evaluate import open_run_features

    features = open_run_features(found, lambda total: _bar(total, " sentences"))
    result = measure(found, features, split, control)
    if as_json:
        click.echo(json.dumps(result))
        return
    if control != "none":
        click.echo(f"control: {control}")
    _print_metrics(result)
    if result["quarantined_photos"]:
        left = result["rows_of_split"] - result["rows"]
        click.echo(f"{left} rows left out: their photos could not be read", err=True)


def _print_parity(result: dict[str, Any]) -> None:
    click.echo(
        f"{result['split']}: {result['rows']} of {result['rows_of_split']} rows, stored in"
        f" {result['stored_dtype']}"
    )

    def shown(value: float | None) -> str:
        return "not finite" if value is None else f"{value:.2e}"

    click.echo(f"{'':>20} {'largest':>10} {'mean':>10} {'largest/tol.':>12}  met  tolerance")
    for found in result["quantities"].values():
        largest, mean = shown(found["largest"]), shown(found["mean"])
        over, met = shown(found["largest_over_tolerance"]), "yes" if found["met"] else "NO"
        click.echo(
            f"{found['name']:>20} {largest:>10} {mean:>10} {over:>12}  {met:>3}"
            f"  {found['tolerance']}"
        )
    recorded, differing = result["recorded_loss"], result["predictions"]
    loss = "not finite" if recorded["found"] is None else f"{recorded['found']:.6f}"
    click.echo(
        f"{recorded['name']:>20} {recorded['expected']:.6f}, now {loss}"
        f" over {recorded['rows']} rows; {'met' if recorded['met'] else 'NOT met'}"
        f" ({recorded['tolerance']:.1e})"
    )
    click.echo(f"{'predictions':>20} {len(differing)} differ at τ = {result['threshold']:.2f}")
    for row in differing:
        click.echo(
            f"{row['image_id']!r}, {row['hypothesis']!r}: logit {row['cached_logit']:.4f} cached,"
            f" {row['end_to_end_logit']:.4f} end to end, threshold {row['threshold_logit']:.4f}"
        )
    for path, found in result["metrics"].items():
        figures = "not finite"
        if found is not None:
            figures = f"accuracy {found['accuracy']:.2%}, macro-F1 {found['macro_f1']:.2%}"
        click.echo(f"{path.replace('_', ' '):>20} {figures}")
    for note in result["notes"]:
        click.echo(f"note: {note}")


@cli.command()
@click.argument("run")
@click.option(
    "--rows",
    "count",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Rows drawn from the split.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Decides which rows."
)
@_split_option("test", "val", "train")
@_runs_option
@_json_option
def parity(run: str, count: int, seed: int, split: str, runs: str, as_json: bool) -> None:
    """Prove that a run equals the end-to-end model, from the photos' bytes on."""
    from trainer.run import find_run

    found = find_run(Path(runs), run)
    _import_framework()
    from trainer.parity import check_parity

    result = check_parity(
        found,
        split,
        count,
        seed,
        lambda total: _bar(total, " sentences"),
        lambda total: _bar(total, " rows"),
    )
    if as_json:
        click.echo(json.dumps(result))
    else:
        _print_parity(result)
    if result["failure"]:
        raise RunError(result["failure"])


def _search_options(command: Command) -> Command:
    """Give a command one flag for each setting of `[search]`."""
    types = hints(SearchConfig)
    for field in reversed(dataclasses.fields(SearchConfig)):
        meta = field.metadata
        kind: Any = click.Choice(meta["choices"]) if meta["choices"] else types[field.name]
        # `--seed` is a run's.
        name = "search-seed" if field.name == "seed" else field.name
        flag = f"--{name}"
        option = click.option(flag, f"search__{field.name}", type=kind, help=meta["help"])
        command = option(command)
    return command


def _flag_sections(flags: dict[str, Any]) -> dict[str, dict[str, Any]]:
    sections: dict[str, dict[str, Any]] = {}
    for key, value in flags.items():
        if value is not None:
            section, _, name = key.partition("__")
            sections.setdefault(section, {})[name] = value
    return sections


@cli.group("search", invoke_without_command=True)
@click.option("--space", "space_file", type=click.Path(), help="What to vary (TOML).")
@click.option("--name", help="Name of the search; one of that name goes on.")
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--timeout", type=click.FloatRange(min=0), help="Seconds after which none starts.")
@click.option("--init-from", help="Run that every trial starts from.")
@click.option("--storage", help="Database URL for many machines, such as postgresql://….")
@click.option("--dry-run", is_flag=True, help="Print what there is to do; change nothing.")
@_runs_option
@_json_option
@_search_options
@settings("data", "encoders", "store", "train")
@click.pass_context
def search_group(
    context: click.Context,
    space_file: str | None,
    name: str | None,
    workers: int,
    timeout: float | None,
    init_from: str | None,
    storage: str | None,
    dry_run: bool,
    runs: str,
    as_json: bool,
    config_file: str | None,
    **flags: Any,
) -> None:
    """Search settings: many trials over one store, drawn by Optuna.

    Without --space, the reference study's own space. A search goes on by its
    name, with no other settings.
    """
    if context.invoked_subcommand is not None:
        return
    from trainer.run import find_run, run_folder
    from trainer.search import exists

    started = time.time()
    name = name or f"search-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = run_folder(Path(runs), name)
    search_flags = {
        key.removeprefix("search__"): flags.pop(key)
        for key in list(flags)
        if key.startswith("search__")
    }
    search_flags = {key: value for key, value in search_flags.items() if value is not None}
    given = _flag_sections(flags)
    goes_on = space_file is None and config_file is None and init_from is None and not given
    source: Any
    if exists(folder) and goes_on:
        from trainer.search import known_search

        base, space, source = known_search(folder, search_flags)
    else:
        config = _config(config_file, flags)
        file = None if space_file is None else Path(space_file)
        space = read_space(file, search_flags, given, config.is_demo)
        base = space.base(config)
        source = find_run(Path(runs), init_from) if init_from else None
    from featstore.dataset import load_dataset

    dataset = load_dataset(base.data, Path(base.store.root), save=not dry_run)
    _print_rows(dataset)
    _extract_for_search(dataset, space.feature_configs(base), dry_run)
    if dry_run:
        click.echo(f"{space.trials} trials of {', '.join(p.name for p in space.parameters)}")
        return
    from trainer.leaderboard import best_row, trial_rows, write_leaderboard
    from trainer.search import start_search
    from trainer.workers import run_workers

    search = start_search(folder, base, space, source, storage, dataset)
    deadline = float("inf") if timeout is None else started + timeout
    with _stop_request() as stopping:
        from trainer.live import live_view

        with live_view(search, workers) as watch:
            watched = run_workers(search, workers, deadline, stopping, watch)
    files = write_leaderboard(search)
    rows = trial_rows(search)
    if as_json:
        found = {
            "search": str(folder),
            "best": best_row(search, rows),
            "trials": rows,
            "seconds": round(time.time() - started, 3),
            "workers": workers,
            "peak_memory_bytes": watched.peak_bytes,
            "worker_deaths": watched.deaths,
        }
        click.echo(json.dumps(found))
    else:
        _print_leaderboard(search, rows)
        click.echo(f"{', '.join(str(path) for path in files)}")
        click.echo(f"workers' memory at most {watched.peak_bytes / 1e9:.1f} GB", err=True)
        place = storage if storage else search.folder / "study.journal"
        click.echo(f"see it: optuna-dashboard {place}", err=True)
        click.echo(f"        tensorboard --logdir {search.folder}", err=True)
    if best_row(search, rows) is None and rows:
        reasons = {row["reason"] for row in rows if row["reason"]}
        raise RunError(f"{folder}: no trial ended well ({'; '.join(sorted(reasons)[:3])})")


def _extract_for_search(dataset: Any, configs: list[Any], dry_run: bool) -> None:
    """Extract what the trials will read, with an estimate first."""
    from trainer.search import missing_features

    for missing in missing_features(dataset, configs):
        _import_framework()
        from featstore import extract

        config, k_txt = missing.config, missing.config.train.k_txt
        estimate: Any
        bring: Any
        inputs: Any
        if missing.kind == "images":
            what, bar = "images", lambda total: _bar(total, " images")
            inputs = (config.encoders, config.store, missing.inputs, dataset.images)
            estimate, bring = extract.estimate_images, extract.bring_images
        else:
            what, bar = f"sentences at k_txt {k_txt}", lambda total: _bar(total, " sentences")
            inputs = (config.encoders, config.store, missing.inputs, k_txt)
            estimate, bring = extract.estimate_text, extract.bring_text
        plan, rate = estimate(*inputs)
        click.echo(
            f"to extract: {len(plan.keys)} {what}, about {len(plan.keys) / rate / 60:.1f} min,"
            f" {plan.to_dict()['todo_bytes'] / 1e6:.1f} MB in {plan.folder}",
            err=True,
        )
        if not dry_run:
            bring(*inputs, bar, _halved)


def _print_leaderboard(search: Any, rows: list[dict[str, Any]]) -> None:
    from trainer.leaderboard import ranked, shown

    names = [parameter.name for parameter in search.space.parameters]
    metric = search.space.search.metric
    header = ["trial", "state", metric, "epoch", "seconds", *names]
    lines = [header]
    for row in ranked(search, rows):
        value = "" if row["value"] is None else f"{row['value']:.4f}"
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f}"
        epoch = str(row["best_epoch"] or row["epoch"])
        params = [shown(row["params"].get(name, "")) for name in names]
        lines.append([row["run"], row["state"], value, epoch, seconds, *params])
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        cells = [cell.ljust(w) for cell, w in zip(line, widths, strict=True)]
        click.echo("  ".join(cells).rstrip())
    for row in rows:
        if row["reason"]:
            click.echo(f"{row['run']}: {row['reason']}", err=True)


def _known_search(runs: str, name: str, storage: str | None) -> Any:
    from trainer.run import run_folder
    from trainer.search import open_search

    return open_search(run_folder(Path(runs), name), storage)


@search_group.command("show")
@click.argument("name")
@click.option("--storage", help="Database URL, where the search has one.")
@_runs_option
@_json_option
def search_show(name: str, storage: str | None, runs: str, as_json: bool) -> None:
    """Print a search's leaderboard, also while it runs; write its plots."""
    from trainer.leaderboard import ranked, trial_rows, write_leaderboard

    search = _known_search(runs, name, storage)
    rows = trial_rows(search)
    files = write_leaderboard(search)
    if as_json:
        click.echo(json.dumps({"search": name, "trials": ranked(search, rows)}))
        return
    _print_leaderboard(search, rows)
    click.echo(", ".join(str(path) for path in files))


@search_group.command("best")
@click.argument("name")
@click.option("--epochs", type=click.IntRange(min=1), help="Train it again for so many epochs.")
@click.option("--seeds", type=click.IntRange(min=1), help="Train it again with so many seeds.")
@click.option("--storage", help="Database URL, where the search has one.")
@_split_option("val", "test")
@_runs_option
@_json_option
def search_best(
    name: str,
    epochs: int | None,
    seeds: int | None,
    storage: str | None,
    split: str,
    runs: str,
    as_json: bool,
) -> None:
    """Show the best trial; train it again with more epochs or seeds."""
    search = _known_search(runs, name, storage)
    from trainer.leaderboard import best_row, shown, trial_rows

    best = best_row(search, trial_rows(search))
    if best is None:
        raise RunError(f"{search.folder}: no trial is complete yet")
    if epochs is None and seeds is None:
        if as_json:
            click.echo(json.dumps(best))
            return
        params = ", ".join(f"{key} {shown(value)}" for key, value in best["params"].items())
        click.echo(f"{search.run_of(best['trial']).folder}: {params}")
        click.echo(
            f"{search.space.search.metric} {best['value']:.4f} in epoch {best['best_epoch']},"
            f" accuracy {best['val_accuracy']:.2%}, τ {best['threshold']:.2f}"
        )
        return
    _import_framework()
    from trainer.fit import Reporter
    from trainer.retrain import retrain

    with _stop_request() as stopping:
        found = retrain(
            search, best, epochs, seeds or 1, split, Reporter(_epoch_bar, _print_epoch, stopping)
        )
    if as_json:
        click.echo(json.dumps(found))
        return
    for run in found["runs"]:
        click.echo(f"{run['run']}: accuracy {run['accuracy']:.2%}, macro-F1 {run['macro_f1']:.2%}")
    for figure in ("accuracy", "macro_f1"):
        mean, deviation = found[figure]["mean"], found[figure]["deviation"]
        spread = "" if deviation is None else f" ± {deviation:.2%}"
        click.echo(f"{split} {figure.replace('_', '-')}: {mean:.2%}{spread}")


@cli.group("store")
def store_group() -> None:
    """Look after the stored features: what is there, is it whole, what can go."""


def _store_options(command: Command) -> Command:
    k_txt = click.option("--k-txt", "train__k_txt", type=int, help="last text layers that train")
    return _json_option(k_txt(settings("data", "encoders", "store")(command)))


def _kind_option(*choices: str) -> Callable[[Command], Command]:
    return click.option("--kind", type=click.Choice(choices), default=choices[0], show_default=True)


def _source(config_file: str | None, flags: dict[str, Any]) -> Any:
    config = _config(config_file, flags)
    from featstore.maintain import Source

    return Source(config.data, config.encoders, config.store, config.train.k_txt)


def _kinds(kind: str) -> tuple[str, ...]:
    return ("vit", "text") if kind == "all" else (kind,)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _print_keys(keys: list[str]) -> None:
    if keys:
        more = f" … and {len(keys) - 20} more (--json names all)" if len(keys) > 20 else ""
        click.echo(f"    {', '.join(map(repr, keys[:20]))}{more}")


def _print_info(found: dict[str, Any]) -> None:
    for entry in found["features"]:
        mark = "  asked for by the configuration" if entry["asked_for"] else ""
        names = ", ".join(entry["names"]) or "unknown preset"
        click.echo(f"{entry['kind']:4} {entry['fingerprint']}  {names}{mark}")
        click.echo(f"     {_megabytes(entry['bytes'])} in {entry['shards']} shards")
        if entry["damaged"]:
            click.echo(f"     damaged: {entry['damaged']}")
            continue
        unit = f"{entry['tokens']} tokens" + (" in all" if entry["kind"] == "text" else " a row")
        click.echo(
            f"     boundary {entry['boundary']} of {entry['layers']}, {unit} × {entry['width']}"
            f" {entry['dtype']}"
        )
        click.echo(
            f"     {entry['rows']} rows, {entry['superseded_rows']} superseded,"
            f" {entry['stale_rows']} stale, {entry['quarantined']} quarantined"
        )
    for split, counts in (found["coverage"] or {}).items():
        parts = [
            f"{counts[f'{what}_with_features']} of {counts[what]} {what}"
            for what in ("images", "sentences")
            if what in counts
        ]
        click.echo(f"{split:5} {', '.join(parts)} have features")
    for name in ("splits", "reports"):
        click.echo(f"{name}: {found[name]['files']} files, {_megabytes(found[name]['bytes'])}")
    for problem in found["problems"]:
        click.echo(f"note: {problem}", err=True)


@store_group.command("info")
@_store_options
def store_info(as_json: bool, config_file: str | None, **flags: Any) -> None:
    """Show what is stored, and what of it the configuration asks for."""
    source = _source(config_file, flags)
    from featstore.maintain import describe_store

    found = describe_store(source)
    click.echo(json.dumps(found)) if as_json else _print_info(found)


@store_group.command("verify")
@_kind_option("all", "vit", "text")
@click.option("--mine", is_flag=True, help="Only the features that the configuration asks for.")
@click.option("--sample", type=click.IntRange(min=1), help="Check that many random rows instead.")
@click.option(
    "--source", "photos", is_flag=True, help="Compare the photos with their features' source too."
)
@_store_options
def store_verify(
    kind: str,
    mine: bool,
    sample: int | None,
    photos: bool,
    as_json: bool,
    config_file: str | None,
    **flags: Any,
) -> None:
    """Check every byte of the stored features; exit 1 if any is not as it was written."""
    source = _source(config_file, flags)
    from featstore.verify import verify_store

    reports = verify_store(
        source, _kinds(kind), mine, sample, photos, lambda total: _bar(total, " MiB")
    )
    if as_json:
        sound = not any(report.problems for report in reports)
        found = [report.to_dict() for report in reports]
        click.echo(json.dumps({"sound": sound, "sample": sample, "folders": found}))
    else:
        for report in reports:
            verdict = f"{len(report.problems)} problems" if report.problems else "sound"
            share = f"{report.checked_rows} of {report.rows} rows checked"
            if sample is not None:
                share += " (a sample; without --sample every byte is)"
            click.echo(f"{report.folder}: {verdict}; {report.shards} shards, {share}")
            for problem in report.problems:
                click.echo(f"  {problem.path}: {problem.what}: {problem.detail}")
                _print_keys(list(problem.keys))
                click.echo(f"    mend: {problem.mend}")
            for note in report.notes:
                click.echo(f"  note: {note}")
        if not reports:
            click.echo("no features are stored")
    if any(report.problems for report in reports):
        click.get_current_context().exit(1)


@store_group.command("repair")
@_kind_option("all", "vit", "text")
@click.option("--dry-run", is_flag=True, help="Print what would be done; change nothing.")
@_store_options
def store_repair(
    kind: str, dry_run: bool, as_json: bool, config_file: str | None, **flags: Any
) -> None:
    """Mend what verify finds: damaged rows are computed again, the others are kept."""
    source = _source(config_file, flags)
    if not dry_run:
        _import_framework()
    from featstore.repair import repair_store

    reports = repair_store(source, _kinds(kind), lambda total: _bar(total, " rows"), dry_run)
    if as_json:
        found = [report.to_dict() for report in reports]
        click.echo(json.dumps({"dry_run": dry_run, "folders": found}))
    for report in reports if not as_json else []:
        for action in report.actions:
            click.echo(action)
        if report.restored:
            click.echo(
                f"{report.folder}: {report.restored} rows computed again, {report.identical} with"
                " the bits that they had"
            )
        if report.dropped:
            click.echo(f"{report.folder}: {len(report.dropped)} known rows could not be kept")
            _print_keys(report.dropped)
        if report.extracted:
            click.echo(f"{report.folder}: {report.extracted} rows extracted")
        for key, reason in list(report.failed.items())[:5]:
            click.echo(f"quarantined {key}: {reason}", err=True)
    if not as_json and not any(report.actions or report.left for report in reports):
        click.echo("nothing to mend")
    left = [line for report in reports for line in report.left]
    for line in left:
        _print_error(line)
    if left:
        click.get_current_context().exit(1)


@store_group.command("gc")
@click.option("--yes", is_flag=True, help="Delete what is listed.")
@_runs_option
@_store_options
def store_gc(yes: bool, runs: str, as_json: bool, config_file: str | None, **flags: Any) -> None:
    """List what neither the configuration nor a run needs; delete it with --yes."""
    source = _source(config_file, flags)
    from featstore.collect import delete, find_garbage

    found = find_garbage(source, Path(runs))
    if yes:
        delete(found)
    if as_json:
        click.echo(json.dumps(found.to_dict()))
        return
    for item in found.garbage:
        click.echo(f"{_megabytes(item.bytes):>12}  {item.what}: {item.path} ({item.detail})")
    for path in found.unknown:
        click.echo(f"{'unknown':>12}  {path}: not written by this program; never deleted")
    for line in (*found.notes, *found.kept):
        click.echo(f"kept: {line}", err=True)
    total = _megabytes(sum(item.bytes for item in (found.deleted if yes else found.garbage)))
    click.echo(f"{total} deleted" if yes else f"{total} can go; --yes deletes it")


@store_group.command("export")
@click.option("--out", required=True, help="FILE.npy or FILE.parquet.")
@_kind_option("vit", "text")
@_split_option("stored", "all", *SPLITS)
@_store_options
def store_export(
    out: str, kind: str, split: str, as_json: bool, config_file: str | None, **flags: Any
) -> None:
    """Write the configuration's features to one file for other tools."""
    source = _source(config_file, flags)
    from featstore.export import export_features

    found = export_features(source, kind, Path(out), split, lambda total: _bar(total, " rows"))
    if as_json:
        click.echo(json.dumps(found))
        return
    shape = " × ".join(map(str, found["shape"]))
    click.echo(
        f"{', '.join(found['files'])}: {found['rows']} rows, {shape} {found['dtype']},"
        f" {_megabytes(found['bytes'])}"
    )
    if found["quarantined"]:
        click.echo(f"{found['quarantined']} quarantined inputs left out", err=True)


def main() -> None:
    """Run the command line."""
    cli.main(prog_name=Path(sys.argv[0]).name)


if __name__ == "__main__":
    main()
