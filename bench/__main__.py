"""`python -m pyxlbert.bench`: what `pyxlbert bench` does."""

from __future__ import annotations

import sys

from pyxlbert.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
