"""What the commands share: settings as flags, errors as one line, bars, stopping."""

from __future__ import annotations

import _thread
import contextlib
import dataclasses
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featstore.config import DEFAULT_FILE, runs_folder
from featstore.errors import (
    Advice,
    Command,
    FeatstoreError,
    StoppedError,
    UsageError,
)
from featstore.progress import working
from trainer.commands.answer import Answer, fail
from trainer.commands.help import PATH, SectionedGroup, lone, setting_option
from trainer.commands.printed import print_rows
from trainer.commands.showing import note
from trainer.config import SECTIONS, Config, load_config
from trainer.unused import refuse_unused, unused

if TYPE_CHECKING:
    from featstore.project import Project
    from trainer.api import Run

Function = Callable[..., Any]

# Keys of what a command that a message names is typed with.
SETTINGS, PLACES = "featstore.settings", "featstore.places"
# Of where a run's data are now, by the names of `load_run` and by flag.
ELSEWHERE, GIVEN, CONFIG = "featstore.elsewhere", "featstore.given", "featstore.config"
ELSEWHERE_FLAGS = (
    ("--config", "config", "Settings that say where the run's data and store are now."),
    ("--root", "root", "Folder of the run's store."),
    ("--data-rows", "rows", "The run's own row file; repeated for several."),
    ("--data-images", "images", "Folder of the run's own photos."),
    ("--split-file", "split_file", "The run's own split file."),
)
# What a setting of `extract-vit` and others is called.
SETTING_FLAGS = {"--data-rows": "--rows", "--data-images": "--images"}


# Settings that are lists, typed with commas.
LISTS: dict[str, Callable[[str], Any]] = {
    "fractions": float,
    "row_weights": float,
    "label_names": str,
    "to": str,
}
# After which an interrupt that was dropped comes again.
AGAIN_SECONDS = 0.01
# Said while what the commands stand on is imported.
LIBRARIES = "loading the libraries"
NUMBERS = {"fractions": "0.8,0.1,0.1", "row_weights": "2,1"}


def import_framework() -> None:
    """Import Keras and its backend, where a command needs them; loading this module does not.

    Raises:
        UsageError: The backend is neither TensorFlow nor JAX, or is missing.
    """
    from featstore.encoders import framework

    framework.import_framework()


def remember_settings(*settings: tuple[str, Any]) -> None:
    """Keep the flags that this command's settings come from, for what people type next."""
    context = click.get_current_context(silent=True)
    if context is not None:
        context.meta[SETTINGS] = settings


def _remember_place(context: click.Context, option: click.Parameter, value: Any) -> Any:
    """Keep where things are, if elsewhere than by default, for what people type next."""
    if value != option.default:
        context.meta[PLACES] = (*context.meta.get(PLACES, ()), (option.opts[0], value))
    return value


def typed(command: Command) -> str:
    """Return a command as the reader of a message would type it.

    It has the name by which this program was called, and those settings in
    force that it takes: without them `extract-vit` would make features of other
    settings than are missing.
    """
    context = click.get_current_context(silent=True)
    if context is None:
        return command.line()
    root = context.find_root()
    target: click.Command = root.command
    for word in command.words:
        if isinstance(target, click.Group):
            target = target.commands.get(word, target)
    known = {flag for option in target.params for flag in option.opts} - {*command.without}
    force = context.meta.get(PLACES, ())
    # A command that reads a run has its settings; another place of its data is still another.
    settings = context.meta.get(GIVEN if reads_run(target) else SETTINGS, ())
    force = force if command.bare else (*settings, *force)
    return command.line(str(root.info_name), *(pair for pair in force if pair[0] in known))


def reads_run(command: click.Command) -> bool:
    """Tell whether a command has `run_options`."""
    return any(str(option.name) == "elsewhere_root" for option in command.params)


def quoted(command: Command) -> str:
    """Return a command as `typed`, in a sentence."""
    return f"`{typed(command)}`"


def print_error(error: FeatstoreError) -> None:
    """Print an expected error as one line; with --json the object has the first one."""
    click.echo(f"error: {' '.join(error.shown(quoted).split())}", err=True)
    fail(error, typed)


def _refused(error: click.ClickException) -> UsageError:
    """Return what click says of a command line as an error of this program's."""
    context = getattr(error, "ctx", None)
    mend = Advice(f"see `{context.command_path} --help`") if context else None
    return UsageError(error.format_message().rstrip("."), mend)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _every_interrupt_heard() -> Iterator[None]:
    """Have an interrupt come again that Python drops, with a traceback, where it cannot raise.

    So it does in a finaliser and in what is called while garbage is collected, as JAX has it.
    """
    earlier = sys.unraisablehook

    def dropped(what: Any) -> None:
        if what.exc_type is KeyboardInterrupt:
            # Later: here it would be dropped once more.
            threading.Timer(AGAIN_SECONDS, _thread.interrupt_main).start()
        else:
            earlier(what)

    sys.unraisablehook = dropped
    try:
        yield
    finally:
        sys.unraisablehook = earlier


