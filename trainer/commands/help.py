"""`--help`: whole sentences, the settings under their sections, each with its default."""

from __future__ import annotations

import dataclasses
import functools
import os
import typing
from collections.abc import Callable, Sequence
from typing import Any

import click

from featstore.progress import showing
from featstore.settings import hints, plain_path
from trainer.commands.showing import quiet_option, shows

_hints = functools.cache(hints)
# Sections of other files than `featstore.toml`.
FILES = {"search": "the --space file"}


class PathType(click.Path):
    """A path as typed, but for `..` inside it and double slashes."""

    def convert(
        self, value: Any, param: click.Parameter | None, context: click.Context | None
    ) -> Any:
        """Return the path's plain form; nothing stays nothing."""
        found = super().convert(value, param, context)
        return plain_path(os.fsdecode(found)) if found else found


PATH = PathType()


def lone(values: tuple[Any, ...]) -> Any:
    """Return what a flag that may be repeated was given: nothing, one value, or several."""
    return values if len(values) > 1 else next(iter(values), None)


class SettingOption(click.Option):
    """One setting as a flag.

    Args:
        section: Its section.
        field: What declares it.
        hint: Its type.
        flag: Its flag, where it is not the setting's name.
    """

    def __init__(
        self,
        declarations: Sequence[str],
        *,
        section: str,
        field: dataclasses.Field[Any],
        hint: Any,
        **options: Any,
    ) -> None:
        self.section, self.field = section, field
        meta = field.metadata
        if meta["choices"] and not holds_tuple(hint):
            options["type"] = click.Choice(meta["choices"])
        elif meta["path"]:
            # Several files: the flag is repeated.
            options |= {"type": PATH, "multiple": holds_tuple(hint)}
        else:
            options["type"] = hint if hint in (int, float, bool) else str
        if meta["words"] is not None:
            options["metavar"] = "|".join(("NAME=NUMBER,...", *meta["words"]))
        text = meta["help"]
        options |= {"default": None, "help": f"{text[0].upper()}{text[1:]}."}
        super().__init__(declarations, **options)

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        """Return None where a flag that may be repeated was not given, and one value as it is."""
        found = super().type_cast_value(ctx, value)
        return lone(found) if self.multiple else found

    def get_help_extra(self, ctx: click.Context) -> Any:
        """Return what stands in brackets: the default, the demo's own, the bounds."""
        # Here, since `demo` is above the settings that every command declares.
        from featstore import demo

        extra = super().get_help_extra(ctx)
        default, meta = self.field.default, self.field.metadata
        extra["default"] = self._typed(default)
        own = demo.SETTINGS.get(self.section, {}).get(self.field.name, default)
        if own != default:
            extra["default"] += f"; the demo's: {'its own' if meta['preset'] else self._typed(own)}"
        low, above, high = meta["minimum"], meta["above"], meta["maximum"]
        if high is not None:
            extra["range"] = f"{above}<x<={high}" if low is None else f"{low}<=x<={high}"
        elif low is not None:
            extra["range"] = f"x>={low}"
        elif above is not None:
            extra["range"] = f"x>{above}"
        return extra

    def _typed(self, value: Any) -> str:
        """Return a value as it is given with the flag."""
        if isinstance(value, bool):
            return (self.opts if value else self.secondary_opts)[0].lstrip("-")
        if isinstance(value, tuple):
            return ",".join(map(self._typed, value)) or "none"
        return f"{value:g}" if isinstance(value, float) else str(value) or "none"


def holds_tuple(hint: Any) -> bool:
    """Tell whether a setting may be a list."""
    return any(typing.get_origin(kind) is tuple for kind in (hint, *typing.get_args(hint)))


def setting_option(
    section: str, kind: type, name: str, flag: str | None = None
) -> Callable[[Any], Any]:
    """Return the decorator that gives a command one setting as a flag.

    Args:
        section: Its section.
        kind: The section's dataclass.
        name: The setting; the command gets it as `section__name`.
        flag: Its flag, where it is not the setting's name.
    """
    (field,) = (field for field in dataclasses.fields(kind) if field.name == name)
    hint = _hints(kind)[name]
    flag = flag or field.metadata["flag"] or f"--{name.replace('_', '-')}"
    if hint is bool:
        flag = f"{flag}/--no-{flag[2:]}"
    return click.option(
        flag, f"{section}__{name}", cls=SettingOption, section=section, field=field, hint=hint
    )


class Sectioned(click.Command):
    """A command whose help has its own options first, then the settings by section.

    Each that can be run alone has `--quiet`, and shows what is waited for.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self, click.Group) or self.invoke_without_command:
            self.params.append(quiet_option())

    def invoke(self, ctx: click.Context) -> Any:
        """Run it; what it waits for is shown as the options say."""
        with showing(shows(ctx)):
            return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, a block for each section."""
        blocks: dict[str, list[tuple[str, str]]] = {"Options": []}
        for param in self.get_params(ctx):
            title = "Options"
            if isinstance(param, SettingOption):
                file = FILES.get(param.section, "featstore.toml")
                title = f"Settings, [{param.section}] of {file}"
            record = None if isinstance(param, click.Argument) else param.get_help_record(ctx)
            if record is not None:
                blocks.setdefault(title, []).append(record)
        for title, records in blocks.items():
            with formatter.section(title):
                formatter.write_dl(records)
        if isinstance(self, click.Group):
            self.format_commands(ctx, formatter)

    def get_short_help_str(self, limit: int = 0) -> str:
        """Return the whole first sentence; it is broken into lines, not cut."""
        return super().get_short_help_str(1000)


class SectionedGroup(Sectioned, click.Group):
    """A group of such commands."""

    command_class = Sectioned


def command(name: str | None = None, **options: Any) -> Callable[[Any], Any]:
    """Make a command with such help; as `click.command`."""
    return click.command(name, cls=Sectioned, **options)
