"""Run a recipe: each stage once, whatever was done before; then one table of all.

A stage that is finished is not trained again, one that was stopped goes on. What the encoders
give is extracted once for all stages.

runs/<recipe>/
    <stage>/         the run or the search of each stage
    recipe.json      what the table says, stage by stage
    summary.md       the table
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featstore.errors import Advice, UsageError, counted
from featstore.extract.plan import Plan
from featstore.progress import SHOWN, Show, shows_work
from featstore.project import Project
from featstore.publish import (
    MAKE_ROOM,
    check_kept,
    command_line,
    package_versions,
    why_not_kept,
    write_json,
    write_text,
)
from trainer import api
from trainer.config import Config, with_sections
from trainer.recipes.recipe import Recipe, Stage, read_recipe
from trainer.recipes.table import as_markdown, measured_figures, stage_row
from trainer.results.predictions_file import format_of, opened_for
from trainer.results.score import check_same_data
from trainer.run.training import Reporter
from trainer.tuning.drive import SearchResults, load_search, plan_features, search
from trainer.tuning.search_file import exists
from trainer.tuning.space_file import read_space


@dataclass
class Outcome:
    """What a recipe came to.

    Attributes:
        recipe: The recipe.
        stages: Of each stage that was run, its run or its search.
        rows: Of each of them the table's row, see `trainer.recipes.table.stage_row`.
    """

    recipe: Recipe
    stages: dict[str, api.Run | SearchResults]
    rows: list[dict[str, Any]]

    def __repr__(self) -> str:
        return f"<Recipe {str(self.recipe.folder)!r}: {counted(len(self.rows), 'stage')} done>"

    @property
    def table(self) -> str:
        """The table as Markdown."""
        return as_markdown(self.rows)


@shows_work
def run_recipe(
    path: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | None = None,
    runs: str | os.PathLike[str] | None = None,
    until: str | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    reporter: Reporter | None = None,
    stopping: Callable[[], bool] = lambda: False,
    show: Show = SHOWN,
) -> Outcome:
    """Run a recipe's stages, those that are not done yet.

    Args:
        path: The recipe's file, see `trainer.recipes.recipe`.
        config: Settings below the recipe's own; None: `featstore.toml` of the working
            directory, where there is one.
        runs: Folder of the runs; None: the configuration's.
        until: The last stage to run; None: all.
        overrides: Section to key to value, for all stages.
        reporter: How the epochs of runs are shown; None: as the commands do.
        stopping: Asked all the time; True has what runs save and end.
        show: How the rest is shown.

    Raises:
        ConfigError: The recipe or a setting is wrong.
        UsageError: A stage was run with other settings, or `until` is no stage.
        StoppedError: `stopping` said so; the same call goes on.
        FeatstoreError: What `trainer.train` and `trainer.search` raise.
    """
    recipe = read_recipe(path, config, overrides, runs)
    done = Outcome(recipe, {}, [])
    for stage in asked(recipe, until):
        show.note(f"stage {stage.name}")
        settings = settled(stage, done.stages)
        # What a run reads knows its user by the run's own settings.
        project = Project(settings, file=recipe.folder / stage.name / "config.toml")
        if stage.space is not None:
            done.stages[stage.name] = _search(stage, settings, project, recipe, stopping, show)
        else:
            run = _train(stage, settings, project, recipe, done, reporter, stopping, show)
            done.stages[stage.name] = run
            _predict(stage, run, show)
        done.rows.append(stage_row(stage, done.stages[stage.name]))
        _keep(done, show)
    return done


def asked(recipe: Recipe, until: str | None) -> tuple[Stage, ...]:
    """Return the stages up to one.

    Raises:
        UsageError: There is no such stage.
    """
    names = [stage.name for stage in recipe.stages]
    if until is None:
        return recipe.stages
    if until not in names:
        raise UsageError(f"--until {until!r}: no stage of {recipe.file}: {', '.join(names)}")
    return recipe.stages[: names.index(until) + 1]


def settled(stage: Stage, done: Mapping[str, api.Run | SearchResults]) -> Config:
    """Return a stage's settings, with those of the best trial that it takes over.

    These are what the search's space names, searched or fixed, but for what the stage itself sets.

    Raises:
        RunError: The search has no complete trial.
    """
    if stage.settings_from is None:
        return stage.config
    found = done[stage.settings_from]
    assert isinstance(found, SearchResults)
    space, tried = found.search.space, found.best_run.config
    named = {(parameter.section, parameter.key) for parameter in space.parameters}
    named |= {(section, key) for section, values in space.fixed.items() for key in values}
    taken: dict[str, dict[str, Any]] = {}
    for section, key in named:
        if key not in stage.own.get(section, ()):
            taken.setdefault(section, {})[key] = getattr(getattr(tried, section), key)
    return with_sections(stage.config, taken)


@shows_work
def plan(recipe: Recipe, until: str | None = None, show: Show = SHOWN) -> list[dict[str, Any]]:
    """Say what a recipe has to do; change nothing.

    Args:
        recipe: The recipe.
        until: The last stage; None: all.
        show: Its notes have what is to extract, and the time that it takes.

    Returns:
        For each stage `stage`, `kind` ("run" or "search"), `state` ("finished", "begun",
        "to do"), and `to_extract`: of each kind of features that lacks some, what
        `Plan.to_dict` returns.
    """
    found = []
    for stage in asked(recipe, until):
        project, state = Project(stage.config, dry_run=True), state_of(stage, recipe)
        show.note(f"stage {stage.name}: {state}")
        plans: list[Plan] = []
        if state != "finished":
            configs = [stage.config]
            if stage.space is not None:
                space = read_space(stage.space, stage.search, {}, stage.config.is_demo)
                configs = space.feature_configs(space.base(stage.config))
            plans = plan_features(project, configs, show)
        found.append(
            {
                "stage": stage.name,
                "kind": "run" if stage.space is None else "search",
                "state": state,
                "to_extract": [one.to_dict() for one in plans],
            }
        )
    return found


def state_of(stage: Stage, recipe: Recipe) -> str:
    """Return "finished", "begun" or "to do"."""
    folder = recipe.folder / stage.name
    if stage.space is not None:
        if not exists(folder):
            return "to do"
        return "begun" if load_search(folder).search.unfinished else "finished"
    run = api.Run(folder)
    if not run.exists:
        return "to do"
    return "finished" if run.manifest["status"] == "finished" else "begun"


def _train(
    stage: Stage,
    settings: Config,
    project: Project,
    recipe: Recipe,
    done: Outcome,
    reporter: Reporter | None,
    stopping: Callable[[], bool],
    show: Show,
) -> api.Run:
    """Return the stage's run, trained and measured."""
    from trainer.run.shown import reporter_of

    reporter = dataclasses.replace(reporter or reporter_of(show), stopping=stopping)
    source = stage.init_from
    if source in done.stages:
        source = str(recipe.folder / str(source))
    run = api.Run(recipe.folder / stage.name)
    if state_of(stage, recipe) == "finished":
        _check_same(run, settings, source)
        check_same_data(run, project)
    else:
        run = api.train(
            project,
            name=stage.name,
            runs=recipe.folder,
            init_from=source,
            extract=True,
            reporter=reporter,
            show=show,
        )
    if stage.controls:
        run.train_control(reporter, show)
    if stage.test:
        project.extract("vit", "test", views=1, show=show)
    for split in ("val", "test") if stage.test else ("val",):
        _measure(run, split, stage.controls, show)
    return run


