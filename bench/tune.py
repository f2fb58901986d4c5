"""The tiles of the Triton kernels of scores: candidates, the search, and the table that it rewrites.

    python -m pyxlbert.bench.tune [--write kernels/tiles.csv]               on a GPU: the fastest of the candidates
    python -m pyxlbert.bench.tune --compile 90 [--write ...]                anywhere: the first that needs no spills
    python -m pyxlbert.bench.tune --compile 90 --mend [--write ...]         only for those whose tile spills
    python -m pyxlbert.bench.tune --compile 90 --check                      says which those are

The table has a row per kernel, architecture, dtype's size, head size, and whether tiles have masks, dropout or segments
(`Key`).  Rows of other architectures stay as they are; a row that says what would be found without it is left out.
Every row is written as it is found.  What compiling has shown is kept in a file beside the build, so that a run that
was ended goes on where it was, and a later one compiles only what has changed since.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import fnmatch
import hashlib
import importlib
import json
import math
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from pyxlbert.bench import ahead
from torch import Tensor

from pyxlbert import backends, files
from pyxlbert.testing.specs import SPECS
from pyxlbert.testing.specs._spec import Arguments, Draw, Spec, Use

cards = importlib.import_module("pyxlbert.kernels._cards")
configurations = importlib.import_module("pyxlbert.kernels._configurations")
attention = importlib.import_module("pyxlbert.kernels.attention")
relative = importlib.import_module("pyxlbert.kernels._relative")

Key, Tile = configurations.Key, configurations.Tile

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Of the ops whose kernels hold a window of the table too.
MOST_HEAD_SIZE = {"relative_attention": 128}
Call = Callable[[], Any]


def _tiles(*sizes: tuple[int, ...]) -> list[Tile]:
    return [Tile(*size) for size in sizes]


# By kernel and bytes of an element, in the order that is thought best: large tiles use what they load more often.
# 255 registers for each thread are all that an SM has for 8 warps.
CANDIDATES: dict[tuple[str, int], list[Tile]] = {
    ("attention_fwd", 2): _tiles(
        (128, 64, 4, 3), (128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 1),
        (64, 64, 8, 2), (64, 64, 8, 1), (64, 32, 4, 2), (64, 32, 4, 1), (64, 32, 8, 1), (32, 32, 4, 1), (32, 16, 4, 1),
        (32, 16, 8, 1),
    ),
    ("attention_fwd", 4): _tiles(
        (64, 32, 4, 1), (64, 16, 4, 1), (32, 32, 4, 1), (32, 32, 8, 1), (32, 16, 4, 1), (32, 16, 8, 1), (16, 32, 8, 1),
        (16, 16, 4, 1), (16, 16, 8, 1),
    ),
    ("attention_bwd", 2): _tiles(
        (64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 8, 1), (64, 64, 4, 1), (32, 64, 4, 1), (64, 32, 4, 1), (32, 64, 8, 1),
        (64, 32, 8, 1), (32, 32, 4, 1), (32, 32, 8, 1), (16, 64, 8, 1), (16, 32, 4, 1), (16, 32, 8, 1), (16, 16, 4, 1),
        (16, 16, 8, 1),
    ),
    ("attention_bwd", 4): _tiles(
        (32, 32, 4, 1), (32, 32, 8, 1), (32, 16, 4, 1), (32, 16, 8, 1), (16, 32, 4, 1), (16, 32, 8, 1), (16, 16, 4, 1),
        (16, 16, 8, 1),
    ),
    # What FlexAttention begins with: the rows that stay are many, and what walks past them is used more often.
    ("attention_bwd_keys", 2): _tiles((64, 128, 8, 3), (64, 128, 8, 2)),
    ("attention_bwd_queries", 2): _tiles((128, 64, 8, 3), (128, 64, 8, 2)),
    ("relative_fwd", 2): _tiles(
        (64, 64, 4, 2), (64, 64, 4, 1), (64, 64, 8, 1), (32, 64, 4, 1), (32, 64, 8, 1), (32, 32, 4, 1), (32, 32, 8, 1),
        (16, 32, 4, 1), (16, 32, 8, 1), (16, 16, 4, 1), (16, 16, 8, 1),
    ),
    ("relative_bwd", 2): _tiles(
        (64, 64, 8, 1), (32, 64, 4, 1), (32, 64, 8, 1), (32, 32, 4, 1), (32, 32, 8, 1), (16, 64, 4, 1), (16, 64, 8, 1),
        (16, 32, 4, 1), (16, 32, 8, 1), (16, 16, 4, 1), (16, 16, 8, 1),
    ),
    ("relative", 4): _tiles(
        (32, 32, 4, 1), (32, 32, 8, 1), (16, 32, 4, 1), (16, 32, 8, 1), (16, 16, 4, 1), (16, 16, 8, 1),
    ),
    ("positions", 2): _tiles((16, 64, 4, 1), (16, 32, 4, 1), (16, 32, 8, 1), (16, 16, 4, 1), (16, 16, 8, 1)),
    ("positions", 4): _tiles((16, 32, 4, 1), (16, 32, 8, 1), (16, 16, 4, 1), (16, 16, 8, 1)),
}  # fmt: skip


def candidates(kernel: str, size: int) -> list[Tile]:
    """The tiles to try for a kernel and an element of `size` bytes."""
    if kernel.startswith("attention"):
        usual = CANDIDATES["attention_fwd" if kernel == "attention_fwd" else "attention_bwd", size]
        return usual if kernel == "attention_fwd" else CANDIDATES.get((kernel, size), []) + usual
    carries: tuple[bool | None, ...] = (None,)
    if kernel in configurations.CARRYING:
        carries = (False,) if kernel.endswith("_positions") else (True, False)
    if kernel.endswith("_positions"):
        found = CANDIDATES["positions", size]
    elif size == 4:
        found = CANDIDATES["relative", 4]
    else:
        forward = kernel in ("relative_fwd", "relative_bwd_rows")
        found = CANDIDATES["relative_fwd" if forward else "relative_bwd", 2]
    registers = (255, None) if size == 4 or kernel == "relative_bwd_table" else (255,)
    return [tile._replace(CARRY=carry, maxnreg=most) for tile in found for carry in carries for most in registers]


def calls(head_size: int, dtype: torch.dtype, shapes: Iterable[tuple[int, int]], device: str) -> Iterator[Call]:
    """Every case that tiles are searched for (`Use.TILES`), forward and backward, at each (sequences, length)."""
    generator = torch.Generator(device).manual_seed(0)
    for batch, length in shapes:
        for spec in SPECS.values():
            for case in spec.used(Use.TILES):
                if head_size > MOST_HEAD_SIZE.get(spec.name, head_size):
                    continue
                inputs = case.inputs.sized(batch, length, head_size)
                arguments = spec.make(inputs, Draw(generator, dtype, torch.device(device)))
                yield partial(_both_ways, spec, arguments)


def _both_ways(spec: Spec, arguments: Arguments) -> None:
    names = spec.leaves(arguments)
    leaves = {name: arguments[name].detach().requires_grad_() for name in names}
    out = spec.function(**arguments | leaves, backend="triton")
    dout = out.detach()
    # Only relative attention's gradient of the table knows another way.
    for atomics in (contextlib.nullcontext(), backends.allow_atomics())[: 1 if spec.name == "attention" else 2]:
        with atomics:
            torch.autograd.grad(out, list(leaves.values()), dout, retain_graph=True)


class Asked(NamedTuple):
    """Of a key the calls that meet it, and a fingerprint of all that its kernels are compiled from but for the tile."""

    calls: list[Call]
    fingerprint: str


def source_of(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> str:
    """A launch as the compiler sees it, without its tile: the source of the kernel and what it calls, and the kinds of
    its arguments."""
    given = {name: _kind(value) for name, value in options.items() if name not in Tile._fields}
    # An interpreted kernel has no key; nothing is compiled from it.
    source = getattr(kernel, "cache_key", kernel.__name__)
    return repr((triton.__version__, source, [_kind(value) for value in arguments], sorted(given.items())))


def _kind(value: Any) -> str:
    """Of an argument what Triton compiles a kernel for: of a size whether it is 1, whether 16 divides it, its width."""
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_kind, value)) + ")"
    if isinstance(value, Tensor):
        return f"{value.dtype} {value.data_ptr() % 16 == 0}"
    if isinstance(value, int) and not isinstance(value, bool):
        # A negative one is no size but a constant.
        return str(value) if value <= 1 else f"int {value % 16 == 0} {value < 2**31}"
    return type(value).__name__ if isinstance(value, float) else repr(value)


class Search:
    """Watches the launches of calls, and tries tiles on the kernel that is looked at.

    Args:
        architecture: compute capability times ten.
        judge: of a launch with a candidate, what it costs, or None where it cannot be had.
        run: whether what is not looked at runs too, so that what is has numbers to work on.
    """

    def __init__(self, architecture: int, judge: Callable[..., float | None], run: bool) -> None:
        self.architecture, self.judge, self.run = architecture, judge, run
        # With the rows that were found: smaller head sizes are asked with those of larger ones.
        self.table = dict(configurations.TABLE)
        self.now: Key | None = None
        self.wanted: Key | None = None
        self.candidate: Tile | None = None
        self.costs: list[float | None] = []
        # What every launch of a key is compiled from, in the order of the calls.
        self.seen: dict[Key, list[str]] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside the block the kernels ask here for their tiles, and are launched here."""
        before = [(module, module.configuration, module.launch) for module in (attention, relative)]
        anywhere = contextlib.nullcontext() if self.run else ahead.launching(self._launch, self.architecture)
        with anywhere:
            for module, _, _ in before:
                module.configuration, module.launch = self._configuration, self._launch
            try:
                yield
            finally:
                for module, configuration, launch in before:
                    module.configuration, module.launch = configuration, launch

    def _configuration(self, kernel: str, query: Tensor, extras: bool, segments: bool = False) -> Tile:
        size, head_size = query.element_size(), query.shape[-1]
        padded = next(most for most in configurations.HEAD_SIZES if head_size <= most)
        self.now = Key(kernel, self.architecture, size, padded, extras, segments)
        if self.now == self.wanted and self.candidate is not None:
            return self.candidate
        return self.row(self.now)

    def row(self, key: Key) -> Tile:
        """The tile that a key has."""
        return self.table[configurations.best_of(self.table, key.kernel, _card(self.architecture), *key[2:])]

    def settle(self, key: Key, tile: Tile, good: dict[Key, Tile]) -> dict[Key, Tile]:
        """Gives a key a tile, and returns the rows for it.

        A call without segments takes the row of one with them where it has none.  So keys that are `good`, whose tiles
        the new row would change, get rows of their own.
        """
        rows = {key: tile}
        self.table |= rows
        rows |= {other: its for other, its in good.items() if self.row(other) != its}
        self.table |= rows
        return rows

    def _launch(
        self, kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **options: Any
    ) -> None:
        if self.wanted is None:
            self.seen.setdefault(self.now, []).append(source_of(kernel, arguments, options))
        if self.now == self.wanted:
            self.costs.append(self.judge(kernel, grid, arguments, options))
        elif self.run:
            kernel[grid](*arguments, **options)

    def keys(self, calls: list[Call]) -> dict[Key, Asked]:
        """What the calls ask for, and of each key which of them do and what its kernels are compiled from."""
        self.wanted, self.candidate, found = None, None, {}
        with self.watching():
            for call in calls:
                self.seen = {}
                call()
                for key, sources in self.seen.items():
                    before = found.get(key, Asked([], ""))
                    text = "\n".join([before.fingerprint, *sources])
                    found[key] = Asked([*before.calls, call], hashlib.sha256(text.encode()).hexdigest())
        return found

    def cost(self, key: Key, tile: Tile, calls: list[Call], most: float = math.inf) -> float | None:
        """The sum over all launches of the kernel, or None where one cannot be had or it comes to more than `most`."""
        self.wanted, self.candidate, self.costs = key, tile, []
        with self.watching():
            for call in calls:
                call()
                if None in self.costs or sum(self.costs) > most:
                    return None
        return sum(self.costs)


