"""Peak memory of one contestant of `relative.Problem`, in a process of its own."""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys

import torch
from pyxlbert.bench.relative import Problem

from pyxlbert.testing.memory import peak_memory

MOST = 20 << 30  # bytes; what asks for more has failed


def measure(problem: Problem, name: str) -> int | None:
    """Bytes above inputs and results of a call in a fresh process, or None where MOST is not enough."""
    command = [sys.executable, "-m", __spec__.name, name, str(problem.batch), str(problem.length)]
    command += [str(problem.dtype).removeprefix("torch."), *(["--backward"] if problem.backward else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return int(done.stdout)
    if "can't allocate memory" in done.stderr or done.returncode == -9:
        return None
    raise RuntimeError(f"{name}: {done.stderr.strip().splitlines()[-1:]}")


def main() -> None:
    """Prints the bytes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("batch", type=int)
    parser.add_argument("length", type=int)
    parser.add_argument("dtype")
    parser.add_argument("--backward", action="store_true")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_DATA, (MOST, MOST))
    problem = Problem(options.batch, options.length, getattr(torch, options.dtype), options.backward)
    small = Problem(1, 16, problem.dtype, problem.backward)
    small.call(options.name, small.inputs())()
    print(peak_memory(problem.call(options.name, problem.inputs())))


if __name__ == "__main__":
    main()
