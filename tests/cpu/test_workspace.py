"""Scratch memory of the kernels: kept between calls, and an exception when there is no more."""

from __future__ import annotations

import subprocess
import sys

import pytest

COLUMNS = 8 << 20

# The process may take 32 MiB more than the result needs, and the kernel's scratch is a row of floats a thread.
NO_ROOM = f"""
import resource
import torch
import pyxlbert

torch.set_num_threads(2)
x, parameter = torch.ones(2, {COLUMNS}), torch.ones({COLUMNS})
calls = {{
    "layer_norm": lambda: pyxlbert.layer_norm(x, parameter, parameter),
    "dropout_add_layer_norm": lambda: pyxlbert.dropout_add_layer_norm(x, x, parameter, parameter),
    "embedding_layer_norm": lambda: pyxlbert.embedding_layer_norm(
        torch.tensor([0, 1]), x, None, None, parameter, parameter
    ),
}}
pyxlbert.layer_norm(x[:, :40000].contiguous(), parameter[:40000], parameter[:40000])  # the team is awake
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
limit = used + x.numel() * 4 + (32 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    calls[OP]()
except MemoryError:
    print("MemoryError")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits a process the way Linux does")
@pytest.mark.parametrize("op", ["layer_norm", "dropout_add_layer_norm", "embedding_layer_norm"])
def test_no_memory_is_an_exception(op: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NO_ROOM.replace("OP", repr(op))], capture_output=True, text=True, timeout=100
    )
    assert done.stdout.strip() == "MemoryError", (done.returncode, done.stderr)
