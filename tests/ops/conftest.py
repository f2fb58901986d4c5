"""Fixtures of the op tests: poisoned memory, and the ledger of what ran where."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

import pytest
import torch

_LEDGER: Counter = Counter()


@pytest.fixture
def ledger():
    """Call with (op, runner) once a parity check has passed."""

    def record(op: str, runner: str) -> None:
        _LEDGER[op, runner] += 1

    return record


@pytest.fixture
def poisoned(monkeypatch):
    """Inside `with poisoned():` every tensor that torch.empty and friends hand out is full of NaN."""

    def poison(function):
        def make(*args, **kwargs):
            tensor = function(*args, **kwargs)
            if tensor.is_floating_point() and tensor.device.type != "meta":
                tensor.fill_(float("nan"))
            return tensor

        return make

    @contextmanager
    def block():
        with monkeypatch.context() as patch:
            for owner, name in (
                (torch, "empty"),
                (torch, "empty_like"),
                (torch, "empty_strided"),
                (torch.Tensor, "new_empty"),
            ):
                patch.setattr(owner, name, poison(getattr(owner, name)))
            yield

    return block


def pytest_terminal_summary(terminalreporter) -> None:
    if not _LEDGER:
        return
    from pyxlbert import backends
    from pyxlbert.ops._define import OPS

    terminalreporter.section("op x backend: parity checks that ran, or why none did")
    for op in sorted(OPS):
        for backend in backends.NAMES:
            ran = {runner: n for (name, runner), n in _LEDGER.items() if name == op and runner.split("/")[0] == backend}
            if ran:
                text = ", ".join(f"{runner} {n}" for runner, n in sorted(ran.items()))
            elif backend not in OPS[op].implementations:
                text = backends.unavailable(backend) or "no kernel"
            else:
                text = backends.unavailable(backend) or "deselected"
            terminalreporter.write_line(f"{op:28} {backend:7} {text}")
