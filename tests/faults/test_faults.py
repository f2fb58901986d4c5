"""What may happen to a process: kills, limits, disks, folders, pipes.  Nothing is half-written, the status says so."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow")

import kills

from pyxlbert import cli
from pyxlbert.testing.directories import tiny_bert

MOMENTS = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("model") / "bert")


@pytest.mark.parametrize("name", ["embed", "embed, many files", "finetune", "pretrain"])
def test_killed_at_random_moments(name: str, model: Path, tmp_path: Path) -> None:
    """`make faults` has a hundred of each."""
    hits, ends = kills.killed_again_and_again(kills.jobs(model)[name], tmp_path, MOMENTS, seed=0)
    assert hits > 0 and ends > 0


@pytest.mark.parametrize("name", ["embed", "embed, many files", "finetune", "finetune, evaluated", "pretrain"])
def test_killed_after_every_rename(name: str, model: Path, tmp_path: Path) -> None:
    assert kills.killed_after_every_rename(kills.jobs(model)[name], tmp_path) >= (1 if name == "embed" else 6)


def test_the_check_sees_what_is_half_written(model: Path, tmp_path: Path) -> None:
    """A writer that writes in place."""

    def write(root: Path) -> None:
        kills._prepare_lines(root)
        (root / "out.npy").write_bytes((root / "out.npy").read_bytes()[:100])

    job = kills.jobs(model)["embed"]
    write(tmp_path)
    with pytest.raises(ValueError):
        job.check(tmp_path)


def run(arguments: list[str], prepare: Callable[[], None]) -> tuple[int, str]:
    """The status and the errors of a command in a forked child, where `prepare` runs first."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 70
        try:
            os.dup2(writing, 2)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            prepare()
            status = cli.main(arguments)
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as stream:
        errors = stream.read()
    return kills.ended(child), errors


@pytest.fixture
def embed(model: Path, tmp_path: Path) -> list[str]:
    """A command over an output that is there already."""
    (tmp_path / "in.txt").write_text("\n".join(["the hello world " * 40] * 900) + "\n")
    np.save(tmp_path / "out.npy", np.full((3, 2), 7.0))
    return ["embed", str(tmp_path / "in.txt"), "--model", str(model), "--out", str(tmp_path / "out.npy")]


def untouched(folder: Path) -> bool:
    return sorted(path.name for path in folder.iterdir()) == ["in.txt", "out.npy"] and bool(
        (np.load(folder / "out.npy") == 7.0).all()
    )


def test_a_full_disk(embed: list[str], tmp_path: Path) -> None:
    """A limit of the size of files is what a process can set by itself."""
    status, errors = run(embed, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)))
    assert status == 1 and errors.count("\n") == 1, errors
    assert str(tmp_path / "out.npy") in errors and "cannot be written" in errors
    assert untouched(tmp_path)


def _like_anybody() -> None:
    """Takes from a process of root the right to write where modes forbid it."""
    libc = ctypes.CDLL(None, use_errno=True)
    # Version 3 of the interface; of this process; three sets of 64 bits, in halves.
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    for ask in (libc.capget, libc.capset):
        if ask(header, sets):
            raise OSError(ctypes.get_errno(), "capabilities")
        for place in range(3):
            sets[place] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


def test_a_folder_that_may_only_be_read(embed: list[str], tmp_path: Path) -> None:
    """Before any work: the model is not looked at."""
    embed[embed.index("--model") + 1] = "none"
    tmp_path.chmod(0o555)
    try:
        status, errors = run(embed, _like_anybody)
    finally:
        tmp_path.chmod(0o755)
    assert status == 1 and "is not writable" in errors and errors.count("\n") == 1, errors
    assert untouched(tmp_path)


# In a process of its own: one that has worked has memory left over, which no limit takes away.
LIMITED = """
import resource, sys
import torch
from pathlib import Path
from pyxlbert import cli

def limit(more):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more,) * 2)

def at_the_first_module(*_):
    first.remove()
    limit(1 << 20)

torch.set_num_threads(1)
BEGIN
sys.exit(cli.main(sys.argv[1:]))
"""


def limited(begin: str, arguments: list[str]) -> tuple[int, str]:
    """The status and the errors of a command in a new process, where `begin` sets its limit."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED.replace("BEGIN", begin), *arguments], stderr=subprocess.PIPE, text=True
    )
    return done.returncode, done.stderr


def test_too_little_memory_for_a_model(embed: list[str], tmp_path: Path) -> None:
    """A batch for which there is none: one line and a status."""
    begin = "first = torch.nn.modules.module.register_module_forward_pre_hook(at_the_first_module)"
    status, errors = limited(begin, [*embed, "--batch-size", "900"])
    *warned, line = errors.splitlines()
    assert status == 1 and "memory" in line and line.startswith("pyxlbert embed: error: "), errors
    assert all("texts cut" in one or one.startswith("  ") for one in warned), errors
    assert untouched(tmp_path)


def test_too_little_memory_to_begin(embed: list[str], tmp_path: Path) -> None:
    """A library that does not find its place is one line too."""
    status, errors = limited("limit(0)", embed)
    assert status == 1 and errors.count("\n") == 1 and errors.startswith("pyxlbert embed: error: "), errors
    assert untouched(tmp_path)


def test_a_pipe_that_nobody_reads() -> None:
    """The end that SIGPIPE makes, and no stack of calls, on exit neither."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "pyxlbert", "info"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert done.returncode == 128 + signal.SIGPIPE and done.stderr == "", done


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="has no device that is always full")
def test_a_full_disk_for_what_is_printed() -> None:
    """One line, on exit too, where Python would write again what is left."""
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "pyxlbert", "info"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "pyxlbert info: error: the disk is full\n")


def test_errors_that_nobody_reads(embed: list[str], tmp_path: Path) -> None:
    """The vectors were whole before their number was said."""

    def prepare() -> None:
        reading, writing = os.pipe()
        os.dup2(writing, 2)
        os.close(reading)

    assert run(embed, prepare) == (128 + signal.SIGPIPE, "")
    assert np.load(tmp_path / "out.npy").shape == (900, 32)


def test_a_pipe_of_something_else_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where what is printed is read, a broken pipe is one that the command itself has opened."""

    def broken() -> str:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(cli, "info_text", broken)
    assert cli.main(["info"]) == 1
    assert "pyxlbert info: error: [Errno 32] Broken pipe" in capfd.readouterr().err
