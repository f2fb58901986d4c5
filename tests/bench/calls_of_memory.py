"""Calls whose memory is measured in another process; it must be importable by name there."""

from __future__ import annotations

import torch
from pyxlbert.bench import memory


def hungry(count: int) -> memory.Alone:
    """Four bytes for each of `count` above its result."""
    return memory.Alone(lambda: None, lambda: torch.ones(count).sum())


def failing() -> memory.Alone:
    raise ValueError("no such thing")
