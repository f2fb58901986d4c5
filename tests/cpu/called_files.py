"""A plugin of pytest that says which files' functions the tests call: `pytest -p called_files FILES`."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

CALLED: set[str] = set()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    sys.setprofile(lambda frame, event, value: CALLED.add(frame.f_code.co_filename))
    try:
        return (yield)
    finally:
        sys.setprofile(None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for file in sorted(CALLED):
        terminalreporter.write_line(f"calls {file}")
