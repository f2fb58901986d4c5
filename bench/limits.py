"""What the machine can do at most, measured: bytes copied and products accumulated a second."""

from __future__ import annotations

from functools import cache

import torch
from pyxlbert.bench.timer import race


@cache
def copy_bandwidth() -> float:
    """Bytes a second, read and written together, of a copy much larger than the caches."""
    source = torch.randn(64 << 20)
    target = torch.empty_like(source)
    best = race({"copy": lambda: target.copy_(source)}, rounds=9)["copy"].lower
    return 2 * source.numel() * source.element_size() / best


@cache
def gemm_rate(dtype: torch.dtype) -> float:
    """FLOP/s of the vendor's GEMM on square matrices of 2048."""
    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    best = race({"gemm": lambda: a @ b}, rounds=9)["gemm"].lower
    return 2 * 2048**3 / best
