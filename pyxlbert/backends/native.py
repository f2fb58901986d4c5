"""The native module: is it here, which instruction-set level it takes, its CUDA kernels or their emulation."""

from __future__ import annotations

import os
import sys
import warnings
from types import ModuleType
from typing import Any

import torch  # (first: the module's OpenMP symbols then bind to the runtime that torch has loaded)

try:
    from pyxlbert import _C
except ImportError as error:
    _C = None  # type: ignore[assignment]
    build_error: str | None = str(error)
else:
    build_error = None

# The launchers of the CUDA kernels, or None if the native module was built without them.
cuda_kernels: Any = getattr(_C, "cuda", None)
cuda_is_emulated = False

# What is wrong with PYXLBERT_ISA, if the command line goes on to say so.
level_error: str | None = None


def emulate_cuda(kernels: ModuleType) -> None:
    """Makes backend "cuda" run on CPU tensors, by the same kernels compiled for the CPU: see tests/emulation."""
    global cuda_kernels, cuda_is_emulated
    cuda_kernels, cuda_is_emulated = kernels, True


def survive_forks() -> None:
    """Makes forked children work after their parent's threads have worked; called once.

    OpenMP's workers end before each fork.  A runtime that cannot end them (that of torch 2.6) leaves the child one
    thread, with a warning: any parallel call of more would wait for ever.
    """
    if _C is not None and not _C.survive_forks() and hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_one_thread)


def _one_thread() -> None:
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        warnings.warn(
            "pyxlbert: this process was forked from one with several threads, and works with one: the OpenMP of this "
            "torch cannot be forked; start workers by spawn for more",
            RuntimeWarning,
            stacklevel=2,
        )


def multiplies_bfloat16() -> bool:
    """Whether the active instruction-set level has products of bfloat16; elsewhere they are products of float32."""
    return _C is not None and _C.level() in ("avx512_bf16", "amx")


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
        level_error = f"PYXLBERT_ISA: got {wanted!r}, but the native module is not built ({build_error})"
    else:
        try:
            _C.set_level(wanted)
        except ValueError as error:
            level_error = f"PYXLBERT_ISA: {error}"
    is_command = sys.orig_argv[1:3] == ["-m", "pyxlbert"] or os.path.basename(sys.argv[0] or "") == "pyxlbert"
    if level_error is not None and not is_command:
        raise ValueError(level_error)
