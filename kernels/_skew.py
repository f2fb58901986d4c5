"""How a tile of scores by distance is read from the position table: the skewed band.

A tile of BLOCK_M queries and BLOCK_N keys meets a band of the position table.  Query i, at position p_i, meets key j at
row c + j - p_i, so that in the product of the queries with the band's rows every line has to be moved, by another
number of columns each:

    table rows   first .. first + BLOCK_N - 1     first + BLOCK_N ..
                 +------------------------+------------------------+
    query m      |      . x x x x x x x x | x x x . . . . . . . .  |   x: the BLOCK_N elements that line m needs,
    query m + 1  |    . x x x x x x x x x | x x . . . . . . . . .  |      from column shift_m on
                 +------------------------+------------------------+

Neighbouring queries need at most two blocks of columns, and of every column of the two just one element per line:
they are mixed first, and the skew is then a rotation, `rotated`.  It is a gather on the tile laid out flat in shared
memory, in an order of bits that keeps lanes in different banks (`swizzled`, `place`); a gather along one axis would go
through shuffles, four times slower and with spills.  Queries that stand anywhere (`query_positions`) are sorted by
position first, and take as many blocks of the band as their positions spread over.

A program that walks the keys may carry the products with the upper block on (CARRY, a choice of the table of tiles, as
they take registers): they are the next tile's with its lower one, and the position term then costs one product a tile,
as the content term does.

Source: Dai et al., "Transformer-XL", https://arxiv.org/abs/1901.02860, appendix B (`rel_shift`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ._attention import UNSEEN_RANK
from ._products import add_product, row_products, row_products_of_two


class Matrix(NamedTuple):
    """Rows `[count, D]` of one plane: their address, their stride, and the ranks by which some are not read, or None.

    A row of rank UNSEEN_RANK is seen by no query.
    """

    base: Any
    stride: Any
    count: Any
    rank: Any


@triton.jit
def place(m, c, W: tl.constexpr):
    """Where `swizzled` puts element (m, c) of `[M, W]`."""
    return (m // 8) * (8 * W) + (c // 8) * 64 + (c & 1) * 32 + ((c // 2) & 3) * 8 + (m & 7)


@triton.jit
def swizzled(x, M: tl.constexpr, W: tl.constexpr):
    """`[M, W]` laid out flat, its bits in the order (m / 8, c / 8, c % 2, c / 2 % 4, m % 8).

    The eight lines and four pairs of columns of a matrix instruction's result then lie in 32 different banks.
    """
    x = tl.permute(tl.reshape(x, (M // 8, 8, W // 8, 4, 2)), (0, 2, 4, 3, 1))
    return tl.reshape(x, (M * W,))


@triton.jit
def rotated(x, shift, M: tl.constexpr, W: tl.constexpr):
    """y[m, n] = x[m, (n + shift_m) mod W], with W a power of two."""
    m = tl.arange(0, M)[:, None]
    c = (tl.arange(0, W)[None, :] + shift[:, None]) & (W - 1)
    return tl.reshape(tl.gather(swizzled(x, M, W), tl.reshape(place(m, c, W), (M * W,)), 0), (M, W))


@triton.jit
def load_seen(matrix, first, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows first .. first + BLOCK - 1, zeros where there is none, `first` may be negative, or none is seen."""
    n = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    seen = (first + n >= 0) & (first + n < matrix.count)
    if matrix.rank is not None:
        seen = seen & (tl.load(matrix.rank + first + n, mask=seen, other=UNSEEN_RANK) != UNSEEN_RANK)
    inside = seen[:, None]
    if D != BLOCK_D:
        inside = inside & (d < D)[None, :]
    at = matrix.base + tl.cast(first, tl.int64) * matrix.stride
    return tl.load(at + (n[:, None] * matrix.stride + d[None, :]), mask=inside, other=0.0)


@triton.jit
def unknown_zero(zero, step):
    """0, which no compiler knows to be one: the zero of the turn before, in a loop over steps from 0 up.

    A stride to which it is added is another one in every turn, as far as a compiler can see.  So what follows from the
    stride, the place of every row that a thread reads, is computed where it is used.  Otherwise it is taken out of the
    loop, and lies in some twenty registers while products need them.  16 divides it, so that loads stay as wide.
    """
    return tl.multiple_of(tl.minimum(zero, step), 16)


