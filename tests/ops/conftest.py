"""Fixtures of the op tests: poisoned memory, and the record of what ran where."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from pyxlbert.backends import native


@pytest.fixture
def ledger(record_property):
    """Call with (op, runner) once a parity check has passed; tests/conftest.py counts the calls of all processes."""

    def record(op: str, runner: str) -> None:
        record_property("parity", (op, runner))

    return record


@pytest.fixture
def poisoned(monkeypatch):
    """Inside `with poisoned():` every tensor that torch.empty and friends hand out is full of NaN, and so is
    the scratch memory of the native kernels."""
    module = native._C

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
            if module is not None:
                module.poison_workspaces(True)
            try:
                yield
            finally:
                if module is not None:
                    module.poison_workspaces(False)

    return block
