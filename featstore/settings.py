"""Settings: typed sections, read from TOML, overridden by flags.

A section is a frozen dataclass whose fields are made with `setting`. The same
declaration gives the default, the check, the line in the file that `init`
writes, the command-line flag, and (for `[train]`) the search space's key. An
unknown section or key is an error that names the nearest one.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from featstore.errors import Advice, ConfigError

Section = TypeVar("Section")
_ESCAPED = re.compile(r"[\b\t\n\f\r]")
_WINDOWS_PATH = "write paths with / or between single quotes, as 'C:\\data\\rows.csv'"


def setting(
    default: Any,
    help: str,
    *,
    choices: Iterable[Any] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    words: Iterable[str] | None = None,
    path: bool = False,
    preset: bool = False,
    free: bool = False,
    before: Any = None,
    flag: str = "",
) -> Any:
    """Declare one setting of a section.

    Args:
        default: The value when neither file nor flag names the setting.
        help: One sentence, shown in the written file and in `--help`.
        choices: The only values allowed, if any.
        minimum, maximum: Inclusive bounds of a number, or of a table's numbers.
        above: Exclusive lower bound of the same.
        words: Of a table: what may stand in its place, besides nothing (`""`).
        path: The value is a file or folder, taken relative to the file that
            names it.
        preset: The same, where it is there; another value is a preset's name.
        free: The value changes no number, and may change while something goes on.
        before: Of a setting that came later: what was done before there was one.
            See `complete`.
        flag: Its flag, where that is not `--` and its name.
    """
    metadata = {
        "help": help,
        "choices": tuple(choices),
        "minimum": minimum,
        "maximum": maximum,
        "above": above,
        "words": None if words is None else tuple(words),
        "path": path,
        "preset": preset,
        "free": free,
        "before": before,
        "flag": flag,
    }
    return dataclasses.field(default=default, metadata=metadata)


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean X?)` for the nearest known name, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def hints(section: type) -> dict[str, Any]:
    """Return the resolved type of each field of a section."""
    return typing.get_type_hints(section)


def _matches(value: Any, hint: Any) -> tuple[bool, Any]:
    """Tell whether `value` has the type of `hint`; return it, converted if it may be."""
    origin = typing.get_origin(hint)
    if origin is typing.Union or origin is types.UnionType:
        for option in typing.get_args(hint):
            ok, converted = _matches(value, option)
            if ok:
                return True, converted
        return False, value
    if origin is tuple:
        inner = typing.get_args(hint)[0]
        if not isinstance(value, list | tuple):
            return False, value
        items = [_matches(item, inner) for item in value]
        return all(ok for ok, _ in items), tuple(item for _, item in items)
    if origin is dict:
        inner = typing.get_args(hint)[1]
        if inner is float and isinstance(value, str):
            value = _typed_table(value)
        if not isinstance(value, dict):
            return False, value
        pairs = {key: _matches(item, inner) for key, item in value.items()}
        return all(ok for ok, _ in pairs.values()), {key: item for key, (_, item) in pairs.items()}
    if hint is bool:
        return isinstance(value, bool), value
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False, value
        try:
            value = float(value)
        except OverflowError:  # an integer of more than 308 digits
            return False, value
        return math.isfinite(value), value
    return isinstance(value, hint), value


def _typed_table(text: str) -> Any:
    """Return the numbers of a table as it is typed, `red=1.5,blue=2`; other text as it is."""
    pairs = [part.split("=") for part in text.split(",")]
    try:
        return {name.strip(): float(number) for name, number in pairs}
    except ValueError:
        return text


def _type_name(hint: Any) -> str:
    return str(hint) if typing.get_origin(hint) else str(getattr(hint, "__name__", hint))


def check(section: str, field: dataclasses.Field[Any], hint: Any, value: Any, where: str) -> Any:
    """Return `value` as the setting's type.

    Raises:
        ConfigError: Wrong type, not one of the choices, or out of bounds.
    """
    name = f"[{section}] {field.name}"
    ok, value = _matches(value, hint)
    if not ok:
        raise ConfigError(f"{where}: {name} must be {_type_name(hint)}, found {value!r}")
    meta = field.metadata
    for item in value if isinstance(value, tuple) else (value,):
        if meta.get("choices") and item not in meta["choices"]:
            allowed = ", ".join(map(str, meta["choices"]))
            hint_text = suggest(str(item), map(str, meta["choices"]))
            raise ConfigError(
                f"{where}: {name} must be one of {allowed}; found {item!r}{hint_text}"
            )
    words = meta.get("words")
    if words is not None and isinstance(value, str) and value not in ("", *words):
        others = "".join(f" or {word!r}" for word in words)
        raise ConfigError(
            f"{where}: {name} must be a table of numbers such as {{red = 1.5, blue = 2}}, as a flag"
            f" red=1.5,blue=2{others}; found {value!r}"
        )
    numbers = value.values() if isinstance(value, dict) else value
    for number in numbers if isinstance(value, tuple | dict) else (value,):
        if not isinstance(number, int | float):
            continue
        low, high, above = meta.get("minimum"), meta.get("maximum"), meta.get("above")
        if low is not None and number < low:
            raise ConfigError(f"{where}: {name} must be at least {low}, found {number}")
        if high is not None and number > high:
            raise ConfigError(f"{where}: {name} must be at most {high}, found {number}")
        if above is not None and number <= above:
            raise ConfigError(f"{where}: {name} must be above {above}, found {number}")
    return value


def plain_path(path: str) -> str:
    """Return a path to the same file without `.`, double slashes, or `..` inside.

    A leading `..` stays: it is how people name what is beside them. After a linked
    folder `..` is the parent of the link's target, not of the link; there the real
    path is returned.
    """
    if "\0" in path:  # no path at all; whoever opens it says so
        return path
    plain = os.path.normpath(path)
    if plain.startswith("//"):  # which POSIX leaves to the system, and Linux takes for one
        plain = plain[1:]
    if ".." in Path(path).parts and os.path.realpath(plain) != os.path.realpath(path):
        return os.path.realpath(path)
    return plain


def _anchor(value: Any, folder: Path) -> Any:
    """Take a relative path relative to `folder`; leave preset names and URLs alone."""
    if isinstance(value, dict):
        return {key: _anchor(item, folder) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_anchor(item, folder) for item in value)
    if not value or "://" in value:
        return value
    return plain_path(str(folder / os.path.expanduser(value)))


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ConfigError: The file cannot be read or is not TOML; the message has
            the line.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: not a TOML file of settings: nested too deep") from error
    # Besides its own error, the parser passes on those of numbers and of characters.
    except ValueError as error:
        raise ConfigError(f"{path}: not a TOML file: {error}", _backslash(path, error)) from error


def _backslash(path: Path, error: ValueError) -> Advice | None:
    """Say what to do where a backslash, as in a path of Windows, is what TOML trips over."""
    found = re.search(r"at line (\d+)", str(error))
    if not found or isinstance(error, UnicodeDecodeError):
        return None
    line = path.read_text(encoding="utf-8-sig").splitlines()[int(found[1]) - 1]
    if '"' not in line or "\\" not in line:
        return None
    return Advice(f"between double quotes a backslash begins an escape: {_WINDOWS_PATH}")


def paths_in(value: Any) -> list[str]:
    """Return the paths of a setting: one, several, or a table of either."""
    if isinstance(value, dict):
        return [path for item in value.values() for path in paths_in(item)]
    return list(value) if isinstance(value, tuple) else [value]


def _check_path(value: Any, where: str, name: str) -> None:
    """Refuse a path in which TOML made something else of a backslash: `\\t` is a tab.

    Raises:
        ConfigError: It has a control character.
    """
    for text in paths_in(value):
        if _ESCAPED.search(text):
            raise ConfigError(
                f"{where}: {name} has a control character, found {text!r}",
                Advice(f"a backslash and a letter were read as an escape: {_WINDOWS_PATH}"),
            )


def build_section(
    name: str, section: type[Section], values: Mapping[str, Any], where: str, folder: Path
) -> Section:
    """Make one section from parsed values.

    Args:
        name: The section's name in the file.
        section: The dataclass.
        values: Key to value, as parsed.
        where: What to call the source in an error.
        folder: Relative paths are taken from here.

    Raises:
        ConfigError: Unknown key, wrong type, or a value out of its bounds.
    """
    fields = {field.name: field for field in dataclasses.fields(section)}  # type: ignore[arg-type]
    types_of = hints(section)
    chosen: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(
                f"{where}: unknown setting {key!r} in [{name}]{suggest(key, fields)};"
                f" known: {', '.join(fields)}"
            )
        value = check(name, fields[key], types_of[key], value, where)
        meta = fields[key].metadata
        if meta["path"] or meta["preset"]:
            _check_path(value, where, f"[{name}] {key}")
        if meta["path"]:
            value = _anchor(value, folder)
        elif meta["preset"] and Path(anchored := _anchor(value, folder)).exists():
            value = anchored
        chosen[key] = value
    return section(**chosen)


def checked_values(
    name: str, section: type, values: Mapping[str, Any], where: str, folder: Path
) -> dict[str, Any]:
    """Return the settings that were given, as `build_section` makes them, and no others."""
    built: Any = build_section(name, section, values, where, folder)
    return {key: getattr(built, key) for key in values}


def complete(section: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Add what the settings of an older version meant.

    A run and a search keep every setting. Where a section has all but later
    ones, those had no other value than their `before`, whatever the default is
    now.

    Args:
        section: The dataclass.
        values: Key to value, as written.
    """
    later = {
        field.name: field.metadata["before"]
        for field in dataclasses.fields(section)
        if field.metadata["before"] is not None
    }
    whole = all(f.name in values or f.name in later for f in dataclasses.fields(section))
    return {**later, **values} if whole else dict(values)


def toml_value(value: Any) -> str:
    """Return a value as TOML text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        inner = ", ".join(f"{toml_value(k)} = {toml_value(v)}" for k, v in value.items())
        return "{" + inner + "}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def render_toml(config: Any, comments: bool = False, defaults: bool = True) -> str:
    """Write a composite of sections as TOML.

    Args:
        config: The sections.
        comments: Write each setting's help above it.
        defaults: Set what has its default value; False writes it as a comment,
            so that it still follows what a later version or the demo defaults to.
    """
    blocks = []
    for part in dataclasses.fields(config):
        lines = [f"[{part.name}]"]
        section = getattr(config, part.name)
        for field in dataclasses.fields(section):
            if comments:
                text = field.metadata["help"]
                if field.metadata["choices"]:
                    text += f" ({' | '.join(map(str, field.metadata['choices']))})"
                lines.append(f"# {text}")
            value = getattr(section, field.name)
            mark = "" if defaults or value != field.default else "# "
            lines.append(f"{mark}{field.name} = {toml_value(value)}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"
