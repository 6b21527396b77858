"""Every error that a user can cause or meet, as one tree.

    FeatstoreError                 exit 1
    ├── UsageError                 exit 2   the command line or a setting is wrong
    │   └── ConfigError            exit 2   featstore.toml: unknown key, wrong type, bad value
    ├── DataError                  exit 1   the user's rows, photos or splits
    │   ├── RowError               exit 1   a row file that cannot be read
    │   ├── SplitError             exit 1   a split that leaks or belongs to other rows
    │   └── ImageError             exit 1   one photo that cannot be decoded
    ├── PresetError                exit 1   an encoder that cannot be loaded or cut
    ├── StoreError                 exit 1   the feature store
    │   ├── MissingFeaturesError   exit 1   features that were never extracted
    │   ├── StaleFeaturesError     exit 1   features of another spec
    │   └── CorruptShardError      exit 1   a shard that is not what was published
    ├── RunError                   exit 1   a run folder that cannot be used
    ├── WriteError                 exit 1   a file that cannot be written: full disk, no right to
    └── StoppedError               exit 130 the user asked to stop; what was done is kept

A message is one line: what failed, where, what was expected, what was found.
What mends it is a value beside the message (`mend`): the console writes its
commands as the reader would type them, with the settings in force.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable

PROGRAM = "featstore"


class Command:
    """A command that a reader may type.

    Args:
        *words: The command and its arguments, such as `"store", "repair"`.
        bare: Only where things are (`--runs`) is added to it when it is shown,
            none of the settings in force.
        without: Options that are not added to it, such as one that was wrong.
        **options: Its options, by their names with `_` for `-`.
    """

    def __init__(
        self, *words: str, bare: bool = False, without: tuple[str, ...] = (), **options: object
    ) -> None:
        self.words, self.bare, self.without = words, bare, without
        self.options = {name.replace("_", "-"): str(value) for name, value in options.items()}

    def line(self, program: str = PROGRAM, *more: tuple[str, object]) -> str:
        """Return it as typed in a shell.

        Args:
            program: How the reader calls this program.
            *more: Options and values to add, those apart that it has already; a tuple's are
                given one by one.
        """
        own_flags = {f"--{name}": [value] for name, value in self.options.items()}
        flags = {
            flag: [str(part) for part in (value if isinstance(value, tuple) else (value,))]
            for flag, value in more
        } | own_flags
        # Its own options first, in their order; then what is added.
        own = [f"--{name}" for name in self.options]
        order = own + [flag for flag in flags if flag not in own]
        given = ((flag, value) for flag in order for value in flags[flag])
        parts = [*self.words, *(part for pair in given for part in pair)]
        return " ".join([program, *map(shlex.quote, parts)])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Command) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(self.line())

    def __str__(self) -> str:
        return f"`{self.line()}`"

    def __repr__(self) -> str:
        return f"Command({self.line()!r})"


class Advice:
    """What a reader can do, as text and commands: `Advice("run ", Command("train"))`."""

    def __init__(self, *parts: str | Command) -> None:
        self.parts = parts

    def shown(self, show: Callable[[Command], str] = str) -> str:
        """Return it as one phrase, its commands written by `show`."""
        return "".join(show(part) if isinstance(part, Command) else part for part in self.parts)

    def __str__(self) -> str:
        return self.shown()


def shown(remedy: Command | Advice, show: Callable[[Command], str] = Command.line) -> str:
    """Return a remedy as text: a lone command as `show` writes it, without quotes."""
    if isinstance(remedy, Command):
        return show(remedy)
    return remedy.shown(lambda command: f"`{show(command)}`")


class FeatstoreError(Exception):
    """Base of every error that is reported as one line instead of a traceback.

    Args:
        message: What failed, where, what was expected and found.
        mend: What to do about it: a command to run, or more in a phrase.
    """

    exit_code = 1

    def __init__(self, message: str, mend: Command | Advice | None = None) -> None:
        # All of it, so that an error can be sent from a worker's process.
        super().__init__(message, mend)
        self.message = message
        self.mend = Advice("run ", mend) if isinstance(mend, Command) else mend

    def shown(self, show: Callable[[Command], str] = str) -> str:
        """Return the whole line, its commands written by `show`."""
        return f"{self.message}; {self.mend.shown(show)}" if self.mend else self.message

    def __str__(self) -> str:
        return self.shown()


class UsageError(FeatstoreError):
    exit_code = 2


class ConfigError(UsageError):
    pass


class DataError(FeatstoreError):
    pass


class RowError(DataError):
    pass


class SplitError(DataError):
    pass


class ImageError(DataError):
    pass


class PresetError(FeatstoreError):
    pass


class StoreError(FeatstoreError):
    pass


class MissingFeaturesError(StoreError):
    pass


class MissingKeyError(MissingFeaturesError, KeyError):
    pass


class StaleFeaturesError(StoreError):
    pass


class CorruptShardError(StoreError):
    pass


class RunError(FeatstoreError):
    pass


class WriteError(FeatstoreError):
    pass


class StoppedError(FeatstoreError):
    exit_code = 130


def short(value: object, limit: int = 60) -> str:
    """Return a value's repr on one line, cut to `limit` characters, for a message."""
    text = repr(value[: limit + 1] if isinstance(value, str) else value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def counted(number: int, noun: str, form: str = "d") -> str:
    """Return a number with its noun: "1 row", "2 rows", or with form "," "2,400 rows"."""
    return f"{number:{form}} {noun}{'' if number == 1 else 's'}"
