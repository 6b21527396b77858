"""The command line, whose trials train without XLA: compiling takes most of a tiny one's time.

A worker process imports this file too, as it does the main module of any program.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

# The checkout's own, wherever the installed one is.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli import main
from trainer import trials

_training = trials._training


def _uncompiled(*arguments: Any) -> Any:
    training = _training(*arguments)
    training.compiled = False
    return training


trials._training = _uncompiled

if __name__ == "__main__":
    main()
