"""The command line's entry: `featstore`, `python -m featstore`, `python cli.py`.

Heavy packages are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path

import click

from featstore.config import DEFAULT_FILE
from featstore.encoders.framework import in_own_process
from featstore.errors import Command, UsageError
from featstore.publish import program
from trainer.commands.answer import answer, json_option
from trainer.commands.compare import compare
from trainer.commands.console import Commands, quoted
from trainer.commands.eda import eda
from trainer.commands.evaluate import evaluate
from trainer.commands.explain import explain
from trainer.commands.export import export
from trainer.commands.extract import extract_text, extract_vit
from trainer.commands.help import PATH
from trainer.commands.import_ import import_weights
from trainer.commands.parity import parity
from trainer.commands.predict import predict
from trainer.commands.report import report
from trainer.commands.run import run_recipe
from trainer.commands.search import search_group
from trainer.commands.store import store_group
from trainer.commands.streams import show_plainly
from trainer.commands.train import train
from trainer.config import ProjectFile, render_config

# Said before TensorFlow is imported: it reads them then.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(cls=Commands, context_settings=CONTEXT)
@click.version_option(package_name="featstore", message="%(package)s %(version)s")
def cli() -> None:
    """Pay for the frozen encoders once, then search fast on their features."""


@cli.command()
@click.option(
    "--config",
    "config_file",
    type=PATH,
    default=DEFAULT_FILE,
    show_default=True,
    help="File to write.",
)
@click.option("--force", is_flag=True, help="Replace the file if there is one.")
@json_option
def init(config_file: str, force: bool, as_json: bool) -> None:
    """Write a commented settings file for your own data."""
    from featstore.publish import write_text

    path = Path(config_file)
    if path.exists() and not force:
        raise UsageError(f"{path}: there already; --force replaces it")
    write_text(path, render_config(ProjectFile(), comments=True, defaults=False))
    if as_json:
        answer({"config": str(path)})
        return
    shown = click.format_filename(path)
    click.echo(f"{shown}: set rows and images in [data], then run {quoted(Command('extract-vit'))}")


for command in (
    eda,
    extract_vit,
    extract_text,
    train,
    evaluate,
    predict,
    compare,
    report,
    explain,
    parity,
    export,
    import_weights,
    search_group,
    run_recipe,
    store_group,
):
    cli.add_command(command)


def main() -> None:
    """Run the command line."""
    show_plainly()
    in_own_process()
    try:
        cli.main(prog_name=program())
    finally:
        # Or Python looks for circles among all that Keras made: a second or more at the end.
        gc.freeze()
