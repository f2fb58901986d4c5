"""The four backends: which exist here, why the others do not, and which one an op takes."""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

NAMES = ("torch", "cpu", "triton", "cuda")

# The first backend of a row that supports the inputs is taken.
PREFERENCE = {"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")}
# On a GPU the faster of the first two comes first: see preference.py.

_native_error: str | None = None
try:
    # torch first: the module's OpenMP symbols then bind to the runtime that torch has loaded.
    from pyxlbert import _C
except ImportError as error:
    _C = None  # type: ignore[assignment]
    _native_error = str(error)


# The launchers of the CUDA kernels, or None where the native module was built without them; see `emulate_cuda`.
cuda_kernels: Any = getattr(_C, "cuda", None)
cuda_is_emulated = False


def emulate_cuda(kernels: ModuleType) -> None:
    """Makes backend "cuda" run on CPU tensors, by the same kernels compiled for the CPU: see tests/emulation."""
    global cuda_kernels, cuda_is_emulated
    cuda_kernels, cuda_is_emulated = kernels, True


# What is wrong with PYXLBERT_ISA, where the command line goes on to say so.
level_error: str | None = None


def choose_level() -> None:
    """Takes the instruction-set level that PYXLBERT_ISA names.

    Raises:
        ValueError: it cannot be had.  Only the command `pyxlbert` starts nevertheless, for `info` to tell.
    """
    global level_error
    wanted = os.environ.get("PYXLBERT_ISA")
    if wanted is None:
        return
    if _C is None:
        level_error = f"PYXLBERT_ISA: got {wanted!r}, but the native module is not built ({_native_error})"
    else:
        try:
            _C.set_level(wanted)
        except ValueError as error:
            level_error = f"PYXLBERT_ISA: {error}"
    is_command = sys.orig_argv[1:3] == ["-m", "pyxlbert"] or os.path.basename(sys.argv[0] or "") == "pyxlbert"
    if level_error is not None and not is_command:
        raise ValueError(level_error)


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


def unavailable(name: str) -> str | None:
    """Why backend `name` cannot run on this machine, or None when it can.

    Raises:
        ValueError: `name` is not one of the four backends.
    """
    _check_name(name)
    if name == "cpu" and _C is None:
        return f"the native module is not built ({_native_error})"
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        # In the interpreter kernels take CPU tensors: see kernels/_launch.py.
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        if not torch.cuda.is_available():
            return "no CUDA device is here"
        if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
            return "the device has a compute capability below 8.0"
    if name == "cuda":
        if cuda_is_emulated:
            return None
        if _C is None:
            return f"the native module is not built ({_native_error})"
        if cuda_kernels is None:
            return "the native module was built without its CUDA kernels: see docs/gpu.md"
        if not torch.cuda.is_available():
            return "no CUDA device is here"
        if torch.version.hip is not None:
            return "it runs on NVIDIA devices only"
        if torch.cuda.get_device_capability() < (8, 0):
            return "the device has a compute capability below 8.0"
    return None


def available() -> tuple[str, ...]:
    """The backends that can run here."""
    return tuple(name for name in NAMES if unavailable(name) is None)


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


def explain(op: str, *tensors: torch.Tensor) -> str:
    """The backend that op `op` takes for these tensors, and a reason for each one it does not take; also printed.

    Args:
        op: the name of an op, such as "layer_norm".
        tensors: the op's first tensors, as in a call; at least one of a floating dtype.

    Raises:
        ValueError: there is no such op, no tensor, or they are on several devices or on meta.
        TypeError: one is no tensor, or has a dtype that the op does not take.
    """
    from pyxlbert.ops import _check
    from pyxlbert.ops._define import OPS

    if op not in OPS:
        raise ValueError(f"explain: op: got {op!r}, wanted one of {', '.join(sorted(OPS))}")
    for place, one in enumerate(tensors):
        _check.tensor("explain", f"tensor {place} of {op}", one)
    if OPS[op].ids_first and tensors and not tensors[0].is_floating_point():
        tensors = tensors[1:]
    if not tensors:
        raise ValueError(f"explain: tensors: got none of a floating dtype, wanted the first ones of a call of {op}")
    for place, one in enumerate(tensors):
        _check.floating("explain", f"tensor {place} of {op}", one)
        _check.same_device("explain", f"tensor {place} of {op}", one, "the first", tensors[0])
    text = OPS[op].explain(*tensors)
    print(text)
    return text


def _check_name(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"backend: got {name!r}, wanted one of {', '.join(NAMES)}")
