"""What checks of Triton's kernels depend on, where they compile and run nothing."""

from __future__ import annotations

import json
from pathlib import Path

import compiled
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend


def digest() -> str:
    """Of all that decides what is compiled, how, and what is asked of it: kernels, their launchers, ops and cases."""
    knobs = json.dumps(get_cache_invalidating_env_vars(), sort_keys=True)
    ptxas = make_backend(GPUTarget("cuda", 90, 32)).hash()
    return compiled.digest(files(), *compiled.versions("triton", "torch"), knobs, ptxas)


def files() -> list[Path]:
    """Those that a digest is of."""
    found = [*compiled.sources("kernels", ".py", ".csv"), *compiled.sources("tests/compiled", ".py")]
    folders = ("backends", "launch", "ops", "testing", "testing/specs")
    for folder in ("bench", "tests/kernels", *(f"pyxlbert/{name}" for name in folders)):
        found += compiled.sources(folder, ".py")
    # Ops ask checks.py what they are given.
    return [*found, compiled.ROOT / "pyxlbert" / "checks.py"]
