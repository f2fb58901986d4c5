"""A run's folder is one process's alone while it trains."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILE = ".lock"


@contextmanager
def claimed(directory: Path) -> Iterator[None]:
    """Keeps other processes from training in a folder that is there. A killed process lets go.

    Raises:
        BlockingIOError: another process trains in it.
    """
    file = directory / FILE
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # A process's own lock: workers that outlive a killed one do not hold it.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(descriptor)
            raise BlockingIOError(f"output: another process trains in {str(directory)!r}") from None
        # Whoever held it before may have removed the file that was opened.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == file.stat().st_ino:
                break
        os.close(descriptor)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)
