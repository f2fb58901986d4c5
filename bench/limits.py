"""What the machine can do at most, measured: bytes copied and products accumulated a second."""

from __future__ import annotations

from functools import cache

import torch
from pyxlbert.bench.timer import race

from pyxlbert.native import _onednn


@cache
def copy_bandwidth() -> float:
    """Bytes a second, read and written together, of a copy much larger than the caches."""
    source = torch.randn(64 << 20)
    target = torch.empty_like(source)
    best = race({"copy": lambda: target.copy_(source)}, rounds=9)["copy"].lower
    return 2 * source.numel() * source.element_size() / best


@cache
def gemm_rate(dtype: torch.dtype) -> float:
    """FLOP/s of the vendors' GEMM on square matrices of 2048: the faster of torch's and oneDNN's reordered one."""
    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    contestants = {"torch": lambda: a @ b}
    reordered = _onednn.reorder(b)
    if reordered is not None:
        contestants["oneDNN"] = lambda: _onednn.product(a, reordered, None)
    best = min(timing.lower for timing in race(contestants, rounds=9).values())
    return 2 * 2048**3 / best
