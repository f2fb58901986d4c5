"""Builds of the native module for tests, beside the usual one: what differs is compiled again, the rest is shared.

What tests find in such a build is the same for the same sources on the same levels, see compiled.py.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import compiled

import pyxlbert

ROOT = Path(__file__).resolve().parents[2]
# Of the environment: compilers, their options, and where they look for headers.
VARIABLES = ("CXX", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH")
# Of the environment: what a test sets for the tests that it runs.
GIVEN = ("PYTEST_ADDOPTS", "PYXLBERT_ISA", "PYXLBERT_TILE_FAULT", "PYXLBERT_TEST_SMALL")
# What decides how a kernel is called, and what is asked of its results.
PYTHON = ("backends", "cpu", "launch", "nn", "ops", "reference", "testing", "testing/specs")
ALONE = (
    *("setup.py", "pyproject.toml", "csrc/nvcc.py", "pyxlbert/__init__.py", "pyxlbert/checks.py"),
    *("tests/conftest.py", "tests/compiled/compiled.py"),
    *(f"tests/ops/{name}" for name in ("conftest.py", "runners.py", "test_parity.py")),
)


def files() -> list[Path]:
    """Those that decide what tests find in a build."""
    found = [path for folder in ("csrc", "csrc/cpu") for path in compiled.sources(folder, ".h", ".cpp")]
    found += [path for name in PYTHON for path in compiled.sources(f"pyxlbert/{name}", ".py")]
    return [*found, *compiled.sources("tests/cpu", ".py"), *(ROOT / name for name in ALONE)]


@functools.cache
def digest() -> str:
    """Of all that decides what tests find in a build."""
    told = json.dumps({name: os.environ.get(name) for name in VARIABLES})
    packages = compiled.versions("torch", "numpy", "pybind11", "pytest")
    return compiled.digest(files(), compiled.compiler(), *packages, told, *pyxlbert._C.levels())


def usual() -> dict[str, str]:
    """The environment of tests that a test runs, before it sets what it wants."""
    return {name: value for name, value in os.environ.items() if name not in GIVEN}


def build(name: str, variables: dict[str, str]) -> dict[str, str]:
    """Builds under these environment variables of setup.py.

    Returns:
        environment variables under which Python imports the build and not the working tree's.
    """
    folder = ROOT / "build" / name
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-base", str(folder)]
    command += ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    # Tests may run in several processes, and every build writes the same objects.
    lock_path = ROOT / "build" / "in-place" / "lock"
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    with lock_path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | variables)
    assert built.returncode == 0, built.stdout[-4000:] + built.stderr[-4000:]
    return usual() | {
        "PYTHONPATH": str(folder / "lib"),
        "PYTHONSAFEPATH": "1",  # or the working tree's own module would come first
        "OMP_NUM_THREADS": "1",  # the tests of threads ask for their own
    }
