"""The mends of Triton's interpreter: each does what it says, and each is still needed.

In processes of their own, so that they run on a machine with a GPU too, where nothing else is interpreted.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

MEND = Path(__file__).resolve().parents[1] / "interpreter.py"

HEADER = """
import importlib.util, sys
import numpy as np, torch, triton, triton.language as tl
if {mended}:
    spec = importlib.util.spec_from_file_location("interpreter", {path!r})
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.apply()
"""

DOT = """
@triton.jit
def dot(x, y):
    place = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    a = tl.load(x + place)
    tl.store(y + place, tl.dot(a, a))

x = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
y = torch.zeros(16, 16)
dot[(1,)](x, y)
error = (y.double() - x.double() @ x.double()).abs().max()
print("right" if error < 1 / 1024 else "wrong")
"""

CAST = """
@triton.jit
def cast(x, y):
    i = tl.arange(0, 16)
    tl.store(y + i, tl.load(x + i).to(tl.bfloat16))

bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F80C000, 0x7FC00000, 0x3F800001, -2139127808, 0, 1] * 2)
x = bits.to(torch.int32).view(torch.float32)
y = torch.zeros(16, dtype=torch.bfloat16)
cast[(1,)](x, y)
same = (y == x.bfloat16()) | (y.isnan() & x.isnan())
print("right" if same.all() else "wrong")
"""

LOOP = """
@triton.jit
def loop(y, count):
    total = 0
    for i in range(0, count, 2):
        total += i
    tl.store(y, total)

y = torch.zeros(1, dtype=torch.int32)
loop[(1,)](y, 7)
print("right" if y.item() == 12 else "wrong")
"""

ARITHMETIC = """
@triton.jit
def add(x, y):
    i = tl.arange(0, 16)
    a = tl.load(x + i)
    tl.store(y + i, a + a)

x = torch.full((16,), 1.5, dtype=torch.bfloat16)
y = torch.zeros(16, dtype=torch.bfloat16)
try:
    add[(1,)](x, y)
    print("right" if (y == 3).all() else "wrong")
except Exception as error:
    print("refused" if "convert to float32" in str(error.__cause__ or error) else "wrong")
"""

SUMMATION = """
@triton.jit
def both(x, y, left, right):
    m = tl.arange(0, 16)[:, None] * 64 + tl.arange(0, 64)[None, :]
    n = tl.arange(0, 32)[:, None] * 64 + tl.arange(0, 64)[None, :]
    a, b = tl.load(x + m), tl.load(y + n)
    tl.store(left + tl.arange(0, 16)[:, None] * 32 + tl.arange(0, 32)[None, :], tl.dot(a, tl.trans(b)))
    tl.store(right + tl.arange(0, 32)[:, None] * 16 + tl.arange(0, 16)[None, :], tl.dot(b, tl.trans(a)))

g = torch.Generator().manual_seed(0)
x, y = torch.randn(16, 64, generator=g), torch.randn(32, 64, generator=g)
left, right = torch.zeros(16, 32), torch.zeros(32, 16)
both[(1,)](x, y, left, right)
print("right" if torch.equal(left, right.t()) else "wrong")
"""

# A kernel that calls a device function, or adds a tensor, 40 times is to do no more of something than one that does it
# twice; what is counted stands before.
REPEATED = """
@triton.jit
def plus_one(x):
    return x + 1.0

@triton.jit
def repeated(y, count: tl.constexpr):
    i = tl.arange(0, 16)
    x = tl.zeros((16,), tl.float32)
    for _ in tl.static_range(count):
        x = plus_one(x)
    tl.store(y + i, x)

def counted(count):
    global calls
    calls = 0
    y = torch.zeros(16)
    repeated[(1,)](y, count)
    assert (y == count).all() and tl.core.is_builtin(tl.arange)
    return calls

counted(2)
print("right" if counted(2) == counted(40) else "wrong")
"""
PATCHES = (
    """
from triton.runtime import interpreter
calls, before = 0, interpreter._patch_builtin

def patch(*arguments):
    global calls
    calls += 1
    before(*arguments)

interpreter._patch_builtin = patch
"""
    + REPEATED
)
SHAPES = (
    """
calls, before = 0, tl.tuple.__init__

