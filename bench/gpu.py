"""`make gpu`: everything that needs a GPU, on a machine with a CUDA build of torch and nothing to download.

    python bench/gpu.py [PART ...]        parts: build, test, sanitize, bench, prefer; without any: all, in this order

build     the package and its native module with CUDA kernels for this GPU, into build/gpu
test      the op, kernel and model tests, of which every backend that runs here takes part
sanitize  compute-sanitizer over a few calls of every op
bench     python -m pyxlbert.bench gpu, into bench/results/<device>.json, row by row
prefer    python -m pyxlbert.bench.prefer, into pyxlbert/backends/measured.json: which of cuda and triton is faster here

A part has a time of its own to end in, and what it has done by then counts: all end within nine minutes.  The exit
status is 0 where every part that was asked for ran and passed.  It is run as a file, not as a module, since the package
is not there before it is built.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "gpu"
# Seconds.
LIMITS = {"build": 120, "test": 220, "sanitize": 60, "bench": 100, "prefer": 40}
SETUPTOOLS = 77
NEEDED = ("torch", "triton", "numpy", "pytest", "setuptools", "pybind11", "safetensors", "tokenizers", "transformers")
TESTS = tuple(f"tests/ops/test_{subject}.py" for subject in ("parity", "contract", "compile", "choice"))
TESTS += ("tests/kernels", "tests/gpu", "tests/models/test_bert_parity.py", "tests/models/test_xlnet_parity.py")


def missing() -> str | None:
    """Why nothing can be run here, or None."""
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        return f"{', '.join(absent)} cannot be imported by {sys.executable}"
    found = importlib.metadata.version("setuptools")
    if int(found.partition(".")[0]) < SETUPTOOLS:
        return f"setuptools is {found}, wanted at least {SETUPTOOLS}, which pyproject.toml needs"
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    return None


def environment() -> dict[str, str]:
    """The package is found in build/gpu and nowhere else; nothing is fetched."""
    return os.environ | {
        "PYTHONPATH": str(BUILD),
        "PYTHONSAFEPATH": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", str(ROOT / "build" / "triton-gpu")),
    }


def run(command: Sequence[str], limit: float, **variables: str) -> str:
    """Runs a command; says "passed" or why it did not."""
    print("$", " ".join(command), flush=True)
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment() | variables, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return f"did not end within {limit:.0f} s"
    return "passed" if done.returncode == 0 else f"exit status {done.returncode}"


def build(limit: float) -> str:
    shutil.rmtree(BUILD, ignore_errors=True)
    objects = ROOT / "build" / "gpu-objects"
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-lib", str(BUILD), "--build-temp", str(objects)]
    return run(command, limit, PYXLBERT_CUDA="auto", PYXLBERT_CUDA_ARCHS=architecture())


def architecture() -> str:
    """What the CUDA kernels are compiled for: the machine code of this GPU, or what its driver can compile."""
    import torch

    major = torch.cuda.get_device_capability()[0]
    return {8: "80", 9: "90a", 10: "100"}.get(major, "100+PTX")


def test(limit: float) -> str:
    command = [sys.executable, "-m", "pytest", "-q", *TESTS]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "worksteal"]
    return run(command, limit, OMP_NUM_THREADS="1")


def sanitize(limit: float) -> str:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return "did not run: compute-sanitizer is not installed"
    end = time.monotonic() + limit
    results = {}
    for name in ("memcheck", "racecheck", "initcheck", "synccheck"):
        command = [tool, "--tool", name, "--error-exitcode", "99", sys.executable, "tests/gpu/few_calls.py"]
        # Each tensor is an allocation of its own, whose ends are watched.
        left = max(1.0, end - time.monotonic())
        results[name] = run(command, left, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    wrong = [f"{name} {result}" for name, result in results.items() if result != "passed"]
    return ", ".join(wrong) or "passed"


def bench(limit: float) -> str:
    import torch

    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    results = Path("bench") / "results" / f"{name}.json"
    command = [sys.executable, "-m", "pyxlbert.bench", "gpu", "--device", "cuda", "--out", str(results)]
    # It ends by itself, with the row that it is at: see `--seconds`.
    return run([*command, "--seconds", f"{limit - 20:.0f}"], limit)


def prefer(limit: float) -> str:
    command = [sys.executable, "-m", "pyxlbert.bench.prefer", "--write", "pyxlbert/backends/measured.json"]
    return run([*command, "--seconds", f"{limit - 15:.0f}"], limit)


PARTS: dict[str, Callable[[float], str]] = {
    "build": build,
    "test": test,
    "sanitize": sanitize,
    "bench": bench,
    "prefer": prefer,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; by default all")
    parts = parser.parse_args(arguments).parts or list(PARTS)
    for part in parts:
        if part not in PARTS:
            parser.error(f"PART: got {part!r}, wanted one of {', '.join(PARTS)}")
    reason = missing()
    if reason is not None:
        print(f"gpu: nothing was run: {reason}", file=sys.stderr)
        return 2
    results = {}
    for part in parts:
        if part != "build" and not BUILD.is_dir():
            results[part] = "did not run: nothing is built, make gpu PART=build"
            continue
        start = time.monotonic()
        results[part] = PARTS[part](LIMITS[part])
        print(f"gpu: {part}: {results[part]} ({time.monotonic() - start:.0f} s)", flush=True)
    print("\n".join(["", *(f"gpu: {part:9} {result}" for part, result in results.items())]))
    return 0 if all(result == "passed" for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
