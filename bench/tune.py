"""The tiles of the Triton kernels of scores: candidates, the search, and the table that it rewrites.

    python -m pyxlbert.bench.tune [--write kernels/_configurations.py]      on a GPU: the fastest of the candidates
    python -m pyxlbert.bench.tune --compile 90 [--write ...]                anywhere: the first that needs no spills
    python -m pyxlbert.bench.tune --compile 90 --mend [--write ...]         only for those whose tile spills

The table has a row per kernel, architecture, dtype's size, head size, and whether tiles have masks or dropout (`Key`).
Rows of other architectures stay as they are; a row that says what an older architecture's does is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from pyxlbert.bench import ahead
from torch import Tensor

from pyxlbert import backends
from pyxlbert.testing.specs import SPECS
from pyxlbert.testing.specs._spec import Arguments, Draw, Spec, Use

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
        return CANDIDATES["attention_fwd" if kernel == "attention_fwd" else "attention_bwd", size]
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
    registers = (255, None) if size == 4 else (255,)
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


class Search:
    """Watches the launches of calls, and tries tiles on the kernel that is looked at.

    Args:
        architecture: compute capability times ten.
        judge: of a launch with a candidate, what it costs, or None where it cannot be had.
        run: whether what is not looked at runs too, so that what is has numbers to work on.
    """

    def __init__(self, architecture: int, judge: Callable[..., float | None], run: bool) -> None:
        self.architecture, self.judge, self.run = architecture, judge, run
        self.now: Key | None = None
        self.wanted: Key | None = None
        self.candidate: Tile | None = None
        self.costs: list[float | None] = []
        self.seen: dict[Key, None] = {}

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

    def _configuration(self, kernel: str, query: Tensor, extras: bool) -> Tile:
        size, head_size = query.element_size(), query.shape[-1]
        padded = next(most for most in configurations.HEAD_SIZES if head_size <= most)
        self.now = Key(kernel, self.architecture, size, padded, extras)
        self.seen[self.now] = None
        if self.now == self.wanted and self.candidate is not None:
            return self.candidate
        return configurations.row_for(kernel, _card(self.architecture), size, head_size, extras)

    def _launch(
        self, kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **options: Any
    ) -> None:
        if self.now == self.wanted:
            self.costs.append(self.judge(kernel, grid, arguments, options))
        elif self.run:
            kernel[grid](*arguments, **options)

    def keys(self, calls: list[Call]) -> list[Key]:
        """What the calls ask for."""
        self.wanted, self.candidate, self.seen = None, None, {}
        with self.watching():
            for call in calls:
                call()
        return list(self.seen)

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
    return configurations.Card(architecture, ahead.SHARED.get(architecture, configurations.LARGE_SHARED))


def compiled(architecture: int) -> Callable[..., float | None]:
    """A judge: bytes of stack."""

    def judge(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> float | None:
        found = kernel.warmup(*arguments, grid=grid, **options)
        return None if found.metadata.shared > ahead.SHARED[architecture] else ahead.report(found)["stack"]

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


def write_table(path: Path, table: dict[Key, Tile]) -> None:
    """Rewrites TABLE in the source file, whole or not at all.

    Raises:
        ValueError: there is no such table in the file.
    """
    rows = []
    for key in sorted(table, key=lambda key: (key.kernel, -key.bytes, key.head_size, key.extras, key.architecture)):
        older = [other for other in table if other[2:] == key[2:] and other.kernel == key.kernel]
        older = [other for other in older if other.architecture < key.architecture]
        older = [other for other in older if configurations.holds_for(other.architecture, _card(key.architecture))]
        if older and table[max(older, key=lambda other: other.architecture)] == table[key]:
            continue
        name, *numbers = key
        *numbers_of_tile, maxnreg = table[key]
        tile = ", ".join(str(value) for value in numbers_of_tile if value is not None)
        if maxnreg != Tile._field_defaults["maxnreg"]:
            tile += f", maxnreg={maxnreg}"
        rows.append(f'    Key("{name}", {", ".join(str(n) for n in numbers)}): Tile({tile}),\n')
    text = path.read_text(encoding="utf-8")
    new, count = re.subn(
        r"(^TABLE: dict\[Key, Tile\] = \{\n).*?(^\}\n)",
        lambda found: found[1] + "".join(rows) + found[2],
        text,
        flags=re.MULTILINE | re.DOTALL,
    )
    if count != 1:
        raise ValueError(f"{path}: got no table, wanted one that begins with 'TABLE: dict[Key, Tile] = {{'")
    part = path.with_suffix(".part")
    part.write_text(new, encoding="utf-8")
    part.replace(path)


def main(arguments: list[str] | None = None) -> int:
    """Searches, prints each row, and writes the table where it is told to."""
    parser = argparse.ArgumentParser(prog="python -m pyxlbert.bench.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--compile", type=int, choices=ahead.ARCHITECTURES, help="no GPU: the first without spills")
    parser.add_argument("--mend", action="store_true", help="with --compile: rows whose tile needs no spills stay")
    parser.add_argument("--kernels", default="", help="only those whose name begins with this text")
    parser.add_argument("--head-sizes", type=int, nargs="+", default=[64, 128], choices=configurations.HEAD_SIZES)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--tokens", type=int, default=8192, help="of a timed call, in sequences of 512 and of 2048")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile ahead of timing")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path, help="the source file whose table is rewritten")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET: got 1, wanted it unset: the interpreter has no tiles to choose")
    if options.mend and options.compile is None:
        parser.error("--mend: wanted --compile beside it")
    if options.write is not None and not options.write.is_file():
        # Known before the search, not after it.
        parser.error(f"--write: got {options.write}, which is no file, wanted the one whose table is rewritten")
    if options.compile is not None:
        architecture, device, shapes, judge = options.compile, "cpu", [(2, 512)], compiled(options.compile)
        ahead.compile_for(architecture)
    elif not torch.cuda.is_available():
        parser.error("no CUDA device is here: give --compile ARCHITECTURE, or run where one is")
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
    table = dict(configurations.TABLE)
    for head_size in options.head_sizes:
        for dtype in options.dtypes:
            made = list(calls(head_size, DTYPES[dtype], shapes, device))
            for key in search.keys(made):
                if not key.kernel.startswith(options.kernels):
                    continue
                before = configurations.row_for(key.kernel, _card(architecture), key.bytes, head_size, key.extras)
                costs: dict[Tile, float] = {}
                for tile in ([before] if options.mend else []) + candidates(key.kernel, key.bytes):
                    cost = search.cost(key, tile, made, min(costs.values(), default=math.inf))
                    if cost is not None:
                        costs[tile] = cost
                    if cost == 0.0 and options.compile is not None:
                        break
                if options.part is not None or not costs:
                    continue
                best = min(costs, key=costs.__getitem__)
                if not options.mend or best != before:
                    # A smaller head size without rows of its own goes on taking a larger one's.
                    table[key] = best
                unit = "bytes of stack" if options.compile is not None else "ms"
                was = f"{costs[before]:.3f}" if before in costs else "?"
                print(f"{tuple(key)}: {tuple(best)} {costs[best]:.3f} {unit}, before {tuple(before)} {was}", flush=True)
    if options.write is not None:
        write_table(options.write, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
