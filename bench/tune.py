"""The search for tiles of the Triton kernels of scores, and the table that it rewrites.

    python -m pyxlbert.bench.tune [--write kernels/tiles.csv]               on a GPU: the fastest of the candidates
    python -m pyxlbert.bench.tune --compile 90 [--write ...]                anywhere: the first that needs no spills
    python -m pyxlbert.bench.tune --compile 90 --mend [--write ...]         only for those whose tile spills
    python -m pyxlbert.bench.tune --compile 90 --check                      says which those are

The table has a row per kernel, architecture, dtype's size, head size, and whether tiles have masks, dropout or segments
(`Key`); what is tried, and how, is in `bench/tiles.py`.  Rows of other architectures stay as they are; a row that says
what would be found without it is left out.  Every row is written as it is found.  What compiling has shown is kept in a
file beside the build, so that a run that was ended goes on where it was, and a later one compiles only what has changed
since.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import fnmatch
import importlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from pyxlbert.bench import ahead
from pyxlbert.bench.tiles import (
    DTYPES,
    Asked,
    Search,
    calls,
    candidates,
    compiled,
    compiling_part,
    timed,
    usual_card,
)

from pyxlbert import files

configurations = importlib.import_module("pyxlbert.kernels._configurations")

Key, Tile = configurations.Key, configurations.Tile


def write_rows(path: Path, rows: dict[Key, Tile]) -> None:
    """Sets rows of the table in the file, which another search may have written since this one began, and leaves the
    others; see `write_table`."""
    write_table(path, configurations.read_table(path) | rows)


def write_table(path: Path, table: dict[Key, Tile]) -> None:
    """Writes a table that `read_table` of the kernels' configurations reads, whole or not at all."""
    kept: dict[Key, Tile] = {}
    # Those with segments first: they are for calls without, too.
    order = sorted(table, key=lambda key: (key.kernel, -key.bytes, key.head_size, key.extras, not key.segments, key[1]))
    for key in order:
        others = [other for other in kept if other.head_size == key.head_size]
        # The first of its kind is the best of none.
        with contextlib.suppress(ValueError):
            if kept[configurations.best_of(others, key.kernel, usual_card(key.architecture), *key[2:])] == table[key]:
                continue
        kept[key] = table[key]
    with files.whole_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*Key._fields, *Tile._fields])
        writer.writerows([*key, *tile] for key, tile in kept.items())


class Kept:
    """What compiling has shown of an architecture's tiles, in a file: a run that was ended goes on where it was.

    Args:
        path: the JSON file, made when the first tile is known; None: nothing is kept.

    Raises:
        ValueError: the file holds something else.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        found = files.read_json(path, dict) if path is not None and path.exists() else {}
        try:
            self.rows = {
                name: (row["fingerprint"], {Tile(*tile): cost for tile, cost in row["costs"]})
                for name, row in found.items()
            }
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{path}: got no file that a search for tiles has written ({error!r})") from None

    def costs(self, key: Key, fingerprint: str) -> dict[Tile, float | None]:
        """Of every tile that was compiled from what has this fingerprint; None: it cannot be had."""
        known = self.rows.get(repr(tuple(key)))
        return dict(known[1]) if known is not None and known[0] == fingerprint else {}

    def keep(self, key: Key, fingerprint: str, costs: dict[Tile, float | None]) -> None:
        """Writes what is known of a key, whole or not at all."""
        if self.path is None:
            return
        self.rows[repr(tuple(key))] = (fingerprint, dict(costs))
        rows = {
            name: {"fingerprint": fingerprint, "costs": list(costs.items())}
            for name, (fingerprint, costs) in self.rows.items()
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with files.whole_file(self.path) as part:
            part.write_text(json.dumps(rows), encoding="utf-8")


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    """The command's, checked before anything is compiled."""
    parser = argparse.ArgumentParser(prog="python -m pyxlbert.bench.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--compile", type=int, choices=ahead.ARCHITECTURES, help="no GPU: the first without spills")
    parser.add_argument("--mend", action="store_true", help="with --compile: rows whose tile needs no spills stay")
    parser.add_argument("--check", action="store_true", help="with --compile: only says which rows' tiles spill")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="KERNEL", help="names, or patterns as '*_rows'")
    parser.add_argument("--head-sizes", type=int, nargs="+", default=[64, 128], choices=configurations.HEAD_SIZES)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--plain", action="store_true", help="not for tiles with a mask, a bias, ranks or dropout")
    parser.add_argument("--tokens", type=int, default=8192, help="of a timed call, in sequences of 512 and of 2048")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile ahead of timing")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no tile after so long")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path, help="the file whose table is rewritten")
    parser.add_argument("--state", type=Path, help="what --compile has found (default: build/tiles/ARCHITECTURE.json)")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET: got 1, wanted it unset: the interpreter has no tiles to choose")
    for name in ("mend", "check", "state"):
        if getattr(options, name) and options.compile is None:
            parser.error(f"--{name}: wanted --compile beside it")
    if options.check and options.write is not None:
        parser.error("--check and --write: got both, and a check finds nothing to write")
    kernels = {key.kernel for key in configurations.TABLE}
    for pattern in options.only:
        if not fnmatch.filter(kernels, pattern):
            parser.error(f"--only: got {pattern!r}, wanted names or patterns of {', '.join(sorted(kernels))}")
    if options.write is not None:
        # Known before the search, not after it.
        if not options.write.is_file():
            parser.error(f"--write: got {options.write}, which is no file, wanted the one whose table is rewritten")
        try:
            files.check_writable("--write", str(options.write), options.write.resolve())
            configurations.read_table(options.write)
        except OSError as error:
            parser.error(str(error))
        except ValueError as error:
            parser.error(f"--write: {error}")
    if options.compile is None and not torch.cuda.is_available():
        parser.error("no CUDA device is here: give --compile ARCHITECTURE, or run where one is")
    if options.compile is not None and options.state is None:
        options.state = Path("build", "tiles", f"{options.compile}.json")
    try:
        if options.state is not None:
            files.check_parents("--state", options.state.resolve())
        options.kept = Kept(options.state)
    except OSError as error:
        parser.error(str(error))
    except ValueError as error:
        parser.error(f"--state: {error}")
    options.end = time.monotonic() + options.seconds
    return options


