"""How work is shown while it goes: bars, and lines for people."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import io
import os
import reprlib
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ParamSpec, TextIO, TypeVar

from featstore.quantities import duration, rate, share

# Called with the number of rows just dealt with.
Progress = Callable[[int], None]
Bar = Callable[[int, str], contextlib.AbstractContextManager[Progress]]
Given = ParamSpec("Given")
Found = TypeVar("Found")

SLOW_SECONDS = 2.0
"""Seconds that are waited without being told what for; in a log the first line comes after them."""
LIVE_SECONDS, REDRAW_SECONDS, LOGGED_SECONDS = 0.5, 1.0, 10.0
BATCH_SECONDS = 0.05
"""Within them after the first row are those of its batch."""


def redrawn(stream: Any = None) -> bool:
    """Tell whether what is written on stderr can be replaced: on a terminal, in a notebook."""
    stream = sys.stderr if stream is None else stream
    return "ipykernel" in sys.modules or bool(getattr(stream, "isatty", lambda: False)())


# What is being waited for, the innermost last; only that is shown.
_lock = threading.RLock()
_waits: list[_Wait] = []


class _Wait:
    """A line about work that goes on: redrawn and then removed, or in a log a line now and then.

    A thread of its own draws it, since the work may be one long call. Signals and the
    end of the work stay the main thread's.

    Args:
        line: Asked for the line, with the seconds that have passed.
    """

    def __init__(self, line: Callable[[float], str]) -> None:
        self._line = line
        self._over = threading.Event()
        self._width = 0

    def __enter__(self) -> _Wait:
        self._started = time.monotonic()
        self._stream, self._own = _kept_stderr()
        self._live = redrawn(self._stream)
        with _lock:
            if _waits:
                _waits[-1].erase()
            _waits.append(self)
        self._thread = threading.Thread(target=self._draw, name="progress", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._over.set()
        self._thread.join()
        with _lock:
            self.erase()
            _waits.remove(self)
        if self._own:
            self._stream.close()

    def _draw(self) -> None:
        pause = LIVE_SECONDS if self._live else SLOW_SECONDS
        while not self._over.wait(pause):
            passed = time.monotonic() - self._started
            # The longer it takes, the rarer the lines.
            pause = REDRAW_SECONDS if self._live else max(LOGGED_SECONDS, passed / 10)
            # A stream that is gone is no reason to end the work.
            with _lock, contextlib.suppress(OSError, ValueError):
                if _waits[-1] is self and not self._over.is_set():
                    self._show(passed)

    def _show(self, passed: float) -> None:
        line = self._line(passed)
        if self._live:
            line = line[: _columns() - 1]
            self._stream.write(f"\r{line.ljust(self._width)}\r")
            self._width = max(self._width, len(line))
        else:
            self._stream.write(f"{line}\n")
        self._stream.flush()

    def erase(self) -> None:
        """Remove the line, where it can be; it comes back with the next drawing."""
        if self._width:
            with contextlib.suppress(OSError, ValueError):
                self._stream.write(f"\r{' ' * self._width}\r")
                self._stream.flush()
            self._width = 0


class _Clock(_Wait):
    """Keeps the time of a bar going while its first rows are waited for.

    Args:
        bar: The bar, of tqdm.
    """

    def __init__(self, bar: Any) -> None:
        super().__init__(str)
        self._bar = bar

    def _show(self, passed: float) -> None:
        # Drawn now, so that it is removed at the end.
        self._bar.delay = 0
        self._bar.refresh()


def clock(bar: Any) -> _Clock:
    """Have a bar of tqdm that is drawn be drawn anew each second."""
    return _Clock(bar)


def _columns() -> int:
    """Return the width of the terminal; some say 0, as of a container."""
    return shutil.get_terminal_size().columns or 80


def bar_columns() -> int | None:
    """Return the width that a bar of tqdm is told: none but where the terminal says 0."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        if os.get_terminal_size(sys.stderr.fileno()).columns == 0:
            return _columns()
    return None


