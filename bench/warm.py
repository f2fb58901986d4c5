"""Calls every contestant of the races that decide once, so that what they compile lies in the caches.

    python -m pyxlbert.bench.warm [--part 0/8]

Nothing is timed and nothing checked; who fails is said, and fails again in its race.
"""

from __future__ import annotations

import argparse
import sys

import torch
from pyxlbert.bench import on_gpu
from pyxlbert.bench.contest import poisons, reason_of


def main(arguments: list[str] | None = None) -> int:
    """0, or 3 after an error that leaves the process without a device."""
    parser = argparse.ArgumentParser(prog="python -m pyxlbert.bench.warm", description=__doc__.splitlines()[0])
    parser.add_argument("--part", default="0/1", help="the first of every so many races")
    part, parts = (int(number) for number in parser.parse_args(arguments).part.split("/"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for race in list(on_gpu.deciding())[part::parts]:
        torch.manual_seed(0)
        with torch.device(device):
            contestants = race.build().contestants()
        for name, call in contestants.items():
            try:
                call()
                if device == "cuda":
                    torch.cuda.synchronize()
            except Exception as error:
                print(f"{race}: {name}: {reason_of(error)}", file=sys.stderr, flush=True)
                if poisons(error):
                    return 3
            else:
                print(f"{race}: {name}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
