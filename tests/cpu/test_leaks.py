"""Memory after a thousand calls: what the allocator has given out is what it had given out before."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Of every op four cases in turn, forward and backward.
CALLS = """
import ctypes, gc, itertools
import torch
from pyxlbert.testing import runners
from pyxlbert.testing.specs import SPECS

FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()

class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Mallinfo
torch.set_num_threads(1)

def given() -> int:
    gc.collect()
    found = libc.mallinfo2()
    return found.uordblks + found.hblkhd

def calls(spec, count):
    cases = [case for case in spec.suite if case.small][:4]
    drawn = [(case, runners.arguments_of(spec, case, torch.bfloat16)) for case in cases]
    for case, arguments in itertools.islice(itertools.cycle(drawn), count):
        LEAK
        runners.run(lambda **a: spec.function(**a, backend="cpu"), spec, arguments, case.gradients)

kept = []
for name, spec in SPECS.items():
    calls(spec, 50)
for name, spec in SPECS.items():
    calls(spec, 20)
    before = given()
    calls(spec, COUNT // len(SPECS))
    print(name, given() - before)
"""


def run(count: int, leak: str = "pass") -> dict[str, int]:
    code = CALLS.replace("COUNT", str(count)).replace("LEAK", leak)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines()}


# Less than half of a small tensor's record a call.
MOST = 100


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks glibc's allocator")
def test_a_thousand_calls_leave_nothing() -> None:
    count = 1000
    for name, grown in run(count).items():
        assert grown < MOST * count / 10, (name, grown)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks glibc's allocator")
def test_it_sees_a_tensor_a_call() -> None:
    assert all(grown > MOST * 10 for grown in run(100, "kept.append(torch.ones(64))").values())