def _kept_stderr() -> tuple[TextIO, bool]:
    """Return stderr, and whether it is a copy: one that shows while the descriptor is turned away.

    `import_framework` turns it away.
    """
    # None where a program has no console.
    stream = sys.stderr or io.StringIO()
    try:
        if stream.fileno() == 2:
            own = os.fdopen(os.dup(2), "w", encoding=stream.encoding, errors=stream.errors)
            return own, True
    except (AttributeError, OSError, ValueError, io.UnsupportedOperation):
        pass
    return stream, False


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say what is waited for, if it takes long: "loading Keras: 3 s"."""
    with _Wait(lambda passed: f"{what}: {duration(round(passed))}"):
        yield


def print_line(line: str) -> None:
    """Print a line for people on stderr, in place of one that says what is waited for."""
    with _lock:
        if _waits:
            _waits[-1].erase()
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def no_bar(total: int, unit: str) -> Iterator[Progress]:
    """Show nothing."""
    yield lambda rows: None


class _Pace:
    """How fast rows are done once the first are.

    The first wait for what comes once, such as a compiler; or were done by an earlier command.
    """

    def __init__(self) -> None:
        self._first = self._begun = 0.0
        self._done, self._apart = 0, 0

    def add(self, rows: int) -> bool:
        """Count rows; tell whether they are of the first."""
        now = time.monotonic()
        self._first = self._first or now
        self._done += rows
        # Rows of a batch come one by one, at once.
        if now - self._first < BATCH_SECONDS:
            self._begun, self._apart = now, self._done
            return True
        return False

    @property
    def rows_per_second(self) -> float | None:
        """None while there are only the first."""
        later = self._done - self._apart
        return later / (time.monotonic() - self._begun) if later else None


@functools.cache
def bars() -> Any:
    """Return the class of the bars that suit where they are shown."""
    with warnings.catch_warnings():
        # Where a notebook lacks widgets, the bar is text.
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm

    base: Any = tqdm

    class Bar(base):
        """A bar whose speed is that of `_Pace`, and at the end that of all rows."""

        def __init__(self, *args: Any, **given: Any) -> None:
            self._pace = _Pace()
            super().__init__(*args, **given)

        def update(self, n: int = 1) -> Any:
            if not n or not self._pace.add(n):
                return super().update(n)
            self.n += n
            self.initial = self.last_print_n = self.n
            self.last_print_t = self._time()
            return None

        def close(self) -> None:
            self.initial = 0
            super().close()

    return Bar


@contextlib.contextmanager
def bar(total: int, unit: str, delay: float = 0) -> Iterator[Progress]:
    """Show rows done, rows a second and the time that is left: in a terminal, a notebook or a log.

    Args:
        total: Rows to be done.
        unit: What they are, such as "images".
        delay: Seconds that the work must take before a log has a line; a bar that is drawn
            comes earlier, and is removed at the end.
    """
    if not redrawn():
        with logged_bar(total, unit, last=not delay) as advance:
            yield advance
        return
    with (
        bars()(
            total=total,
            unit=f" {unit}",
            smoothing=0.1,
            delay=min(delay, LIVE_SECONDS),
            leave=not delay,
            ncols=bar_columns(),
        ) as shown,
        clock(shown),
    ):

        def advance(rows: int) -> None:
            shown.update(rows)

        yield advance


@contextlib.contextmanager
def logged_bar(
    total: int, unit: str, title: str = "", last: bool = True, more: Callable[[], str] = str
) -> Iterator[Progress]:
    """Show a bar as lines of a log: after two seconds, then every ten or more.

    Args:
        total: Rows to be done.
        unit: What they are.
        title: What a line starts with; "": the unit.
        last: Say at the end how long it took, even if that was short.
        more: Asked for the rest of a line.
    """
    done, started, pace = 0, time.monotonic(), _Pace()

    def line(passed: float) -> str:
        parts = [f"{title or unit}: {done:,} of {total:,}"]
        speed = pace.rows_per_second
        if 0 < done < total:
            parts[0] += f" ({share(done / total, 0)})"
        if done >= total and passed:
            parts.append(rate(done / passed, unit))
        elif speed:
            parts.append(rate(speed, unit))
        if speed and done < total:
            parts.append(f"about {duration(round((total - done) / speed))} left")
        else:
            parts.append(duration(round(passed)))
        return ", ".join(filter(None, [*parts, more()]))

    def advance(rows: int) -> None:
        nonlocal done
        done += rows
        if rows:
            pace.add(rows)

    with _Wait(line):
        yield advance
    if last:
        print_line(line(time.monotonic() - started))


@dataclass(frozen=True)
class Show:
    """What is shown while work goes; nothing by default.

    Attributes:
        bar: Makes a progress display from a number of rows and what they are.
        halved: Called with the new batch size after memory ran out.
        note: Called with lines for people.
        slow_bar: As `bar`, for work that is often done at once.
        loading: Called before an encoder is loaded, and the framework for it.
        wait: Says what is waited for, where rows cannot be counted; see `working`.
    """

    bar: Bar = no_bar
    halved: Callable[[int], None] = lambda size: None
    note: Callable[[str], None] = lambda line: None
    slow_bar: Bar = no_bar
    loading: Callable[[], None] = lambda: None
    wait: Callable[[str], contextlib.AbstractContextManager[None]] = lambda what: (
        contextlib.nullcontext()
    )

    @property
    def silent(self) -> bool:
        """Whether no work is shown."""
        return self.bar is no_bar


SILENT = Show()


def _print_halved(size: int) -> None:
    print_line(f"out of memory: going on with batches of {size}")


SHOWN = Show(
    bar, _print_halved, print_line, functools.partial(bar, delay=SLOW_SECONDS), wait=waiting
)
"""What the Python interface and the commands show: bars and lines on stderr."""

_current: contextvars.ContextVar[Show] = contextvars.ContextVar("show", default=SILENT)


@contextlib.contextmanager
def showing(show: Show) -> Iterator[None]:
    """Have `working` show what is inside."""
    token = _current.set(show)
    try:
        yield
    finally:
        _current.reset(token)


def working(what: str) -> contextlib.AbstractContextManager[None]:
    """Say what is waited for, if whoever called shows work; deep inside, where no `show` is.

    Args:
        what: As "reading the rows".
    """
    return _current.get().wait(what)


def says(what: str) -> Callable[[Callable[Given, Found]], Callable[Given, Found]]:
    """Return a decorator: `working` says so while the function runs."""

    def add(function: Callable[Given, Found]) -> Callable[Given, Found]:
        @functools.wraps(function)
        def said(*args: Given.args, **kwargs: Given.kwargs) -> Found:
            with working(what):
                return function(*args, **kwargs)

        return said

    return add


def shows_work(function: Callable[Given, Found]) -> Callable[Given, Found]:
    """Have `working` follow the `show` that a function is given, and `running_call` name it."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def shown(*args: Given.args, **kwargs: Given.kwargs) -> Found:
        bound = signature.bind(*args, **kwargs)
        given = dict(bound.arguments)
        bound.apply_defaults()
        # The outermost: what it calls is its own business.
        known = _call.get() or functools.partial(_said, function, signature, given)
        token = _call.set(known)
        try:
            with showing(bound.arguments["show"]):
                return function(*args, **kwargs)
        finally:
            _call.reset(token)

    return shown


