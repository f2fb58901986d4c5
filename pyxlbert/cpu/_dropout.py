"""Dropout where nothing can be fused with it, through the native module."""

from __future__ import annotations

import torch
from torch import Tensor

from pyxlbert import _C
from pyxlbert.launch.rows import DTYPE


def dropout(x: Tensor, limit: int, seed: int) -> Tensor:
    """x 2¹⁶ / (2¹⁶ - limit) where an element's 16 bits, which csrc/cpu/dropout.h names, are not below the limit.

    Args:
        x: float32, bfloat16 or float16; any strides.
        limit: 1 to 2¹⁶ - 1.
        seed: a signed number of 64 bits.

    Returns:
        A new contiguous tensor, zero elsewhere.
    """
    x = x.contiguous()
    y = torch.empty_like(x)
    _C.cpu.dropout(x.data_ptr(), y.data_ptr(), x.numel(), seed, limit, DTYPE[x.dtype], torch.get_num_threads())
    return y
