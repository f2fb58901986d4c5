"""Threads: the number asked for is the number that runs, in the one OpenMP runtime of the process."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_set_num_threads_is_respected() -> None:
    """The threads that a kernel adds to the process, counted as the system sees them."""
    code = """
import os, torch, pyxlbert
x, weight = torch.randn(4096, 384), torch.ones(384)
def tasks():
    return len(os.listdir("/proc/self/task"))
before, added = tasks(), []
for threads in (1, 2, 4):
    torch.set_num_threads(threads)
    pyxlbert.layer_norm(x, weight, weight, backend="cpu")
    added.append(tasks() - before)
print(added)
"""
    assert run(code) == "[0, 1, 3]"


def test_threads_of_python_have_pools_of_their_own_size() -> None:
    """Each caller's own setting holds, and their results are the same bits."""
    code = """
import threading, torch, pyxlbert
x, weight = torch.randn(1000, 384), torch.ones(384)
wanted = pyxlbert.layer_norm(x, weight, weight, backend="cpu")
right = []
def work(threads):
    torch.set_num_threads(threads)
    right.extend(torch.equal(pyxlbert.layer_norm(x, weight, weight, backend="cpu"), wanted) for _ in range(20))
callers = [threading.Thread(target=work, args=(1 + i % 3,)) for i in range(6)]
for caller in callers: caller.start()
for caller in callers: caller.join()
print(len(right), all(right))
"""
    assert run(code) == "120 True"


@pytest.mark.parametrize("order", ["torch, pyxlbert", "pyxlbert, torch", "pyxlbert._C, torch"])
def test_one_openmp_runtime(order: str) -> None:
    """Two runtimes would be two pools of threads that fight for the cores."""
    code = f"""
import re, {order}
import torch, pyxlbert
weight = torch.ones(64)
pyxlbert.layer_norm(torch.randn(2000, 64), weight, weight, backend="cpu")
torch.randn(500, 500) @ torch.randn(500, 500)
maps = open("/proc/self/maps").read()
print(*sorted(set(re.findall(r"\\S*/lib(?:gomp|iomp|omp)\\S*", maps))), sep="\\n")
"""
    runtimes = run(code).splitlines()
    assert len(runtimes) == 1, runtimes
