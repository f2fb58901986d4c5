"""What checks on the emulation of CUDA depend on, where they find the same on every machine."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from pathlib import Path

import compiled

# What decides how a kernel is called, and what is asked of its results.
PYTHON = ("backends", "cuda", "launch", "ops", "reference", "testing", "testing/specs")
ALONE = (
    *("csrc/nvcc.py", "pyxlbert/__init__.py", "pyxlbert/checks.py", "tests/conftest.py", "tests/compiled/compiled.py"),
    *(f"tests/ops/{name}" for name in ("conftest.py", "runners.py", "test_parity.py")),
)
# Of the environment: the compiler, and where it looks for headers and libraries.
VARIABLES = ("CXX", "LIBRARY_PATH", "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH")


@functools.cache
def digest() -> str:
    """Of all that decides what comes of a run on the emulation: kernels, how they are built, ops and cases."""
    told = json.dumps({name: os.environ.get(name) for name in VARIABLES})
    packages = compiled.versions("torch", "numpy", "pybind11")
    return compiled.digest(files(), compiled.compiler(), _toolkit(), *packages, told)


def files() -> list[Path]:
    """Those that a digest is of."""
    found = [*compiled.sources("csrc", ".h"), *compiled.sources("csrc/cuda", ".h", ".cuh", ".cu", ".cpp")]
    found += compiled.sources("tests/emulation", ".h", ".cpp", ".py")
    found += [path for name in PYTHON for path in compiled.sources(f"pyxlbert/{name}", ".py")]
    return [*found, *(compiled.ROOT / name for name in ALONE)]


def _toolkit() -> str:
    """The version of the CUDA toolkit, whose headers are compiled."""
    spec = importlib.util.spec_from_file_location("nvcc", compiled.ROOT / "csrc" / "nvcc.py")
    nvcc = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nvcc)
    return str(nvcc.find().version)
