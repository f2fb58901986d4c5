"""Races whose contestants go wrong in every way; a worker imports this module to run them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator

import torch
from pyxlbert.bench.ops import Built, Call, Race

ILLEGAL = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported"
SIZE = 64


def race(case: str, peer: Callable[[torch.Tensor], Call], ours: Callable[[torch.Tensor], Call]) -> Race:
    """A race to double 64 numbers."""

    def build() -> Built:
        x = torch.randn(SIZE)
        return Built(ours(x), {"peer": peer(x), "other": right(x)}, lambda: 2 * x.double(), 4 * SIZE)

    return Race("double", case, torch.float32, build, rounds=2)


def right(x: torch.Tensor) -> Call:
    return lambda: 2 * x


def wrong(x: torch.Tensor) -> Call:
    return lambda: 2 * x + 0.5


def nearly(x: torch.Tensor) -> Call:
    """Off by more than rounding, by less than what another way to compute may be."""
    return lambda: 2 * x + 1e-4


def raising(x: torch.Tensor) -> Call:
    def call() -> torch.Tensor:
        raise ValueError("no such kernel\nand a long story")

    return call


def raising_later(x: torch.Tensor) -> Call:
    """Right when it is checked, and when it is timed out of memory."""
    calls = iter(range(100))

    def call() -> torch.Tensor:
        if next(calls) > 0:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return 2 * x

    return call


def poisoning(x: torch.Tensor) -> Call:
    def call() -> torch.Tensor:
        raise RuntimeError(ILLEGAL)

    return call


def dying(x: torch.Tensor) -> Call:
    return lambda: os.kill(os.getpid(), signal.SIGSEGV)


def hanging(x: torch.Tensor) -> Call:
    return lambda: time.sleep(600)


def killing_its_parent(x: torch.Tensor) -> Call:
    return lambda: os.kill(os.getppid(), signal.SIGKILL)


def unbuilt(x: torch.Tensor) -> Call:
    raise RuntimeError("no room for the inputs")


def faulty() -> Iterator[Race]:
    for make in (right, wrong, nearly, raising, raising_later, poisoning, dying):
        yield race(f"ours {make.__name__}", right, make)
    yield race("peer wrong", wrong, right)
    yield race("both poisoning", poisoning, poisoning)
    yield race("unbuilt", right, unbuilt)
    yield race("last", right, right)


def slow() -> Iterator[Race]:
    yield race("hanging", right, hanging)
    yield race("last", right, right)


def killed() -> Iterator[Race]:
    yield race("first", right, right)
    yield race("second", right, right)
    yield race("third", right, killing_its_parent)
    yield race("fourth", right, right)


def describe() -> dict[str, object]:
    return {"gpu": "a fake"}
