"""`run`: the stages of a recipe, one after the other."""

from __future__ import annotations

from typing import Any

import click

from featstore.errors import counted
from trainer.commands.answer import answer, json_option
from trainer.commands.console import (
    flag_sections,
    import_framework,
    remember_settings,
    runs_option,
    settings,
    stop_request,
)
from trainer.commands.help import PATH, command
from trainer.commands.showing import show_of


@command("run")
@click.argument("recipe", type=PATH)
@click.option("--until", metavar="STAGE", help="Last stage to run.")
@click.option("--dry-run", is_flag=True, help="Print what there is to do; change nothing.")
@runs_option
@json_option
@settings("data", "encoders", "store", "train", "track")
def run_recipe(
    recipe: str,
    until: str | None,
    dry_run: bool,
    runs: str,
    as_json: bool,
    config_file: str | None,
    **flags: Any,
) -> None:
    """Run the stages of a recipe; what is done already is not done again.

    Settings given here are those of all stages.
    """
    if config_file is not None:
        remember_settings(("--config", config_file))
    overrides = flag_sections(flags)
    show = show_of(as_json)
    import_framework()
    from trainer.recipes import chain
    from trainer.recipes.recipe import read_recipe

    if dry_run:
        read = read_recipe(recipe, config_file, overrides, runs)
        stages = chain.plan(read, until, show)
        if as_json:
            answer({"recipe": str(read.folder), "stages": stages})
            return
        for stage in stages:
            missing = ", ".join(
                f"{plan['todo']:,} {plan['kind']} to extract" for plan in stage["to_extract"]
            )
            click.echo(f"{stage['stage']}: {stage['state']}{f' ({missing})' if missing else ''}")
        return
    with stop_request() as stopping:
        done = chain.run_recipe(
            recipe,
            config=config_file,
            runs=runs,
            until=until,
            overrides=overrides,
            stopping=stopping,
            show=show,
        )
    if as_json:
        answer({"recipe": str(done.recipe.folder), "stages": done.rows})
        return
    click.echo(done.table)
    click.echo(f"{counted(len(done.rows), 'stage')}; {done.recipe.folder / 'summary.md'}")