def init(*arguments):
    global calls
    calls += 1
    before(*arguments)

tl.tuple.__init__ = init
"""
    + REPEATED
)
SPLATS = (
    """
from triton.runtime.interpreter import InterpreterBuilder
calls, before = 0, InterpreterBuilder.create_splat

def create_splat(*arguments):
    global calls
    calls += 1
    return before(*arguments)

InterpreterBuilder.create_splat = create_splat
"""
    + REPEATED
)

OVERFLOW = """
@triton.jit
def step(x, y, by: tl.constexpr, unsigned: tl.constexpr):
    i = tl.arange(0, 16)
    a = tl.load(x + i)
    if unsigned:
        a = a.to(tl.uint32, bitcast=True)
    if by == 1:
        a = a + 1
    elif by == -1:
        a = a - 3
    else:
        a = a * 2
    tl.store(y + i, a)

def overflows(start, by, unsigned=False):
    x, y = torch.full((16,), start, dtype=torch.int32), torch.zeros(16, dtype=torch.int32)
    try:
        step[(1,)](x, y, by, unsigned)
    except Exception as error:
        assert "overflows" in str(error), error
        return True
    return False

last, first = 2**31 - 1, -(2**31)
seen = [overflows(last, 1), overflows(first + 2, -1), overflows(2**30, 2)]
unseen = [overflows(last - 1, 1), overflows(first + 3, -1), overflows(2**30 - 1, 2), overflows(-1, 1, unsigned=True)]
print("right" if all(seen) and not any(unseen) else "wrong")
"""


# Takes names of programs, and answers each with its status when it has ended. What it has printed, and the last line of
# its error, lie beside it.
SERVER = """
import contextlib, os, runpy, sys
import torch, triton.language
import triton.runtime.interpreter

for name in map(str.strip, sys.stdin):
    child = os.fork()
    if not child:
        with open(name + ".out", "w") as out, contextlib.redirect_stdout(out):
            try:
                runpy.run_path(name)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}".splitlines()[-1])
        os._exit(0)
    print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
Run = Callable[[str, bool], str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs a program in a forked child of a process that has imported what takes long."""
    folder, numbers = tmp_path_factory.mktemp("programs"), itertools.count()
    command, environment = [sys.executable, "-c", SERVER], os.environ | {"TRITON_INTERPRET": "1"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as server:

        def run(code: str, mended: bool) -> str:
            # A kernel's source is read from its file.
            path = folder / f"{next(numbers)}.py"
            path.write_text(HEADER.format(mended=mended, path=str(MEND)) + code)
            print(path, file=server.stdin, flush=True)
            # An error is printed; a signal is something else than a mend that is missing.
            assert server.stdout.readline().strip() == f"{path} 0"
            return path.with_suffix(".py.out").read_text().strip()

        yield run
        server.stdin.close()


@pytest.mark.parametrize(
    "code",
    [DOT, CAST, LOOP, SUMMATION, PATCHES, SHAPES, SPLATS, OVERFLOW],
    ids=["dot", "cast", "loop", "summation", "patches", "shapes", "splats", "overflow"],
)
def test_mended_it_is_right(run: Run, code: str) -> None:
    assert run(code, mended=True) == "right"


def test_mended_it_refuses_arithmetic_on_bfloat16(run: Run) -> None:
    assert run(ARITHMETIC, mended=True) == "refused"


@pytest.mark.parametrize(
    "code",
    [DOT, CAST, LOOP, ARITHMETIC, PATCHES, SHAPES, SPLATS, OVERFLOW],
    ids=["dot", "cast", "loop", "arithmetic", "patches", "shapes", "splats", "overflow"],
)
def test_each_mend_is_still_needed(run: Run, code: str) -> None:
    """Where one is not, Triton was mended: take it out of tests/interpreter.py."""
    assert run(code, mended=False) != "right"


def test_without_the_mends_bfloat16_is_refused(run: Run) -> None:
    code = """
import pyxlbert
x = torch.ones(2, 8)
pyxlbert.layer_norm(x, x[0], x[0], backend="triton")
try:
    pyxlbert.layer_norm(x.bfloat16(), x[0], x[0], backend="triton")
except RuntimeError as error:
    print(error)
"""
    assert "interpreter multiplies the bits of bfloat16" in run(code, mended=False)
