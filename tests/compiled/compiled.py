"""Which checks of compilers' results have passed, by the content of all that they depend on.

A check that compiles for minutes, and runs nothing or the same on every machine, finds the same for the same sources,
compilers and limits.  So what has passed is written to compiled.json beside this file, as a digest of these; where the
digest is the same the check need not compile again.  `make compiled` compiles all of them and writes the file anew;
PYXLBERT_TEST_ALL=1 compiles all of them and writes nothing.  Digests that are not up to date cost time alone: what
has changed is compiled by any run of the tests.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_suffix(".json")
ROOT = Path(__file__).resolve().parents[2]
WRITES = os.environ.get("PYXLBERT_WRITE_COMPILED") == "1"
ALL = os.environ.get("PYXLBERT_TEST_ALL") == "1"


def digest(files: Iterable[Path], *words: str) -> str:
    """Of the names and contents of these files, and of what else counts, such as the compiler's version."""
    found = hashlib.sha256()
    for path in sorted(set(files)):
        found.update(f"{path.relative_to(ROOT).as_posix()}\0{path.stat().st_size}\0".encode())
        found.update(path.read_bytes())
    found.update(json.dumps(words).encode())
    return found.hexdigest()


def passed(check: str, digest: str) -> bool:
    """Whether a check has passed with this digest, and need not be made again."""
    return not (WRITES or ALL) and FILE.exists() and json.loads(FILE.read_text()).get(check) == digest


def known(digest: Callable[[], str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Of a test that is known by this digest, by its own name and the values of its parameters that are texts.

    What it builds it asks for inside, by calling a fixture: fixtures are made before this can be asked.
    """

    def decorated(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def asked(**given: Any) -> None:
            words = [test.__module__, test.__name__, *(one for one in given.values() if isinstance(one, str))]
            check = " ".join(words)
            if not passed(check, digest()):
                test(**given)
                write(check, digest())

        return asked

    return decorated


def write(check: str, digest: str) -> None:
    """Says that a check has passed, in a run that is to say so."""
    if not WRITES or ALL:
        return
    FILE.touch()
    with FILE.open("r+") as file:
        # Tests run in several processes.
        fcntl.flock(file, fcntl.LOCK_EX)
        said = json.loads(file.read() or "{}") | {check: digest}
        file.seek(0)
        file.write(json.dumps(dict(sorted(said.items())), indent=1) + "\n")
        file.truncate()
