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
import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_suffix(".json")
ROOT = Path(__file__).resolve().parents[2]
WRITES = os.environ.get("PYXLBERT_WRITE_COMPILED") == "1"
ALL = os.environ.get("PYXLBERT_TEST_ALL") == "1"


def sources(folder: str, *suffixes: str) -> list[Path]:
    """A folder's files with these suffixes, without those that an editor hides beside them."""
    found = [path for path in (ROOT / folder).iterdir() if path.suffix in suffixes and not path.name.startswith(".")]
    assert found, f"{folder}: no file has one of the suffixes {suffixes}"
    return found


def versions(*packages: str) -> list[str]:
    """Of Python, whose syntax trees Triton reads too, and of these packages."""
    return [".".join(map(str, sys.version_info[:2])), *(f"{one} {importlib.metadata.version(one)}" for one in packages)]


def compiler() -> str:
    """What CXX, or g++, says of itself."""
    command = [*shlex.split(os.environ.get("CXX", "g++")), "--version"]
    return subprocess.run(command, capture_output=True, text=True).stdout


def digest(files: Iterable[Path], *words: str) -> str:
    """Of the names and contents of these files, and of what else counts, such as the compiler's version."""
    found = hashlib.sha256()
    for path in sorted(set(files)):
        found.update(f"{path.relative_to(ROOT).as_posix()}\0{path.stat().st_size}\0".encode())
        found.update(path.read_bytes())
    found.update(json.dumps(words).encode())
    return found.hexdigest()


def passed(check: str, digest: str) -> bool:
    """Whether a check has passed with this digest, and need not be made again.

    A run that writes makes every check, and forgets that it has passed before.
    """
    if WRITES and not ALL:
        _change(lambda said: said.pop(check, None))
    return not (WRITES or ALL) and FILE.exists() and json.loads(FILE.read_text()).get(check) == digest


def known(digest: Callable[[], str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Marks a test as known by this digest, under the name that pytest has for it and its parameters.

    Fixtures are made before this can be asked, so such a test asks for what it builds itself.
    """

    def decorated(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def asked(**given: Any) -> None:
            check = os.environ["PYTEST_CURRENT_TEST"].rpartition(" (")[0]
            if not passed(check, digest()):
                test(**given)
                write(check, digest())

        return asked

    return decorated


def write(check: str, digest: str) -> None:
    """Says that a check has passed, in a run that is to say so."""
    if WRITES and not ALL:
        _change(lambda said: said.update({check: digest}))


def _change(change: Callable[[dict[str, str]], Any]) -> None:
    FILE.touch()
    with FILE.open("r+") as file:
        # Tests run in several processes.
        fcntl.flock(file, fcntl.LOCK_EX)
        said = json.loads(file.read() or "{}")
        change(said)
        file.seek(0)
        file.write(json.dumps(dict(sorted(said.items())), indent=1) + "\n")
        file.truncate()