class Commands(SectionedGroup):
    """Reports every expected error as one line and its exit code; with --json as an object too."""

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        """Parse and run; leave with the exit code."""
        given = sys.argv[1:] if args is None else list(args)
        # Asked here, so that an error of the command line itself is an object as well.
        answered = Answer(asked="--json" in given)
        try:
            result = super().main(given, **{**kwargs, "standalone_mode": False, "obj": answered})
        except click.ClickException as error:
            # Of the program's own options: there is no context yet, in which to run.
            print_error(_refused(error))
            answered.fail(_refused(error), typed)
            answered.print()
            sys.exit(error.exit_code)
        except click.Abort:
            # While the command line was read.
            stopped = StoppedError("stopped; nothing was begun")
            answered.fail(stopped, typed)
            answered.print()
            sys.exit(_stopped(stopped))
        sys.exit(result if isinstance(result, int) else 0)

    def invoke(self, ctx: click.Context) -> int:
        """Run a command; return its exit code."""
        earlier = signal.signal(signal.SIGTERM, _interrupt)
        try:
            with _every_interrupt_heard():
                code = self._reported(ctx)
        except BrokenPipeError:
            # The reader of our output has seen enough; click leaves quietly.
            raise
        except Exception as error:
            # A defect of ours: its traceback is shown, and a program is told too.
            fail(_unexpected(error), typed)
            ctx.obj.print()
            raise
        finally:
            signal.signal(signal.SIGTERM, earlier)
        try:
            ctx.obj.print()
        except BrokenPipeError:
            raise
        except OSError as error:
            print_error(FeatstoreError(f"standard output: {error.strerror or error}"))
            return code or FeatstoreError.exit_code
        return code

    def _reported(self, ctx: click.Context) -> int:
        """Run a command; report the errors that are expected."""
        try:
            super().invoke(ctx)
        except click.exceptions.Exit as end:
            return end.exit_code
        except click.ClickException as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # click 8.2 and later
                error.show()
            else:
                print_error(_refused(error))
            return error.exit_code
        except StoppedError as error:
            return _stopped(error)
        except FeatstoreError as error:
            print_error(error)
            return error.exit_code
        except BrokenPipeError:
            raise
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            print_error(FeatstoreError(f"{where}{error.strerror or error}"))
            return FeatstoreError.exit_code
        except (KeyboardInterrupt, click.Abort):
            return _stopped(_interrupted())
        except SystemError as error:
            # Compiled code, such as h5py's, that an interrupt ends.
            if not isinstance(error.__cause__ or error.__context__, KeyboardInterrupt):
                raise
            return _stopped(_interrupted())
        return 0


def _interrupted() -> StoppedError:
    return StoppedError("stopped; what was published is kept, the same command goes on")


def _stopped(error: StoppedError) -> int:
    click.echo(error.shown(quoted), err=True)
    fail(error, typed)
    return error.exit_code


def _unexpected(error: Exception) -> FeatstoreError:
    return FeatstoreError(f"unexpected {type(error).__name__}: {error}")


def settings(*sections: str) -> Callable[[Function], Function]:
    """Give a command `--config` and one flag for each setting of some sections."""

    def add(command: Function) -> Function:
        for name in reversed(sections):
            for field in reversed(dataclasses.fields(SECTIONS[name])):
                command = setting_option(name, SECTIONS[name], field.name)(command)
        return click.option(
            "--config",
            "config_file",
            type=PATH,
            # Before --runs, whose default is in it.
            is_eager=True,
            help=f"Settings file; flags win over it.  [default: {DEFAULT_FILE}, if it is there]",
        )(command)

    return add


def _flag(key: str) -> str:
    """Return the flag of a setting as click gives it, `section__key`."""
    section, _, name = key.partition("__")
    (field,) = (field for field in dataclasses.fields(SECTIONS[section]) if field.name == name)
    return str(field.metadata["flag"]) or f"--{name.replace('_', '-')}"