def _measure(run: api.Run, split: str, controls: bool, show: Show) -> None:
    """Evaluate a run on a split, unless that was done.

    Raises:
        WriteError: The figures cannot be kept, where the table reads them.
    """
    known = measured_figures(run, split)
    if known is None or (controls and known["gain"] is None):
        not_kept = run.evaluate(split, show=show)["not_kept"]
        mend = Advice(f"{MAKE_ROOM}: it goes on")
        check_kept(f"{run.folder}: measured on {split}, but ", not_kept, mend)


def _check_same(run: api.Run, config: Config, source: str | None) -> None:
    """Refuse a finished stage of other settings or another start.

    Raises:
        UsageError: It has; names them.
    """
    run.check_free_or_same(config, longer=True)
    ours = None if source is None else str(Path(source).resolve())
    theirs = None if run.source is None else str(Path(run.source).resolve())
    if ours != theirs:
        raise UsageError(
            f"{run.folder}: finished, but started from {theirs or 'no run'}, not from"
            f" {ours or 'none'}; give the stage another name, or remove that folder"
        )


def _search(
    stage: Stage,
    settings: Config,
    project: Project,
    recipe: Recipe,
    stopping: Callable[[], bool],
    show: Show,
) -> SearchResults:
    """Return the stage's search, run to its end, its best trial measured."""
    own = stage.own.get("train", frozenset())
    searched = {("search_seed" if key == "seed" else key): v for key, v in stage.search.items()}
    fixed = {key: getattr(settings.train, key) for key in sorted(own)}
    found = search(
        project,
        stage.space,
        name=stage.name,
        runs=recipe.folder,
        init_from=stage.init_from,
        stopping=stopping,
        show=show,
        **searched,
        **fixed,
    )
    _measure(found.best_run, "val", False, show)
    return found


def _predict(stage: Stage, run: api.Run, show: Show) -> None:
    """Write the stage's predictions, unless they are there and newer than the run and the rows."""
    if stage.predict is None:
        return
    out = stage.predict["out"]
    with contextlib.suppress(OSError):
        read = max(path.stat().st_mtime for path in (run.weights_path, stage.predict["rows"]))
        if out.stat().st_mtime >= read:
            return
    out.parent.mkdir(parents=True, exist_ok=True)
    with opened_for(out, format_of(out, None)) as write:
        found = run.predictions(stage.predict["rows"], stage.predict.get("images"), show)
        write(found.lines())
    show.note(f"{out}: {counted(found.summary()['rows'], 'row')}")


def _keep(done: Outcome, show: Show) -> None:
    """Write the table as it is so far."""
    about = {"command": command_line(), "versions": package_versions()}
    folder = done.recipe.folder

    def write() -> None:
        write_json(folder / "recipe.json", {**about, "stages": done.rows})
        title = f"# {done.recipe.name}\n\n`{about['command']}`\n\n"
        write_text(folder / "summary.md", f"{title}{done.table}\n")

    if why := why_not_kept(write):
        show.note(f"the table is not kept: {why}")
