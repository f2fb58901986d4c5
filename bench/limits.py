"""What the machine can do at most, measured: bytes copied and products accumulated a second."""

from __future__ import annotations

from functools import cache

import torch
from pyxlbert.bench.timer import race_on

from pyxlbert.cpu import _onednn


def cache_size(device: str) -> int:
    """Bytes of a GPU's second-level cache; 0 on the CPU, whose races may find their inputs there, as a model does."""
    return 0 if device == "cpu" else torch.cuda.get_device_properties().L2_cache_size


def copy_bandwidth() -> float:
    """Bytes a second, read and written together, of a copy much larger than the caches, on torch's default device."""
    return _copy_bandwidth(torch.get_default_device().type)


@cache
def _copy_bandwidth(device: str) -> float:
    source = torch.randn(64 << 20, device=device)
    target = torch.empty_like(source)
    best = race_on(device, {"copy": lambda: target.copy_(source)}, rounds=9)["copy"].lower
    return 2 * source.numel() * source.element_size() / best


def gemm_rate(dtype: torch.dtype) -> float:
    """FLOP/s of the vendors' GEMM on square matrices, on torch's default device.

    On the CPU of 2048, the faster of torch's and oneDNN's reordered one, and of a dtype that the processor does not
    multiply float32's: the vendors' reference code takes minutes there.  On a GPU of 8192.
    """
    device = torch.get_default_device().type
    if device == "cpu" and _onednn.detour(dtype) is not None:
        dtype = torch.float32
    return _gemm_rate(dtype, device)


@cache
def _gemm_rate(dtype: torch.dtype, device: str) -> float:
    size = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    contestants = {"torch": lambda: a @ b}
    reordered = _onednn.reorder(b) if device == "cpu" else None
    if reordered is not None:
        contestants["oneDNN"] = lambda: _onednn.product(a, reordered, None)
    best = min(timing.lower for timing in race_on(device, contestants, rounds=9).values())
    return 2 * size**3 / best
