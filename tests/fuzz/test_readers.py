"""Readers of spoilt files: what the corpus keeps, some seconds of new ones, and that the check sees what is wrong."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import readers
from readers import READERS, Run, Wrong

pytest.importorskip("sentencepiece")
SECONDS = 30


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return Run(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", READERS)
def test_the_files_that_are_kept(name: str, run: Run) -> None:
    """The first is whole and is read; the others were once answered wrongly."""
    reader, inputs = READERS[name], run.inputs(name)
    reader.read(run.root / reader.folder)
    for data in inputs:
        run.read(name, data)


def test_every_file_that_is_kept_is_small_and_some_readers() -> None:
    known = {name.replace(", ", "_").replace(" ", "_") for name in READERS}
    for path in readers.CORPUS.rglob("*"):
        if path.is_file():
            assert path.parent.name in known and path.stat().st_size < 8192, path


def command(*arguments: str) -> subprocess.CompletedProcess:
    """In a process of its own, which a reader may end."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(readers.HERE)}
    return subprocess.run(
        [sys.executable, str(readers.HERE / "readers.py"), *arguments], env=environment, capture_output=True, text=True
    )


def test_some_seconds_of_spoilt_files() -> None:
    done = command("--seconds", str(SECONDS), "--seed", str(int(time.time()) // 86400))  # others every day
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "0 wrong" in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris has no wheel for this system")
def test_the_guided_search_runs_and_sees_our_code() -> None:
    done = command("sentence settings", "--guided", "--runs", "60")
    assert done.returncode == 0 and "Done 60 runs" in done.stderr, done.stderr[-2000:]
    assert "no interesting inputs were found" not in done.stderr


def hang(folder: Path) -> None:
    while True:
        pass


def fail(error: BaseException) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        raise error

    return read


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (hang, "it took more than"),
        (fail(KeyError("model")), "KeyError: 'model'"),
        (fail(ValueError("a field is wrong")), "ValueError without the file's name: a field is wrong"),
        (fail(BaseException("a panic")), "BaseException: a panic"),
    ],
    ids=["hang", "another kind", "no name", "panic"],
)
def test_the_check_sees_what_is_wrong(read: Callable, words: str, run: Run, monkeypatch) -> None:
    monkeypatch.setitem(READERS, "config", READERS["config"]._replace(read=read))
    monkeypatch.setattr(readers, "SECONDS", 0.2)
    with pytest.raises(Wrong, match=words):
        run.read("config", b"{}")
