"""Products of tiles, of long rows of float32 in pieces that fit the registers.

Triton multiplies float32 outside the tensor cores, and keeps all columns of both sides in a thread's registers for it:
more than 64 columns are taken in pieces.  Which columns go together is left to where they lie already, the even ones
and the odd ones, since a sum over columns does not ask.  How many pieces was found by compiling, as the tiles of
_configurations.py were.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def halves(x):
    """The even and the odd columns of `[M, D]`."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def quarters(x):
    """Every fourth column of `[M, D]`, from columns 0, 2, 1 and 3 on."""
    even, odd = halves(x)
    first, third = halves(even)
    second, fourth = halves(odd)
    return first, third, second, fourth


@triton.jit
def row_products(x, y, acc, PRECISION: tl.constexpr, PIECES: tl.constexpr = 4, MOST: tl.constexpr = 64):
    """`[M, N]`: every row of x `[M, D]` times every row of y `[N, D]`, added to acc unless that is None.

    Up to MOST columns are multiplied at once.
    """
    if PRECISION != "ieee" or x.dtype != tl.float32 or x.shape[1] <= MOST:
        return tl.dot(x, tl.trans(y), acc, input_precision=PRECISION)
    elif PIECES == 2:
        x_even, x_odd = halves(x)
        y_even, y_odd = halves(y)
        acc = tl.dot(x_even, tl.trans(y_even), acc, input_precision=PRECISION)
        return tl.dot(x_odd, tl.trans(y_odd), acc, input_precision=PRECISION)
    else:
        x0, x1, x2, x3 = quarters(x)
        y0, y1, y2, y3 = quarters(y)
        acc = tl.dot(x0, tl.trans(y0), acc, input_precision=PRECISION)
        acc = tl.dot(x1, tl.trans(y1), acc, input_precision=PRECISION)
        acc = tl.dot(x2, tl.trans(y2), acc, input_precision=PRECISION)
        return tl.dot(x3, tl.trans(y3), acc, input_precision=PRECISION)


@triton.jit
def row_products_of_two(x, y, z, PRECISION: tl.constexpr):
    """`row_products` of x with y and with z; a half of x meets both before the next is loaded."""
    if PRECISION != "ieee" or x.dtype != tl.float32 or x.shape[1] <= 64:
        left = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        right = tl.dot(x, tl.trans(z), input_precision=PRECISION)
        return left, right
    else:
        x_even, x_odd = halves(x)
        y_even, y_odd = halves(y)
        z_even, z_odd = halves(z)
        left = tl.dot(x_even, tl.trans(y_even), input_precision=PRECISION)
        right = tl.dot(x_even, tl.trans(z_even), input_precision=PRECISION)
        left = tl.dot(x_odd, tl.trans(y_odd), left, input_precision=PRECISION)
        right = tl.dot(x_odd, tl.trans(z_odd), right, input_precision=PRECISION)
        return left, right


@triton.jit
def add_product(x, y, acc, PRECISION: tl.constexpr):
    """acc `[M, D]` plus x `[M, N]` times y `[N, D]`; of long rows of float32 after all products before it."""
    if PRECISION == "ieee" and x.dtype == tl.float32 and y.shape[1] > 64:
        tl.debug_barrier()
    return tl.dot(x, y, acc, input_precision=PRECISION)
