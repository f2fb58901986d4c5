"""Compiles a launch of every kernel of scores for the architectures of `SAME_PTX`, and says what differs, as JSON.

    python tests/kernels/same_ptx.py [--all]

Without --all heads of 64 in bfloat16, with masks, at the smallest tile; with it all head sizes, both dtypes, with and
without masks and segments, at the tile of the table.  Triton's cache is kept in the folder TRITON_CACHE_DIR.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from typing import Any

from pyxlbert.bench import ahead, tiles

configurations = importlib.import_module("pyxlbert.kernels._configurations")


def compared(architecture: int, base: int, head_size: int, dtype: str, every: bool) -> None:
    """A line for every key: whether the PTX of both is the same, and the machine code that is made from it."""

    def judge(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> float:
        made = []
        for one in (base, architecture):
            ahead.compile_for(one)
            made.append(kernel.warmup(*arguments, grid=grid, **options))
        ptx = [re.sub(r"^\.target sm_\d+$", "", one.asm["ptx"], flags=re.MULTILINE) for one in made]
        line = {
            "architecture": architecture,
            "kernel": search.wanted.kernel,
            "key": str(tuple(search.wanted)),
            "ptx": ptx[0] == ptx[1],
            "shared": made[0].metadata.shared == made[1].metadata.shared,
            "code": ahead.assembled(made[0], architecture) == made[1].asm["cubin"],
        }
        print(json.dumps(line), flush=True)
        # One launch of a key will do.
        return float("inf")

    search = tiles.Search(architecture, judge, run=False)
    calls = list(tiles.calls(head_size, tiles.DTYPES[dtype], [(2, 512)], "cpu"))
    for key, asked in search.keys(calls).items():
        if every or (key.extras and (key.segments or not key.kernel.startswith("relative"))):
            card = configurations.Card(architecture, ahead.SHARED[architecture])
            usual = configurations.row_for(key.kernel, card, *key[2:])
            search.cost(key, usual if every else tiles.candidates(key.kernel, key.bytes)[-1], asked.calls, most=0.0)


def main(every: bool) -> None:
    for head_size in configurations.HEAD_SIZES if every else (64,):
        for dtype in tiles.DTYPES if every else ("bfloat16",):
            for architecture, base in ahead.SAME_PTX.items():
                compared(architecture, base, head_size, dtype, every)


if __name__ == "__main__":
    main("--all" in sys.argv)
