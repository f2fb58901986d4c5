"""Tile sizes, warps and pipeline stages of the attention kernels, by kernel, architecture, dtype and head size.

A table, `tiles.csv`, and not a search in the user's first call.  Its rows were found by compiling: of several tiles one
of the first that need no spills on the architecture, and no more shared memory than its cards have.  None has been
timed yet.  `python -m pyxlbert.bench.tune` writes it.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ._cards import SMALL_SHARED, Card, card, holds_for
from ._launch import INTERPRETED, refusal


class Tile(NamedTuple):
    """BLOCK_M queries by BLOCK_N keys, the warps that share them, and how many loads are under way at once.

    CARRY, where a kernel has that choice: whether one tile's products with the band are kept for the next.  maxnreg:
    the registers that a thread may have.  255 are all there are; told nothing ptxas takes what it thinks best, and
    spills a few of them to let one more block run beside, or needs fewer and spills none.

    FRESH and PIECES are for kernels that spill otherwise (`RENEWING`, `CUTTING`), and None for all others.  FRESH: the
    addresses of rows are computed anew for every tile, instead of once, to be kept in registers (see `unknown_zero`).
    PIECES: into how many pieces long rows of float32 are cut that meet keys and values, 2 or 4; None: as the kernel
    does by itself.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    CARRY: bool | None = None
    maxnreg: int | None = 255
    FRESH: bool | None = None
    PIECES: int | None = None

    def constants(self) -> dict[str, int | bool]:
        """What is given to the kernel, and to the compiler."""
        given = {name: value for name, value in self._asdict().items() if value is not None}
        if torch.version.hip is not None:
            given.pop("maxnreg", None)
        return given


class Key(NamedTuple):
    """What a row of the table is for.

    Attributes:
        kernel: its name.
        architecture: compute capability times ten; the row holds from it up to the next one of the same kind, for
            cards with as much shared memory as those of this architecture (see `holds_for`).
        bytes: of an element.
        head_size: the largest that the row is for; a smaller one without rows of its own takes the row too.
        extras: with a mask, a bias, ranks or dropout, which take registers of their own.
        segments: with the term of segments, whose registers are many.  Such a row is for calls without it too, where
            the kernel has none for them at this head size.
    """

    kernel: str
    architecture: int
    bytes: int
    head_size: int
    extras: bool
    segments: bool = False


HEAD_SIZES = (32, 64, 96, 128, 256)


def read_table(path: Path) -> dict[Key, Tile]:
    """The rows of a table of tiles: CSV, with the names of `Key` and `Tile` in its first line and nothing for None.

    Raises:
        ValueError: the file is no such table, or two of its rows are for the same calls.
    """
    table: dict[Key, Tile] = {}
    with path.open(newline="", encoding="utf-8") as file:
        lines = csv.reader(file)
        if next(lines, None) != [*Key._fields, *Tile._fields]:
            wanted = ",".join((*Key._fields, *Tile._fields))
            raise ValueError(f"{path}: got no table of tiles, wanted {wanted} as its first line")
        for cells in lines:
            where = f"{path}, line {lines.line_num}"
            if not cells:
                raise ValueError(f"{where}: got nothing, wanted a row of tiles")
            kernel, *numbers = cells
            try:
                values = [_VALUES[cell] if cell in _VALUES else int(cell) for cell in numbers]
                key, tile = Key(kernel, *values[: len(Key._fields) - 1]), Tile(*values[len(Key._fields) - 1 :])
            except (TypeError, ValueError):
                raise ValueError(f"{where}: got {','.join(cells)}, which is no row of tiles") from None
            if key in table:
                raise ValueError(f"{where}: got a second row for {tuple(key)}")
            table[key] = tile
    return table


_VALUES: dict[str, bool | None] = {"": None, "False": False, "True": True}
TABLE = read_table(Path(__file__).with_name("tiles.csv"))

# How kernels of scores are compiled: no fused multiply-add (see _attention.py).
COMPILE_OPTIONS = {"enable_fp_fusion": False}

# In the interpreter the sizes of tests are a few tiles of these.  The band of a relative tile is two blocks of keys, so
# that it has at least as many keys as queries.
_INTERPRETED = Tile(32, 16, 4, 1)
_INTERPRETED_RELATIVE = Tile(32, 32, 4, 1)
# The kernels of `_relative.py` that can carry the band; queries at positions of their own have none to carry.
CARRYING = tuple(
    f"relative_{kernel}{positions}"
    for kernel in ("fwd", "bwd_queries", "bwd_queries_table")
    for positions in ("", "_positions")
)
# Those that can compute addresses anew, and those that can cut rows into another number of pieces.
CUTTING = tuple(kernel for kernel in CARRYING if not kernel.startswith("relative_fwd"))
RENEWING = ("relative_bwd_keys", "relative_bwd_keys_positions", *CUTTING)


def configuration(kernel: str, query: Tensor, extras: bool, segments: bool = False) -> Tile:
    """The tile of a kernel for these queries `[..., D]`; `extras` and `segments` as in `Key`."""
    if INTERPRETED:
        if not kernel.startswith("relative"):
            return _INTERPRETED
        return _INTERPRETED_RELATIVE._replace(CARRY=True if kernel in CARRYING else None)
    return row_for(kernel, card(query.device), query.element_size(), query.shape[-1], extras, segments)


@functools.cache
def row_for(kernel: str, card: Card, size: int, head_size: int, extras: bool, segments: bool = False) -> Tile:
    """The tile of the best of the rows that are for such a call; see `best_of`."""
    return TABLE[best_of(TABLE, kernel, card, size, head_size, extras, segments)]


def best_of(
    rows: Iterable[Key], kernel: str, card: Card, size: int, head_size: int, extras: bool, segments: bool
) -> Key:
    """Of the rows for this head size and larger ones the smallest's; of those the ones without segments, if they are
    for the call and there are some; of those the newest that holds for the card.
    """
    found = (
        key
        for key in rows
        if (key.kernel, key.bytes, key.extras) == (kernel, size, extras)
        and holds_for(key.architecture, card)
        and head_size <= key.head_size
        and segments <= key.segments
    )
    return min(found, key=lambda key: (key.head_size, key.segments, -key.architecture))


def refusal_of_heads(kernel: str, *tensors: Tensor | None) -> str | None:
    """The `supports` of the ops of scores: head sizes that have a tile, on a card that has room for it."""
    head_size = tensors[0].shape[-1] if tensors and tensors[0] is not None and tensors[0].dim() else 0
    most = max_head_size(kernel)
    if head_size > most:
        return f"it takes head sizes of at most {most}, not {head_size}"
    reason = refusal(*tensors)
    if reason is not None or INTERPRETED or not tensors or tensors[0] is None:
        return reason
    return lack_of_room(tensors[0].device.index or 0)


def lack_of_room(device: int) -> str | None:
    """Why no tile fits the CUDA device of this index, or None."""
    shared = card(torch.device("cuda", device)).shared
    if shared >= SMALL_SHARED:
        return None
    return f"its tiles take up to {SMALL_SHARED} bytes of shared memory, and a block of this device has {shared}"


# What `torch.compiler.assume_constant_result` sets: a compiler calls this and does not trace it.
lack_of_room._dynamo_marked_constant = True  # type: ignore[attr-defined]


# Of each kernel the largest head size that the table has a tile for.
_MAX_HEAD_SIZES = {kernel: max(key.head_size for key in TABLE if key.kernel == kernel) for kernel, *_ in TABLE}


def max_head_size(kernel: str) -> int:
    """The largest head size that the table has a tile of this kernel for."""
    return _MAX_HEAD_SIZES[kernel]
