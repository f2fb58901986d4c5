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
import torch

import pyxlbert

ROOT = Path(__file__).resolve().parents[2]
# Of the environment: compilers, their options, and where they look for headers.
VARIABLES = ("CXX", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH")
# What decides how a kernel is called, and what is asked of its results.
PYTHON = tuple(
    f"pyxlbert/{name}" for name in ("backends", "cpu", "launch", "ops", "reference", "testing", "testing/specs")
)


def files() -> list[Path]:
    """Those that decide what tests find in a build."""
    found = [path for path in (ROOT / "csrc").rglob("*.*") if path.suffix in (".h", ".cpp", ".py")]
    found += [path for name in (*PYTHON, "tests/cpu") for path in (ROOT / name).glob("*.py")]
    found += [ROOT / "tests" / "ops" / name for name in ("conftest.py", "runners.py", "test_parity.py")]
    return [
        *found,
        *(
            ROOT / name
            for name in ("setup.py", "pyxlbert/checks.py", "tests/conftest.py", "tests/compiled/compiled.py")
        ),
    ]


@functools.cache
def digest() -> str:
    """Of all that decides what tests find in a build."""
    compiler = subprocess.run([os.environ.get("CXX", "g++"), "--version"], capture_output=True, text=True).stdout
    python = ".".join(map(str, sys.version_info[:2]))
    told = json.dumps({name: os.environ.get(name) for name in VARIABLES})
    return compiled.digest(files(), compiler, torch.__version__, python, told, *pyxlbert._C.levels())


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
    return os.environ | {
        "PYTHONPATH": str(folder / "lib"),
        "PYTHONSAFEPATH": "1",  # or the working tree's own module would come first
        "OMP_NUM_THREADS": "1",  # the tests of threads ask for their own
    }
