"""What checks of Triton's kernels depend on, where they compile and run nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import compiled
import torch
import triton
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend


def digest() -> str:
    """Of all that decides what is compiled, how, and what is asked of it: kernels, their launchers, ops and cases."""
    knobs = json.dumps(get_cache_invalidating_env_vars(), sort_keys=True)
    python = ".".join(map(str, sys.version_info[:2]))  # whose syntax trees Triton reads
    ptxas = make_backend(GPUTarget("cuda", 90, 32)).hash()
    return compiled.digest(files(), triton.__version__, torch.__version__, python, knobs, ptxas)


def files() -> list[Path]:
    """Those that a digest is of."""
    found = [path for folder in ("kernels", "tests/compiled") for path in (compiled.ROOT / folder).glob("*")]
    folders = ("backends", "launch", "ops", "testing", "testing/specs")
    for folder in ("bench", "tests/kernels", *(f"pyxlbert/{name}" for name in folders)):
        found += (compiled.ROOT / folder).glob("*.py")
    found.append(compiled.ROOT / "pyxlbert" / "checks.py")  # ops ask it what they are given
    return [path for path in found if path.is_file() and path != compiled.FILE]
