"""How a training is shown: a bar for each epoch, a line after it."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from featstore.progress import bar_seconds
from trainer.run.training import Reporter


@contextlib.contextmanager
def epoch_bar(epoch: int, steps: int) -> Iterator[Any]:
    """Show the steps of an epoch, in a terminal or a notebook only."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm

    with tqdm(
        total=steps,
        desc=f"epoch {epoch}",
        unit=" steps",
        leave=False,
        mininterval=bar_seconds(),
        disable=None,
    ) as bar:
        yield bar


def print_epoch(record: dict[str, Any]) -> None:
    """Print the figures of an epoch on stderr."""
    print(
        f"epoch {record['epoch']}: loss {record['loss']:.4f}, val loss {record['val_loss']:.4f},"
        f" accuracy {record['val_accuracy']:.2%}, macro-F1 {record['val_macro_f1']:.2%}"
        f" at τ {record['threshold']:.2f}; {record['seconds']:.1f} s",
        file=sys.stderr,
        flush=True,
    )


def print_note(line: str) -> None:
    """Print a line for people on stderr."""
    print(line, file=sys.stderr, flush=True)


SHOWN_REPORTER = Reporter(epoch_bar, print_epoch, note=print_note)
