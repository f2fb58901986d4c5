"""Peak memory of one contestant of relative attention, in a process of its own."""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from dataclasses import replace

import torch
from pyxlbert.bench import ops

from pyxlbert.testing.memory import peak_memory
from pyxlbert.testing.specs import SPECS
from pyxlbert.testing.specs._spec import Case

MOST = 20 << 30  # bytes; what asks for more has failed
SPEC = SPECS["relative_attention"]


def contestants(case: Case) -> tuple[str, ...]:
    """Ours first."""
    return ("pyxlbert", *ops.opponents_of(SPEC, case).peers)


def call_of(drawn: ops.Drawn, name: str) -> ops.Call:
    """The contestant's call; all that it is given is made before."""
    drawn.cotangent(0, drawn.arguments["query"].shape)
    if name == "pyxlbert":
        return drawn.call(ops.ours(SPEC))
    peer = ops.opponents_of(SPEC, drawn.case).peers[name]
    return drawn.call(peer.bind, peer.change)


def measure(case: Case, dtype: torch.dtype, name: str) -> int | None:
    """Bytes above inputs and results of a call in a fresh process, or None where MOST is not enough."""
    command = [sys.executable, "-m", __spec__.name, name, case.id, str(dtype).removeprefix("torch.")]
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
    parser.add_argument("case")
    parser.add_argument("dtype")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_DATA, (MOST, MOST))
    case, dtype = next(case for case in SPEC.cases if case.id == options.case), getattr(torch, options.dtype)
    small = replace(case, inputs=case.inputs.sized(1, 16, case.inputs.head_size))
    call_of(ops.Drawn(SPEC, small, dtype), options.name)()
    print(peak_memory(call_of(ops.Drawn(SPEC, case, dtype), options.name)))


if __name__ == "__main__":
    main()