def _card(architecture: int) -> Any:
    """The usual card of an architecture: those that are not known have the shared memory of the first."""
    return cards.Card(architecture, ahead.SHARED.get(architecture, cards.LARGE_SHARED))


def compiled(architecture: int) -> Callable[..., float | None]:
    """A judge: bytes of stack.  What has the same PTX for several architectures Triton compiles once, and keeps."""
    ahead.compile_for(ahead.SAME_PTX.get(architecture, architecture))
    # Calls that differ in what is no constant share a kernel.
    known: dict[str, int] = {}

    def judge(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> float | None:
        found = kernel.warmup(*arguments, grid=grid, **options)
        if found.metadata.shared > ahead.SHARED[architecture]:
            return None
        if found.hash not in known:
            known[found.hash] = ahead.stack(ahead.assembled(found, architecture))
        return known[found.hash]

    return judge


def timed(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> float | None:
    """A judge: milliseconds on the GPU that is here; what spills or does not fit cannot be had."""
    try:
        found = kernel[grid](*arguments, **options)
    except triton.runtime.errors.OutOfResources:
        return None
    if found.n_spills:
        return None
    return triton.testing.do_bench(lambda: kernel[grid](*arguments, **options), warmup=3, rep=20, return_mode="median")


def compiling_part(part: int, parts: int) -> Callable[..., float | None]:
    """A judge that only fills Triton's cache with its part of the kernels."""

    def judge(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> float | None:
        name = repr((kernel.__name__, sorted((k, v) for k, v in options.items()), [x is None for x in arguments]))
        if zlib.crc32(name.encode()) % parts == part:
            kernel.warmup(*arguments, grid=grid, **options)
        return 0.0

    return judge


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
            if kept[configurations.best_of(others, key.kernel, _card(key.architecture), *key[2:])] == table[key]:
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
