"""Builds of the native module for tests, beside the usual one: what differs is compiled again, the rest is shared."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


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
