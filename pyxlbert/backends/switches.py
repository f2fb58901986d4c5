"""What a block sets for the ops inside it: the backend, checks of values, atomics."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pyxlbert.backends.presence import unavailable


class _Default(threading.local):
    # threading.local and not a ContextVar: torch.compile can trace the former.  On the instance and not on the class:
    # compiled code then notices when a block changes them.
    def __init__(self) -> None:
        self.forward: str | None = None
        self.backward: str | None = None


_default = _Default()

# How many `debug_checks` and `allow_atomics` blocks are open, in all threads: backward on a GPU runs in threads of
# torch's own, which would not see what is held for the caller's.
_checks = 0
_atomics = 0
_lock = threading.Lock()


@contextmanager
def use_backend(name: str | None, *, backward: str | None = None) -> Iterator[None]:
    """Makes `name` the backend of every op called in this thread inside the block without `backend=`.

    Args:
        name: one of `NAMES`, or None for the usual choice.
        backward: the backend of the backward pass of ops called inside; None means forward's own.

    Raises:
        ValueError: a name is unknown.
        RuntimeError: the backend cannot run on this machine.
    """
    for one in (name, backward):
        if one is not None:
            reason = unavailable(one)
            if reason is not None:
                raise RuntimeError(f"backend {one!r} is unavailable: {reason}")
    before = _default.forward, _default.backward
    _default.forward, _default.backward = name, backward
    try:
        yield
    finally:
        _default.forward, _default.backward = before


def default_backend() -> str | None:
    """The backend set by `use_backend` in this thread, or None."""
    return _default.forward


def default_backward() -> str | None:
    """The backward backend set by `use_backend` in this thread, or None."""
    return _default.backward


@contextmanager
def debug_checks() -> Iterator[None]:
    """Inside the block every op checks the values of ids, lengths, offsets and positions on every device.

    On CPU they are always checked.  On a GPU a check waits for the device, so outside of the block kernels clamp
    what is wrong and write NaN.  Blocks nest; one holds for the whole process, since backward on a GPU runs in
    threads of its own.
    """
    global _checks
    with _lock:
        _checks += 1
    try:
        yield
    finally:
        with _lock:
            _checks -= 1


def checking() -> bool:
    """Whether a `debug_checks` block is open."""
    return _checks > 0


@contextmanager
def allow_atomics() -> Iterator[None]:
    """Inside the block a backward pass on a GPU may add up gradients by floating-point atomics where that is faster.

    Their last bits then differ from run to run.  Today it is the gradient of `position_key` of `relative_attention` and
    `two_stream_attention` on backend "triton", in 16 bits or with head sizes up to 64, which otherwise has a kernel of
    its own.  What counts is when backward runs, not forward; blocks nest, one holds for the whole process, and none
    does anything while `torch.use_deterministic_algorithms(True)` holds.
    """
    global _atomics
    with _lock:
        _atomics += 1
    try:
        yield
    finally:
        with _lock:
            _atomics -= 1


def atomics_allowed() -> bool:
    """Whether an `allow_atomics` block is open, and torch does not ask for the opposite."""
    return _atomics > 0 and not torch.are_deterministic_algorithms_enabled()