@triton.jit
def products(
    x, matrix, first, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """`[BLOCK_M, BLOCK_N]`: every line of x times rows first .. first + BLOCK_N - 1 of a matrix."""
    return row_products(x, load_seen(matrix, first, BLOCK_N, D, BLOCK_D), None, PRECISION)


@triton.jit
def mixed(
    x, matrix, first, shift, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """`skewed` before it is `rotated`: column n is of row first + n, or of the next block's where n < shift_m."""
    low = load_seen(matrix, first, BLOCK_N, D, BLOCK_D)
    high = load_seen(matrix, first + BLOCK_N, BLOCK_N, D, BLOCK_D)
    left, right = row_products_of_two(x, low, high, PRECISION)
    return tl.where(tl.arange(0, BLOCK_N)[None, :] >= shift[:, None], left, right)


@triton.jit
def skewed(
    x, matrix, first, shift, spread, TWO: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`[BLOCK_M, BLOCK_N]`: line m of x times row first + n + shift_m of a matrix, 0 <= shift <= spread.

    With TWO, spread <= BLOCK_N.
    """
    if TWO:
        return rotated(mixed(x, matrix, first, shift, PRECISION, D, BLOCK_D, BLOCK_N), shift, BLOCK_M, BLOCK_N)
    else:
        n = tl.arange(0, BLOCK_N)[None, :]
        tile = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        m = tl.arange(0, BLOCK_M)[:, None]
        for start in range(0, spread + BLOCK_N, BLOCK_N):
            band = products(x, matrix, first + start, PRECISION, D, BLOCK_D, BLOCK_N)
            c = n + shift[:, None] - start
            inside = (c >= 0) & (c < BLOCK_N)
            at = tl.reshape(place(m, tl.where(inside, c, 0), BLOCK_N), (BLOCK_M * BLOCK_N,))
            found = tl.gather(swizzled(band, BLOCK_M, BLOCK_N), at, 0)
            tile = tl.where(inside, tl.reshape(found, (BLOCK_M, BLOCK_N)), tile)
        return tile


@triton.jit
def rolled(
    x, lower, matrix, first, shift, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`skewed` for one tile after another: `lower` is the products with the lower block, and those with the upper one
    are returned beside the tile, since they are what the next tile begins with.
    """
    upper = products(x, matrix, first + BLOCK_N, PRECISION, D, BLOCK_D, BLOCK_N)
    n = tl.arange(0, BLOCK_N)[None, :]
    return rotated(tl.where(n >= shift[:, None], lower, upper), shift, BLOCK_M, BLOCK_N), upper


@triton.jit
def unskewed(g, shift, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile back in the order of the band, its two blocks in one; and which elements are of the lower block."""
    return rotated(g, -shift, BLOCK_M, BLOCK_N), tl.arange(0, BLOCK_N)[None, :] >= shift[:, None]


@triton.jit
def add_block(
    acc, block, x, matrix, gradient, first,
    PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """acc plus a block of gradients in the band's order times rows first .. of a matrix.

    With a gradient of the matrix, what the lines of x add to it, by atomics.
    """
    block = block.to(matrix.base.dtype.element_ty)
    acc = add_product(block, load_seen(matrix, first, BLOCK_N, D, BLOCK_D), acc, PRECISION)
    if gradient.base is not None:
        n = tl.arange(0, BLOCK_N)
        d = tl.arange(0, BLOCK_D)
        inside = ((first + n >= 0) & (first + n < gradient.count))[:, None] & (d < D)[None, :]
        part = tl.dot(tl.trans(block), x, input_precision=PRECISION)
        row = tl.cast(first + n, tl.int64) * gradient.stride
        tl.atomic_add(gradient.base + row[:, None] + d[None, :], part, mask=inside, sem="relaxed")
    return acc


@triton.jit
def add_band(
    acc, g, x, matrix, gradient, first, shift, spread, TWO: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """acc plus, for line m, the sum over n of g[m, n] times row first + n + shift_m: the counterpart of `skewed`."""
    if TWO:
        back, inside = unskewed(g, shift, BLOCK_M, BLOCK_N)
        low = tl.where(inside, back, 0.0)
        acc = add_block(acc, low, x, matrix, gradient, first, PRECISION, D, BLOCK_D, BLOCK_N)
        high = tl.where(inside, 0.0, back)
        acc = add_block(acc, high, x, matrix, gradient, first + BLOCK_N, PRECISION, D, BLOCK_D, BLOCK_N)
    else:
        c = tl.arange(0, BLOCK_N)[None, :]
        m = tl.arange(0, BLOCK_M)[:, None]
        flat = swizzled(g, BLOCK_M, BLOCK_N)
        for start in range(0, spread + BLOCK_N, BLOCK_N):
            n = c + start - shift[:, None]
            inside = (n >= 0) & (n < BLOCK_N)
            at = tl.reshape(place(m, tl.where(inside, n, 0), BLOCK_N), (BLOCK_M * BLOCK_N,))
            band = tl.where(inside, tl.reshape(tl.gather(flat, at, 0), (BLOCK_M, BLOCK_N)), 0.0)
            acc = add_block(acc, band, x, matrix, gradient, first + start, PRECISION, D, BLOCK_D, BLOCK_N)
    return acc
