"""A plugin of pytest that says which files' functions the tests call: `pytest -p called_files FILES`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

CALLED: set[str] = set()


@contextmanager
def watched(called: set[str]) -> Iterator[None]:
    """Adds the files whose functions are called within."""
    sys.setprofile(lambda frame, event, value: called.add(frame.f_code.co_filename))
    try:
        yield
    finally:
        sys.setprofile(None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    with watched(CALLED):
        return (yield)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for file in sorted(CALLED):
        terminalreporter.write_line(f"calls {file}")
