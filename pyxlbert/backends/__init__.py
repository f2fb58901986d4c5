"""Four backends and those of other packages: which exist here, why others do not, and which one an op takes."""

from __future__ import annotations

from typing import Any

from pyxlbert.backends import native
from pyxlbert.backends.choice import OPS, PREFERENCE, explain
from pyxlbert.backends.native import choose_level, emulate_cuda, multiplies_bfloat16
from pyxlbert.backends.presence import NAMES, REFUSED, available, unavailable
from pyxlbert.backends.switches import (
    allow_atomics,
    atomics_allowed,
    checking,
    debug_checks,
    default_backend,
    default_backward,
    use_backend,
)

__all__ = [
    "NAMES",
    "OPS",
    "PREFERENCE",
    "REFUSED",
    "allow_atomics",
    "atomics_allowed",
    "available",
    "checking",
    "choose_level",
    "debug_checks",
    "default_backend",
    "default_backward",
    "emulate_cuda",
    "explain",
    "multiplies_bfloat16",
    "unavailable",
    "use_backend",
]

# What may change while the process runs is read where it lives.
_LIVE = ("cuda_is_emulated", "cuda_kernels", "level_error")


def __getattr__(name: str) -> Any:
    if name in _LIVE:
        return getattr(native, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
