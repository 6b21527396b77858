"""Command line: parse, call, print. The commands are in `trainer/commands/`.

Heavy packages are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from featstore.errors import UsageError
from trainer.commands.console import Commands
from trainer.commands.extract import extract_text, extract_vit
from trainer.commands.search import search_group
from trainer.commands.store import store_group
from trainer.commands.train import evaluate, parity, train
from trainer.config import DEFAULT_FILE, Config, render_config

# Said before TensorFlow is imported: it reads them then.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Pay for the frozen encoders once, then search fast on their features."""


@cli.command()
@click.option("--config", "config_file", default=DEFAULT_FILE, show_default=True)
@click.option("--force", is_flag=True, help="Replace the file if there is one.")
def init(config_file: str, force: bool) -> None:
    """Write a commented settings file."""
    from featstore.store.publish import write_text

    path = Path(config_file)
    if path.exists() and not force:
        raise UsageError(f"{path}: there already; --force replaces it")
    write_text(path, render_config(Config(), comments=True, defaults=False))
    click.echo(f"{path}: set rows and images in [data], then run `python cli.py extract-vit`")


for command in (extract_vit, extract_text, train, evaluate, parity, search_group, store_group):
    cli.add_command(command)


def main() -> None:
    """Run the command line."""
    cli.main(prog_name=Path(sys.argv[0]).name)


if __name__ == "__main__":
    main()
