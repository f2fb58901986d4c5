"""What a call adds to the memory of its process."""

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


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
