"""`report`: a run, a search, or runs compared, each on one page to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featstore.errors import RunError, UsageError
from featstore.quantities import size
from trainer.commands.answer import answer, json_option, warn
from trainer.commands.console import elsewhere, import_framework, open_run, run_options
from trainer.commands.help import PATH, command
from trainer.commands.showing import show_of


@command()
@click.argument("name", nargs=-1, required=True)
@click.option("--compare", is_flag=True, help="Compare runs, the first being the base.")
@click.option(
    "--split",
    type=click.Choice(("test", "val", "train")),
    help="Rows of which split.  [default: test; of a run without one, val]",
)
@click.option("--storage", help="Database URL, where a search has one.")
@click.option("--out", type=PATH, help="The page, a name that ends with .html.  [default: beside]")
@click.option("--open", "opens", is_flag=True, help="Open it in the browser.")
@run_options
@json_option
def report(
    name: tuple[str, ...],
    compare: bool,
    split: str | None,
    storage: str | None,
    out: str | None,
    opens: bool,
    runs: str,
    as_json: bool,
) -> None:
    """Write a page of a run, of a search, or with --compare of several runs.

    One HTML file that asks for nothing: figures, tables and photos are in it. What a run holds
    already is not computed again; a run that was not evaluated is.
    """
    show = show_of(as_json)
    found: dict[str, Any]
    if compare:
        if storage is not None:
            raise UsageError("--storage is of a search; --compare takes runs")
        if len(name) < 2:
            raise UsageError(
                f"--compare: expected two runs or more, the base first, found {len(name)}; such as"
                f" `report --compare {name[0]} other`"
            )
        opened = [open_run(one, runs) for one in name]
        from trainer.api import report as report_runs

        found = report_runs(opened, out, split=split or "test", show=show)
    elif len(name) > 1:
        raise UsageError(f"expected one run or search, found {len(name)}; --compare takes several")
    elif _is_search(name[0], runs, storage):
        if split is not None:
            raise UsageError("--split is of a run; a search's figures are of val")
        import_framework()
        from trainer.tuning.drive import load_search

        found = load_search(name[0], runs, storage, **elsewhere()).report(out)
    else:
        found = open_run(name[0], runs).report(out, split, show)
    if as_json:
        answer(found)
    else:
        click.echo(f"{found['kind']} {found['of']}: {found['page']} ({size(found['bytes'])})")
    for note in found["notes"]:
        warn(note)
    if opens:
        click.launch(found["page"])


def _is_search(name: str, runs: str, storage: str | None) -> bool:
    """Tell whether a name is that of a search; what it is must be plain.

    Raises:
        RunError: It is neither, or both.
    """
    from trainer.run.folder import SEARCH_FILE

    places = [Path(name), Path(runs, name)]
    searches = [place for place in places if (place / SEARCH_FILE).exists()]
    found = [place for place in places if (place / "manifest.json").exists()]
    if searches and found:
        raise RunError(
            f"{name}: a search ({searches[0]}) and a run ({found[0]}); name the folder itself, such"
            f" as {Path(searches[0]).resolve()}"
        )
    known = sorted(path.parent.name for path in Path(runs).glob(f"*/{SEARCH_FILE}"))
    if not searches and not found and known:
        others = sorted(path.parent.name for path in Path(runs).glob("*/manifest.json"))
        raise RunError(
            f"{name}: no such run or search in {runs}; searches there: {', '.join(known[-5:])};"
            f" runs: {', '.join(others[-5:]) or 'none'}"
        )
    if storage is not None and not searches:
        raise UsageError(f"--storage is of a search; {name} is none")
    return bool(searches)
