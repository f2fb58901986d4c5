"""Fixtures of the op tests: poisoned memory, and the record of what ran where."""

from __future__ import annotations

import pytest

from pyxlbert.testing import poison


@pytest.fixture
def ledger(record_property):
    """Call with (op, runner) once a parity check has passed; tests/conftest.py counts the calls of all processes."""

    def record(op: str, runner: str) -> None:
        record_property("parity", (op, runner))

    return record


@pytest.fixture
def poisoned():
    """Inside `with poisoned():` memory that is handed out is full of NaN."""
    return poison.poisoned