def _given(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that were given."""
    return {key: value for key, value in flags.items() if value is not None}


def flag_sections(flags: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the settings that were given as flags: section to key to value."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in _given(flags).items():
        section, _, name = key.partition("__")
        if name in LISTS:
            try:
                value = [LISTS[name](part.strip()) for part in value.split(",")]
            except ValueError as error:
                raise UsageError(
                    f"{_flag(key)} {value!r}: expected numbers, such as {NUMBERS[name]}"
                ) from error
        sections.setdefault(section, {})[name] = value
    return sections


def read_config(config_file: str | None, flags: dict[str, Any], check: bool = True) -> Config:
    """Read the settings with the flags that were given.

    Args:
        config_file: The settings file.
        flags: Settings as click gives them, `section__key`.
        check: Refuse a flag that has no effect beside the other settings.
    """
    given = [("--config", config_file)] if config_file is not None else []
    given += [(_flag(key), value) for key, value in _given(flags).items()]
    overrides = flag_sections(flags)
    remember_settings(*given)
    config = load_config(config_file, overrides)
    if check:
        # `extract-text` takes a seed of the views, but no --views that could give it an effect.
        able = [one for one in unused(config) if all(f"train__{k}" in flags for k in one.beside)]
        refuse_unused(able, overrides)
    if config.is_demo:
        note(
            "no [data] rows set: this is the built-in demo (rendered scenes, its own encoders);"
            " `init` writes a file for your data"
        )
    return config


def open_project(
    config_file: str | None, flags: dict[str, Any], save: bool = True, check: bool = True
) -> Project:
    """Open what the settings mean, and say how many rows it has.

    Args:
        config_file: The settings file.
        flags: Settings as click gives them, `section__key`.
        save: Write the split and the report of the rows.
        check: See `read_config`.
    """
    config = read_config(config_file, flags, check)
    with working(LIBRARIES):
        from featstore.project import Project

    project = Project(config, dry_run=not save, file=config_file)
    print_rows(project.dataset, named=save and project.save_dataset())
    return project


def split_option(*choices: str) -> Callable[[Function], Function]:
    """Give a command `--split`; the first choice is what it is without."""
    return click.option(
        "--split",
        type=click.Choice(choices),
        default=choices[0],
        show_default=True,
        help="Rows of which split.",
    )


def was_given(option: str) -> bool:
    """Tell whether an option was typed, not left at its default."""
    source = click.get_current_context().get_parameter_source(option)
    return source is click.core.ParameterSource.COMMANDLINE


def draws_option(command: Function) -> Function:
    """Give a command the number of draws that its intervals rest on."""
    return click.option(
        "--draws",
        type=click.IntRange(min=1),
        default=2000,
        show_default=True,
        help="Draws of the bootstrap over images.",
    )(command)


def seed_option(help: str = "Seed of the draws.") -> Callable[[Function], Function]:
    """Give a command `--seed`, of what it draws."""
    return click.option(
        "--seed", type=click.IntRange(min=0), default=0, show_default=True, help=help
    )


def encoding_option(rows: str = "--rows") -> Callable[[Function], Function]:
    """Give a command `--encoding`, of the file that an option names."""
    return click.option(
        "--encoding",
        default="",
        help=f"Text encoding of {rows}, such as gbk.  [default: UTF-8, or told from the bytes]",
    )


def runs_option(command: Function) -> Function:
    """Give a command `--runs`."""
    return click.option(
        "--runs",
        "runs",
        type=PATH,
        callback=_runs,
        help="Folder of the runs.  [default: [runs] folder of the settings, else runs beside them]",
    )(command)


def _runs(context: click.Context, option: click.Parameter, value: str | None) -> str:
    """Return the folder of the runs; one that was given is kept for what people type next."""
    if value is not None:
        return str(_remember_place(context, option, value))
    return str(runs_folder(context.params.get("config_file") or context.meta.get(CONFIG)))


def run_options(command: Function) -> Function:
    """Give a command that reads a run `--runs`, and where the run's data are now.

    `open_run` takes them.
    """
    for flag, place, what in reversed(ELSEWHERE_FLAGS):
        command = click.option(
            flag,
            f"elsewhere_{place}",
            type=PATH,
            expose_value=False,
            multiple=place == "rows",
            is_eager=place == "config",
            callback=_remember_elsewhere,
            help=f"{what}  [default: as recorded by the run]",
        )(command)
    return runs_option(command)


def _remember_elsewhere(context: click.Context, option: click.Parameter, value: Any) -> None:
    if option.multiple:
        value = lone(value)
    if value is not None:
        place = str(option.name).removeprefix("elsewhere_")
        context.meta.setdefault(ELSEWHERE, {})[place] = value
        if place == "config":
            context.meta[CONFIG] = value


def elsewhere() -> dict[str, Any]:
    """Return where this command's runs have their data now, as `trainer.load_run` takes it."""
    return dict(click.get_current_context().meta.get(ELSEWHERE, {}))


@contextlib.contextmanager
def stop_request() -> Iterator[Callable[[], bool]]:
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


def open_run(name: str, runs: str) -> Run:
    """Open a run; what is typed next is typed with its settings."""
    from trainer.run.folder import find_run

    where = elsewhere()
    given = [(flag, where[place]) for flag, place, _ in ELSEWHERE_FLAGS if place in where]
    # What makes features takes the run's own settings, with the places under its own flags.
    own = [(SETTING_FLAGS.get(flag, flag), value) for flag, value in given if flag != "--config"]
    remember_settings(("--config", find_run(Path(runs), name).config_path), *own)
    click.get_current_context().meta[GIVEN] = given
    import_framework()
    with working(LIBRARIES):
        from trainer.api import load_run

    return load_run(name, runs, **where)
