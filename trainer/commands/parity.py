"""`parity`: a run against the end-to-end model."""

from __future__ import annotations

from typing import Any

import click

from featstore.errors import counted
from featstore.publish import check_kept
from featstore.quantities import both_shares
from trainer.commands.answer import answer, json_option
from trainer.commands.console import open_run, run_options, seed_option, split_option
from trainer.commands.help import command
from trainer.commands.printed import KEPT
from trainer.commands.showing import show_of


def _logit(found: Any) -> str:
    """Write a row's logit, or those of three classes."""
    if isinstance(found, list):
        return f"({', '.join(map(_logit, found))})"
    return "not finite" if found is None else f"{found:.4f}"


def _print_parity(result: dict[str, Any]) -> None:
    click.echo(
        f"{result['split']}: {result['rows']} of {counted(result['rows_of_split'], 'row')},"
        f" stored in {result['stored_dtype']}"
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
        f" over {counted(recorded['rows'], 'row')}; {'met' if recorded['met'] else 'NOT met'}"
        f" ({recorded['tolerance']:.1e})"
    )
    tau = "" if result["threshold"] is None else f" at τ = {result['threshold']:.2f}"
    click.echo(f"{'predictions':>20} {len(differing)} differ{tau}")
    for row in differing:
        cut = row["threshold_logit"]
        click.echo(
            f"{row['image_id']!r}, {row['hypothesis']!r}: logit {_logit(row['cached_logit'])}"
            f" cached, {_logit(row['end_to_end_logit'])} end to end"
            + ("" if cut is None else f", threshold {cut:.4f}")
        )
    for path, found in result["metrics"].items():
        figures = "not finite"
        if found is not None:
            figures = both_shares(found)
        click.echo(f"{path.replace('_', ' '):>20} {figures}")
    for note in result["notes"]:
        click.echo(f"note: {note}")


@command()
@click.argument("run")
@click.option(
    "--rows",
    "count",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Rows drawn from the split.",
)
@seed_option("Seed that decides which rows.")
@split_option("test", "val", "train")
@run_options
@json_option
def parity(run: str, count: int, seed: int, split: str, runs: str, as_json: bool) -> None:
    """Prove that a run equals the end-to-end model, from the photos' bytes on."""
    found = open_run(run, runs)
    from trainer.results.parity import check_parity

    result, failure = check_parity(found, split, count, seed, show_of(as_json))
    if as_json:
        answer(result)
    else:
        _print_parity(result)
    if failure is not None:
        raise failure
    check_kept(KEPT, result["not_kept"])
