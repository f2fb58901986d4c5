"""Every kind of launch that the suite makes is one that Triton's front end takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyxlbert.backends import OPS

ROOT = Path(__file__).resolve().parents[2]
ALL = os.environ.get("PYXLBERT_TEST_ALL") == "1"


TRITON_OPS = {name for name, op in OPS.items() if "triton" in op.backends}
# Ops whose kernels are the same, or quick, share a process.
RELATIVE = ["relative_attention", "two_stream_attention"]
ROWS = sorted(name for name in TRITON_OPS if "attention" not in name)


def test_every_op_of_triton_is_sent() -> None:
    assert {"attention", *RELATIVE, *ROWS} == TRITON_OPS


@pytest.mark.parametrize("ops", [["attention"], RELATIVE, ROWS], ids=["attention", "relative", "rows"])
def test_the_front_end_takes_every_kind_of_launch(ops: list[str]) -> None:
    """None, 1 and multiples of 16 among the arguments each make a kernel of their own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(ROOT / "build" / "triton")
    command = [sys.executable, str(Path(__file__).parent / "front_end.py"), *ops]
    done = subprocess.run([*command, "--all"] if ALL else command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [found["op"] for found in lines] == ops
    for found in lines:
        assert not found["failures"], "\n".join(found["failures"])
        # A kernel that no case launches would never be looked at: rows have a forward and a backward, scores more.
        launched = {kernel.rpartition(".")[2] for kernel in found["kinds"]}
        assert {"_fwd", "_bwd"} <= launched or {"fwd", "bwd_rows", "bwd_keys", "bwd_queries"} <= launched
        # Parts of scores are joined in one way or few.
        kinds = [number for kernel, number in found["kinds"].items() if not kernel.endswith(".join")]
        assert "attention" not in found["op"] or min(kinds) >= 8, found["kinds"]
