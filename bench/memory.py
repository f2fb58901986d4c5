"""Peak memory of one call, in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import resource
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from pyxlbert.testing.memory import peak_memory

MOST = 20 << 30  # bytes; what asks for more has failed
# glibc's settings: the size from which a block is a mapping of its own, and what may lie free at the end of the heap.
_MAPPED, _TRIMMED = (-3, 1 << 16), (-1, 0)
# What every measured process imports, done once: each of them is a fork of the process that did.
_PRELOAD = ["pyxlbert.bench.ops", "transformers.models.xlnet.modeling_xlnet"]


class Alone(NamedTuple):
    """A contestant by itself.

    Attributes:
        warm: called first, not measured: small, so that what the contestant keeps from it is not what the call needs.
        call: measured.
    """

    warm: Callable[[], Any]
    call: Callable[[], Any]


def measure(make: Callable[..., Alone], *arguments: Any) -> int | None:
    """Bytes above inputs and results of a call in a fresh process, or None where MOST is not enough.

    Args:
        make: a function of a module, called there.
        arguments: of it, which can be pickled.

    Raises:
        RuntimeError: the call, or what makes it, failed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    ours, theirs = context.Pipe()
    process = context.Process(target=_measure, args=(theirs, torch.get_num_threads(), make, arguments))
    process.start()
    theirs.close()
    try:
        found, reason = ours.recv()
    except EOFError:
        process.join()
        if process.exitcode == -9:
            return None
        raise RuntimeError(f"its process ended with {process.exitcode}") from None
    finally:
        ours.close()
    process.join()
    if reason and "can't allocate memory" in reason:
        return None
    if reason:
        raise RuntimeError(reason)
    return found


def _measure(pipe: Any, threads: int, make: Callable[..., Alone], arguments: tuple[Any, ...]) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MOST, MOST))
    torch.set_num_threads(threads)
    try:
        alone = make(*arguments)
        alone.warm()
        # From here on what is freed goes back to the system, and what is taken shows: of what making it has freed too,
        # or a call finds room that nobody sees it take.
        libc = ctypes.CDLL(None)
        for setting in (_MAPPED, _TRIMMED):
            libc.mallopt(*setting)
        gc.collect()
        libc.malloc_trim(0)
        pipe.send((max(0, peak_memory(alone.call)), ""))
    except Exception as error:
        pipe.send((None, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"))