def main(arguments: list[str] | None = None) -> int:
    """Searches, prints each row, and writes it where it is told to; 1 where a row's tile spills or finds no room."""
    options = options_of(arguments)
    if options.compile is not None:
        architecture, device, shapes, judge = options.compile, "cpu", [(2, 512)], compiled(options.compile)
    else:
        device, shapes, judge = "cuda", [(max(1, options.tokens // t), t) for t in (512, 2048)], timed
        architecture = configurations.card(torch.device(device, torch.cuda.current_device())).architecture
        if options.part is not None:
            judge = compiling_part(*(int(x) for x in options.part.split("/")))
        elif options.jobs > 1:
            command = [sys.executable, "-m", "pyxlbert.bench.tune", *(sys.argv[1:] if arguments is None else arguments)]
            jobs = [subprocess.Popen([*command, "--part", f"{i}/{options.jobs}"]) for i in range(options.jobs)]
            if any([job.wait() for job in jobs]):
                raise RuntimeError("a process that compiles ahead failed")
    search = Search(architecture, judge, run=judge is timed)
    bad = 0
    for head_size in options.head_sizes:
        for dtype in options.dtypes:
            made = list(calls(head_size, DTYPES[dtype], shapes, device))
            wanted = {
                key: asked
                for key, asked in search.keys(made).items()
                if any(fnmatch.fnmatch(key.kernel, pattern) for pattern in options.only)
                and not (options.plain and key.extras)
            }
            good: dict[Key, Tile] = {}
            # What is there first, of all of them: a run that is ended has said which rows need another tile.
            if options.check or options.mend:
                good = {key: search.row(key) for key, asked in wanted.items() if _holds(search, key, asked, options)}
                wanted = {key: asked for key, asked in wanted.items() if key not in good}
            bad += len(wanted)
            for key, asked in {} if options.check else wanted.items():
                _search(search, key, asked, good, options)
    return int(options.check and bad > 0)


def _holds(search: Search, key: Key, asked: Asked, options: argparse.Namespace) -> bool:
    """Whether the tile that is there needs no stack and fits."""
    tile = search.row(key)
    costs = _tried(search, key, asked, [tile], options)
    if tile not in costs:
        print(f"{tuple(key)}: {tuple(tile)} not compiled, no time left", flush=True)
        return True
    if costs[tile] != 0:
        why = "does not fit" if costs[tile] is None else f"{costs[tile]:.0f} bytes of stack"
        print(f"{tuple(key)}: {tuple(tile)} {why}", flush=True)
    return costs[tile] == 0


def _tried(
    search: Search, key: Key, asked: Asked, tiles: list[Tile], options: argparse.Namespace
) -> dict[Tile, float | None]:
    """What the tiles cost, one by one, until one is perfect or the time is over; what is known is not compiled again.

    A timed one that would cost more than the best so far has None; a compiled one is looked at to its end, since it is
    kept for other searches.
    """
    known = options.kept.costs(key, asked.fingerprint)
    costs: dict[Tile, float | None] = {}
    for tile in tiles:
        if tile not in known:
            if time.monotonic() > options.end:
                break
            least = min((cost for cost in costs.values() if cost is not None), default=math.inf)
            most = math.inf if options.compile is not None else least
            known[tile] = search.cost(key, tile, asked.calls, most)
            options.kept.keep(key, asked.fingerprint, known)
        costs[tile] = known[tile]
        if options.compile is not None and costs[tile] == 0:
            break
    return costs


def _search(search: Search, key: Key, asked: Asked, good: dict[Key, Tile], options: argparse.Namespace) -> None:
    """Finds a tile and writes its row; keys that are `good` keep theirs, and this one is from here on."""
    before = search.row(key)
    tiles = ([before] if options.mend else []) + candidates(key.kernel, key.bytes)
    costs = {tile: cost for tile, cost in _tried(search, key, asked, tiles, options).items() if cost is not None}
    if options.part is not None:
        return
    if not costs:
        print(f"{tuple(key)}: none of the tiles can be had, or no time was left", flush=True)
        return
    # Of equals the first.
    best = min(costs, key=costs.__getitem__)
    unit = "bytes of stack" if options.compile is not None else "ms"
    was = f"{costs[before]:.3f}" if before in costs else "?"
    print(f"{tuple(key)}: {tuple(best)} {costs[best]:.3f} {unit}, before {tuple(before)} {was}", flush=True)
    # A smaller head size without rows of its own goes on taking a larger one's.
    if not (options.mend and best == before):
        rows = search.settle(key, best, good)
        if options.write is not None:
            write_rows(options.write, rows)
    good[key] = best


if __name__ == "__main__":
    sys.exit(main())
