"""What a call adds to the memory of its process; tensors that take more of it than they hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def peak_memory(call: Callable[[], Any]) -> int:
    """Bytes of this process's high-water mark during `call`, above what was held before it and what it returns.

    Exact only in a fresh process: what was freed before and kept by the allocator is used again unseen.  Linux only.

    Args:
        call: returns a tensor or a tuple of tensors.
    """
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the mark starts again at what is held now
    before = _status("VmRSS")
    results = call()
    peak = _status("VmHWM")
    kept = results if isinstance(results, tuple) else (results,)
    return peak - before - sum(x.numel() * x.element_size() for x in kept if isinstance(x, torch.Tensor))


def far(x: torch.Tensor, axis: int) -> torch.Tensor:
    """x with its first and last element along `axis`, at least two long, more than 2³¹ elements apart.

    Nothing else lies between them: memory that nobody touches costs nothing on the CPU; a GPU gives it all, 4.3 GB in
    half precision.
    """
    step = 2**31 // (x.shape[axis] - 1) + 8
    strides = list(x.contiguous().stride())
    strides[axis] = step
    storage = torch.empty(step * (x.shape[axis] - 1) + x.numel(), dtype=x.dtype, device=x.device)
    return storage.as_strided(x.shape, strides).copy_(x)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