_call: contextvars.ContextVar[Callable[[], str] | None] = contextvars.ContextVar(
    "call", default=None
)
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist, _SHORT.maxtuple = 4, 20, 8, 8
_SHORT.maxstring = MOST_LETTERS = 200
_PLAIN = (str, int, float, tuple, list, dict, type(None))


def running_call() -> str:
    """Return the outermost call of the Python interface that is running; "" outside of any.

    As `trainer.train(project, name='first', k_txt=3)`: of arguments that are no plain values
    the name alone.
    """
    call = _call.get()
    return "" if call is None else call()


def _said(function: Callable[..., Any], signature: inspect.Signature, given: dict[str, Any]) -> str:
    owner, _, name = function.__qualname__.rpartition(".")
    parts = []
    for key, value in given.items():
        kind = signature.parameters[key].kind
        if key in ("self", "show"):
            continue
        if kind is inspect.Parameter.VAR_KEYWORD:
            parts += [f"{inner}={_value(inner, of)}" for inner, of in value.items()]
        elif signature.parameters[key].default is inspect.Parameter.empty:
            parts.append(_value(key, value))
        else:
            parts.append(f"{key}={_value(key, value)}")
    before = owner.lower() if owner else function.__module__.partition(".")[0]
    return f"{before}.{name}({', '.join(parts)})"


def _value(name: str, value: Any) -> str:
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if isinstance(value, str) and len(value) > MOST_LETTERS:
        # Cut, the password of a URL could no more be told as one.
        return name
    return _SHORT.repr(value) if isinstance(value, _PLAIN) else name
