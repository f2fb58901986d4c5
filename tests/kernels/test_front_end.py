"""The kinds of launches that the suite makes are such that Triton's front end takes.

See compiled.py for what need not be sent again.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import compiled
import pytest
import triton_kernels

from pyxlbert.backends import OPS

ROOT = Path(__file__).resolve().parents[2]
ALL = os.environ.get("PYXLBERT_TEST_ALL") == "1"
_spec = importlib.util.spec_from_file_location("front_end", Path(__file__).parent / "front_end.py")
front_end = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(front_end)


TRITON_OPS = {name for name, op in OPS.items() if "triton" in op.backends}
# Ops whose kernels are the same, or quick, share a process.
RELATIVE = ["relative_attention", "two_stream_attention"]
ROWS = sorted(name for name in TRITON_OPS if "attention" not in name)


def test_every_op_of_triton_is_sent() -> None:
    assert {"attention", *RELATIVE, *ROWS} == TRITON_OPS


def test_a_cover_has_every_pair_of_features() -> None:
    """Of random kinds, of kinds without anything of their own, and of one."""
    draw = random.Random(0)
    kinds = {f"kind {n}": frozenset(f"{k}: {draw.randrange(3)}" for k in range(12)) for n in range(200)}
    chosen = front_end.covering(kinds)
    assert len(chosen) < len(kinds) / 4 and len(set(chosen)) == len(chosen)

    def pairs(names) -> set[frozenset[str]]:
        return {frozenset(pair) for name in names for pair in itertools.combinations(kinds[name], 2)}

    assert pairs(chosen) == pairs(kinds)
    assert front_end.covering({"one": frozenset({"a"})}) == ["one"]
    assert front_end.covering({"one": frozenset({"a"}), "other": frozenset({"a", "b"})}) == ["other"]


@pytest.mark.parametrize("ops", [["attention"], RELATIVE, ROWS], ids=["attention", "relative", "rows"])
def test_the_front_end_takes_the_kinds_of_launches(ops: list[str]) -> None:
    """None, 1 and multiples of 16 among the arguments each make a kernel of their own."""
    if compiled.passed(f"front end {ops[0]}", triton_kernels.digest()):
        return
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(ROOT / "build" / "triton")
    command = [sys.executable, str(Path(__file__).parent / "front_end.py"), *ops]
    done = subprocess.run([*command, "--all"] if ALL else command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {line["kernel"]: line for line in map(json.loads, done.stdout.splitlines())}
    failures = [f"{kernel} in {failure}" for kernel, line in found.items() for failure in line["failures"]]
    assert not failures, "\n".join(failures)
    # A kernel that no case launches would never be looked at: rows have a forward and a backward, scores more.
    if ops == ROWS:
        assert {f"{op}.{kernel}" for op in ops for kernel in ("_fwd", "_bwd")} <= set(found)
    else:
        kernels = {"fwd", "bwd_rows", "bwd_keys", "bwd_queries"}
        assert kernels <= {kernel.rpartition(".")[2] for kernel in found}
        # Parts of scores are joined in one way or few.
        assert min(line["kinds"] for kernel, line in found.items() if not kernel.endswith(".join")) >= 8, found
    assert all(1 <= line["sent"] <= line["kinds"] for line in found.values())
    compiled.write(f"front end {ops[0]}", triton_kernels.digest())
