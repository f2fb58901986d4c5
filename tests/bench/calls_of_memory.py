"""Calls whose memory is measured in another process; it must be importable by name there."""

from __future__ import annotations

import torch
from pyxlbert.bench import memory


def hungry(count: int) -> memory.Alone:
    """Four bytes for each of `count` above its result."""
    return memory.Alone(lambda: None, lambda: torch.ones(count).sum())


def failing() -> memory.Alone:
    raise ValueError("no such thing")


def hungry_in_freed_memory(count: int) -> memory.Alone:
    """Takes `count` small blocks where as many were freed before, as making a model frees its checkpoint's."""

    def blocks() -> int:
        return len([torch.ones(1 << 13) for _ in range(count)])

    blocks()
    return memory.Alone(lambda: None, blocks)
