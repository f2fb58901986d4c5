"""`python -m pyxlbert` is the `pyxlbert` command."""

from __future__ import annotations

import sys

from pyxlbert.cli import main

if __name__ == "__main__":
    sys.exit(main())
