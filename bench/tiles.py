"""The tiles that are tried for the Triton kernels of scores, and what tries them: a search over the launches of calls.

The table has a row per kernel, architecture, dtype's size, head size, and whether tiles have masks, dropout or segments
(`Key`).  `bench/tune.py` is the command that reads and writes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from pyxlbert.bench import ahead
from torch import Tensor

from pyxlbert import backends
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
    usual = [tile._replace(CARRY=carry, maxnreg=most) for tile in found for carry in carries for most in registers]
    if size == 2 or kernel not in configurations.RENEWING:
        return usual
    # Last, since they compute more: the small tiles, with what leaves more registers free.
    small = [tile._replace(FRESH=True) for tile in usual if (tile.BLOCK_M, tile.BLOCK_N, tile.num_warps) == (16, 16, 8)]
    halved = [tile._replace(PIECES=2) for tile in small] if kernel in configurations.CUTTING else []
    return usual + small + halved


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
        return self.table[configurations.best_of(self.table, key.kernel, usual_card(self.architecture), *key[2:])]

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


def usual_card(architecture: int) -> Any:
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
