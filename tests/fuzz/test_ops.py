"""Random calls of the ops, the same ones each time; and that the check sees what is wrong."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("hypothesis")

import ops
import pages
import readers
from drawn import Drawn

import pyxlbert
from pyxlbert.testing.specs import SPECS, layer_norm

# Of one core 23 seconds on a Zen 4, less than a minute on a Zen 3.
CALLS = 8000


def python(*arguments: str) -> subprocess.CompletedProcess:
    """A process of its own, which a call may end."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(readers.HERE), "PYTHONFAULTHANDLER": "1"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def test_random_calls() -> None:
    """`make fuzz` has as many as it is given."""
    done = python(str(readers.HERE / "ops.py"), "--calls", str(CALLS))
    last = readers.FOUND / "last-call"
    assert done.returncode == 0, done.stderr[-3000:] + (last.read_text() if last.exists() else "")
    assert "none wrong" in done.stdout


@pytest.mark.parametrize("at_end", [False, True], ids=["before", "behind"])
def test_a_page_that_may_not_be_touched(at_end: bool) -> None:
    """A kernel that is told of a row more than its tensor holds ends the process; told the truth, it does not."""
    code = f"""if True:
        import torch, pyxlbert
        from pages import guarded
        x, weight = guarded(torch.ones(64, 8), {at_end}), torch.ones(8)
        mean, rstd, y = torch.zeros(66), torch.ones(66), torch.zeros(66, 8)
        first = x.data_ptr() - ROWS * {0 if at_end else 32}
        pyxlbert._C.cpu.layer_norm_bwd(first, first, weight.data_ptr(), mean.data_ptr(), rstd.data_ptr(),
                                       y.data_ptr(), 0, 0, 64 + ROWS, 8, 8, 8, 0, 0, 0, 1)
    """
    assert python("-c", code.replace("ROWS", "0")).returncode == 0
    done = python("-c", code.replace("ROWS", "1"))
    assert done.returncode == -11, (done.returncode, done.stderr)


def test_copies_between_pages_hold_the_same() -> None:
    x = torch.randn(5, 7, 3)
    for view in (x, x.transpose(0, 2), x[:, ::2], x[:1].expand(4, 7, 3), x[0, 0, 0], x > 0, x.bfloat16(), x[:0]):
        for at_end in (False, True):
            found = pages.guarded(view, at_end)
            assert torch.equal(found, view) and found.stride() == view.stride()


def test_the_check_sees_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A result that is a little off, depends on the threads, follows its place in the batch; an argument written to."""
    right = pyxlbert.layer_norm
    drawn = Drawn(layer_norm.Inputs((3, 5, 8)), torch.float32, 1, True, False, 1)
    offs = {
        "out 0: largest error": lambda y: y * (1 + 1e-4),
        "again: out 0": lambda y: y if torch.get_num_threads() == 1 else y.nextafter(torch.tensor(9.0)),
        "alone: out 0": lambda y: y if y.shape[0] > 1 else y.nextafter(torch.tensor(9.0)),
    }
    before = torch.get_num_threads()
    try:
        ops.check("layer_norm", drawn)
        for words, off in offs.items():

            def wrong(*arguments, off=off, **options):
                return off(right(*arguments, **options))

            monkeypatch.setitem(SPECS, "layer_norm", dataclasses.replace(SPECS["layer_norm"], function=wrong))
            with pytest.raises(AssertionError, match=words):
                ops.check("layer_norm", drawn)
            monkeypatch.undo()
        times = []

        def writing(x, *arguments, **options):
            found = right(x, *arguments, **options)
            if not times:
                x.detach()[0, 0, 0] = 3.0
            times.append(1)
            return found

        monkeypatch.setitem(SPECS, "layer_norm", dataclasses.replace(SPECS["layer_norm"], function=writing))
        monkeypatch.setattr(ops, "LEVELS", ops.LEVELS[:1])
        with pytest.raises(AssertionError, match="x after the call"):
            ops.check("layer_norm", drawn)
    finally:
        torch.set_num_threads(before)
