"""`python cli.py …` in a clone: the same commands as the installed `featstore`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # First, wherever it is called from and whatever else on the path has these packages' names.
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from featstore.__main__ import main

    main()
