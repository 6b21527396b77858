"""`store`: info, verify, repair, gc and export."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from featstore.config import SPLITS
from featstore.errors import StoreError, counted, shown
from featstore.progress import working
from featstore.quantities import size
from trainer.commands.answer import answer, json_option, warn
from trainer.commands.console import (
    LIBRARIES,
    Function,
    import_framework,
    print_error,
    read_config,
    runs_option,
    settings,
    split_option,
    typed,
)
from trainer.commands.help import PATH, SectionedGroup, setting_option
from trainer.commands.showing import note, show_of
from trainer.config import TrainConfig

if TYPE_CHECKING:
    from featstore.api import Project


@click.group("store", cls=SectionedGroup)
def store_group() -> None:
    """Look after the stored features: what is there, is it whole, what can go."""


def _store_options(command: Function) -> Function:
    for name in ("views", "k_vit", "k_txt"):
        command = setting_option("train", TrainConfig, name)(command)
    return json_option(settings("data", "encoders", "store")(command))


def _kind_option(*choices: str) -> Callable[[Function], Function]:
    return click.option(
        "--kind",
        type=click.Choice(choices),
        default=choices[0],
        show_default=True,
        help="Features of which encoder.",
    )


def _project(config_file: str | None, flags: dict[str, Any]) -> Project:
    config = read_config(config_file, flags)
    with working(LIBRARIES):
        from featstore.api import Project

    return Project(config, file=config_file)


def _kinds(kind: str) -> tuple[str, ...]:
    return ("vit", "text") if kind == "all" else (kind,)


def _print_keys(keys: list[str]) -> None:
    if keys:
        more = f" … and {len(keys) - 20} more (--json names all)" if len(keys) > 20 else ""
        click.echo(f"    {', '.join(map(repr, keys[:20]))}{more}")


def _print_info(found: dict[str, Any]) -> None:
    for entry in found["features"]:
        mark = "  asked for by the configuration" if entry["asked_for"] else ""
        names = ", ".join(entry["names"]) or "unknown preset"
        click.echo(f"{entry['kind']:4} {entry['fingerprint']}  {names}{mark}")
        if entry["shards"] is not None:
            click.echo(f"     {size(entry['bytes'])} in {counted(entry['shards'], 'shard')}")
        if entry["damaged"]:
            click.echo(f"     damaged: {entry['damaged']}")
            continue
        unit = counted(entry["tokens"], "token")
        unit += " in all" if entry["kind"] == "text" else " a row"
        click.echo(
            f"     boundary {entry['boundary']} of {entry['layers']}, {unit} × {entry['width']}"
            f" {entry['dtype']}"
        )
        if view := entry["view"]:
            click.echo(f"     photometric view {view['number']} of seed {view['seed']}")
        click.echo(
            f"     {counted(entry['rows'], 'row')}, {entry['superseded_rows']} superseded,"
            f" {entry['stale_rows']} stale, {entry['quarantined']} quarantined"
        )
        if (cut := entry["cut"]) and (cut["cut"] or cut["uncounted"]):
            more = f", {cut['uncounted']} more may be" if cut["uncounted"] else ""
            named = f"; all in {cut['file']}" if cut["cut"] else ""
            click.echo(
                f"     {cut['cut']} of {cut['sentences']} sentences cut at sequence_length"
                f" {cut['sequence_length']}{more}{named}"
            )
    for split, counts in (found["coverage"] or {}).items():
        parts = [
            f"{counts[f'{what}s_with_features']} of {counted(counts[f'{what}s'], what)}"
            for what in ("image", "sentence")
            if f"{what}s" in counts
        ]
        viewed = counts.get("images_under_all_views")
        more = "" if viewed is None else f"; under all views {counted(viewed, 'image')}"
        click.echo(f"{split:5} with features: {', '.join(parts)}{more}")
    for name in ("splits", "reports"):
        files = counted(found[name]["files"], "file")
        click.echo(f"{name}: {files}, {size(found[name]['bytes'])}")


@store_group.command("info")
@_store_options
def store_info(as_json: bool, config_file: str | None, **flags: Any) -> None:
    """Show what is stored, and what of it the configuration asks for."""
    found = _project(config_file, flags).info()
    if as_json:
        answer(found)
    else:
        _print_info(found)
    for problem in found["problems"]:
        warn(problem, "note: ")


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
    project = _project(config_file, flags)
    reports = project.verify(
        kinds=_kinds(kind), mine=mine, sample=sample, photos=photos, show=show_of(as_json)
    )
    problems = sum(len(report.problems) for report in reports)
    if as_json:
        found = [report.to_dict(typed) for report in reports]
        answer({"sound": not problems, "sample": sample, "folders": found})
    else:
        for report in reports:
            count = len(report.problems)
            verdict = counted(count, "problem") if count else "sound"
            share = f"{report.checked_rows} of {counted(report.rows, 'row')} checked"
            if sample is not None:
                share += " (a sample; without --sample every byte is)"
            click.echo(f"{report.folder}: {verdict}; {counted(report.shards, 'shard')}, {share}")
            for problem in report.problems:
                click.echo(f"  {problem.path}: {problem.what}: {problem.detail}")
                _print_keys(list(problem.keys))
                click.echo(f"    mend: {shown(problem.mend, typed)}")
            for note in report.notes:
                click.echo(f"  note: {shown(note, typed)}")
        if not reports:
            click.echo("no features are stored")
    if problems:
        damaged = sum(bool(report.problems) for report in reports)
        raise StoreError(
            f"{counted(problems, 'problem')} in {damaged} of"
            f" {counted(len(reports), 'folder')} of features"
        )


@store_group.command("repair")
@_kind_option("all", "vit", "text")
@click.option("--dry-run", is_flag=True, help="Print what would be done; change nothing.")
@_store_options
def store_repair(
    kind: str, dry_run: bool, as_json: bool, config_file: str | None, **flags: Any
) -> None:
    """Mend what verify finds: damaged rows are computed again, the others are kept."""
    project = _project(config_file, flags)
    if not dry_run:
        import_framework()
    reports = project.repair(kinds=_kinds(kind), dry_run=dry_run, show=show_of(as_json))
    if as_json:
        found = [report.to_dict() for report in reports]
        answer({"dry_run": dry_run, "folders": found})
    for report in reports if not as_json else []:
        for action in report.actions:
            click.echo(action)
        if report.restored:
            click.echo(
                f"{report.folder}: {counted(report.restored, 'row')} computed again,"
                f" {report.identical} with the bits that they had"
            )
        if report.dropped:
            click.echo(
                f"{report.folder}: {counted(len(report.dropped), 'known row')} could not be kept"
            )
            _print_keys(report.dropped)
        if report.extracted:
            click.echo(f"{report.folder}: {counted(report.extracted, 'row')} extracted")
        for key, reason in list(report.failed.items())[:5]:
            click.echo(f"quarantined {key}: {reason}", err=True)
    if not as_json and not any(report.actions or report.left for report in reports):
        click.echo("nothing to mend")
    left = [error for report in reports for error in report.left]
    for error in left:
        print_error(error)
    if left:
        click.get_current_context().exit(1)


@store_group.command("gc")
@click.option("--yes", is_flag=True, help="Delete what is listed.")
@click.option(
    "--forget",
    multiple=True,
    metavar="PATH",
    help="A user of the store, by its path, that is gone for good: it needs nothing.",
)
@click.option(
    "--unrecorded", is_flag=True, help="Features whose users were never recorded can go too."
)
@runs_option
@_store_options
def store_gc(
    yes: bool,
    forget: tuple[str, ...],
    unrecorded: bool,
    runs: str,
    as_json: bool,
    config_file: str | None,
    **flags: Any,
) -> None:
    """List what neither the configuration, a run, nor another user of the store needs.

    The store keeps a list of its users: configurations, and folders of runs. What one of them
    needs is kept, also where it cannot be found; --forget names one that is gone for good.
    """
    project = _project(config_file, flags)
    found = project.garbage(runs, yes, forget, unrecorded)
    if as_json:
        answer(found.to_dict())
        return
    for item in found.garbage:
        click.echo(f"{size(item.bytes):>12}  {item.what}: {item.path} ({item.detail})")
    for path in found.unknown:
        click.echo(f"{'unknown':>12}  {path}: not written by this program; never deleted")
    for line in (*(shown(reason, typed) for reason in found.notes), *found.kept):
        note(f"kept: {line}")
    total = size(sum(item.bytes for item in (found.deleted if yes else found.garbage)))
    click.echo(f"{total} deleted" if yes else f"{total} can go; --yes deletes it")


@store_group.command("export")
@click.option("--out", type=PATH, required=True, help="File to write, .npy or .parquet.")
@_kind_option("vit", "text")
@split_option("stored", "all", *SPLITS)
@_store_options
def store_export(
    out: str, kind: str, split: str, as_json: bool, config_file: str | None, **flags: Any
) -> None:
    """Write the configuration's features to one file for other tools."""
    found = _project(config_file, flags).dump(out, kind, split=split, show=show_of(as_json))
    if as_json:
        answer(found)
        return
    shape = " × ".join(map(str, found["shape"]))
    click.echo(
        f"{', '.join(found['files'])}: {counted(found['rows'], 'row')}, {shape} {found['dtype']},"
        f" {size(found['bytes'])}"
    )
    if found["quarantined"]:
        warn(f"{counted(found['quarantined'], 'quarantined input')} left out")
