"""linear and linear_gelu for few rows through the native module: tensors to addresses.

With few rows a product takes as long as reading its weight, and a vendor's library, made for many, reads it at half of
what memory gives or less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyxlbert import _C
from pyxlbert.launch.rows import rows

# Above so many rows the arithmetic takes longer than the weight does to arrive, and the vendor's library is faster.
_MOST_ROWS = {"portable": 0, "avx2": 8}
_MOST_ROWS_AVX512 = 32
_MOST_ROWS_MULTIPLIED = 16


def max_rows(dtype: torch.dtype, multiplied: bool) -> int:
    """Up to how many rows the kernel beats the vendor's library.

    Args:
        dtype: of x and the weight.
        multiplied: whether the processor has products of that dtype, which the library then uses.
    """
    most = _MOST_ROWS.get(_C.level(), _MOST_ROWS_AVX512)
    return min(most, _MOST_ROWS_MULTIPLIED) if multiplied and dtype is not torch.float32 else most


def linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str | None) -> Tensor:
    """x weightᵀ + bias, all of one dtype; then gelu unless `approximate` is None.

    Args:
        x: `[..., K]`; any strides, at least one row.
        weight: `[N, K]`, contiguous, no dimension 0.
        bias: `[N]`; any strides.
        approximate: None for no activation, "none" or "tanh" for that gelu.
    """
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    if bias is not None:
        bias = bias.contiguous()
    gelu = approximate is not None
    _C.cpu.linear_fwd(rows(x)[0], weight, bias, y, gelu, approximate == "tanh", torch.get_num_threads())
    return y
