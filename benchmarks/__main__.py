"""`python -m benchmarks NAME`: measure, print, and keep the figures of this machine."""

from __future__ import annotations

import json

import click


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def benchmarks() -> None:
    """Measure the figures that the README quotes."""


@benchmarks.command()
@click.option("--vit", help="Preset; default: ViT-B/16 at 224 with random weights.")
@click.option("--photos", help="Folder of photos; default: synthetic 500×375 JPEGs.")
@click.option("--count", default=256, show_default=True, help="Photos to extract.")
@click.option("--batch-size", default=32, show_default=True)
@click.option("--keep/--no-keep", "kept", default=True, help="Write benchmarks/results.")
def extraction(
    vit: str | None, photos: str | None, count: int, batch_size: int, kept: bool
) -> None:
    """Extraction against the bare compiled forward pass."""
    from benchmarks.extraction import measure
    from benchmarks.results_file import keep

    figures = measure(vit, photos, count, batch_size)
    click.echo(json.dumps(figures, indent=2))
    if kept:
        click.echo(f"kept in {keep('extraction', figures)}")


@benchmarks.command()
@click.option("--rows", default=4096, show_default=True, help="Rows of 196×768 float16.")
@click.option("--rounds", default=7, show_default=True, help="Rounds with each peer.")
@click.option("--scratch", help="Folder for the files; default: the system's temporary one.")
@click.option("--keep/--no-keep", "kept", default=True, help="Write benchmarks/results.")
def loader(rows: int, rounds: int, scratch: str | None, kept: bool) -> None:
    """Random batches of rows against memcpy and other formats; disk: the rows three times."""
    from benchmarks.loader import measure, report
    from benchmarks.results_file import keep

    figures = measure(rows, rounds=rounds, scratch=scratch)
    click.echo(report(figures))
    if kept:
        click.echo(f"kept in {keep('loader', figures)}")


@benchmarks.command()
@click.option("--k-txt", "layers", multiple=True, type=int, default=(0, 2, 3, 6), show_default=True)
@click.option("--rows", default=32, show_default=True, help="Rows of a step.")
@click.option("--length", default=12, show_default=True, help="Tokens of a cached batch.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--keep/--no-keep", "kept", default=True, help="Write benchmarks/results.")
def steps(layers: tuple[int, ...], rows: int, length: int, rounds: int, kept: bool) -> None:
    """One training step, cached against end to end."""
    from benchmarks.results_file import keep
    from benchmarks.steps import measure, report

    figures = measure(list(layers), rows, length, rounds)
    click.echo(report(figures))
    if kept:
        click.echo(f"kept in {keep('steps', figures)}")


if __name__ == "__main__":
    benchmarks(prog_name="python -m benchmarks")
