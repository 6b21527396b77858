"""The commands: `featstore`, or `python -m featstore`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def _claim(package: str) -> None:
    """Import the package that lies beside this one, whatever else on the path has its name."""
    path = Path(__file__).resolve().parents[1] / package / "__init__.py"
    spec = importlib.util.spec_from_file_location(package, path)
    if spec is None or spec.loader is None or not path.is_file() or package in sys.modules:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules[package] = module
    spec.loader.exec_module(module)


# Here, so that the processes that a command starts do so too, before they import what they run.
_claim("trainer")


def main() -> None:
    """Run the command line."""
    from trainer.commands.main import main as run

    run()


if __name__ == "__main__":
    main()
