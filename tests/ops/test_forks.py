"""A process whose threads have worked may be forked: the child works too, with as many threads, to the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("forking.py")
WAYS = ("os", "late", "thread", "pool", "loader", "server", "forkserver", "spawn")


def flat(found: object) -> list[list[object]]:
    """The pairs of a way, however it nests them."""
    assert isinstance(found, list)
    if len(found) == 2 and isinstance(found[1], bool):
        return [found]
    return [pair for inner in found for pair in flat(inner)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_children_of_a_process_that_has_worked_work() -> None:
    command = [sys.executable, str(SCRIPT), *WAYS]
    # A child that waits for workers that do not exist would wait for ever.
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == list(WAYS)
    for way in WAYS:
        pairs = flat(found[way])
        assert pairs, way
        # Two workers beside the caller are three threads; a spawned process may start others of Python's meanwhile.
        assert all(added >= 2 and same for added, same in pairs), (way, pairs)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_runtime_that_cannot_be_forked_leaves_one_thread() -> None:
    """As with torch 2.6, whose OpenMP is older; here a process whose module says so, and has not worked yet."""
    code = """
import os, sys, types, torch
from pyxlbert.backends import native
native._C = types.SimpleNamespace(survive_forks=lambda: False)
native.survive_forks()
torch.set_num_threads(3)
if os.fork() == 0:
    print(torch.get_num_threads(), flush=True)
    os._exit(0)
print(os.wait()[1], torch.get_num_threads())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["1", "0", "3"], done.stderr
    assert "this process was forked from one with several threads, and works with one" in done.stderr
