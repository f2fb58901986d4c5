"""The job on a Ray cluster of this machine, one of whose two workers is killed on the way."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import corpus
import pytest

from pyxlbert.testing.directories import tiny_bert

pytest.importorskip("ray.data", exc_type=ImportError)

ROWS, SHARD = 4000, 40


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder of Ray's own, with a name so short that its sockets' names fit."""
    path = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def of_cluster(folder: Path) -> dict[int, str]:
    """The processes of the cluster in that folder: their numbers, and what they call themselves."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"RAY_TMPDIR={folder}".encode() in (path / "environ").read_bytes():
                found[int(path.name)] = (path / "cmdline").read_text()
        except OSError:
            continue
    return found


def test_a_worker_dies_and_nothing_is_lost(tmp_path: Path, short: Path) -> None:
    inputs, model, out = corpus.write(tmp_path / "in", (ROWS,)), tiny_bert(tmp_path / "model"), tmp_path / "out"
    arguments = ["--model", str(model), "--out", str(out), "--shard-rows", str(SHARD), "--threads", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pyxlbert", "embed", str(inputs[0]), *arguments, "--engine", "ray", "--processes", "2"],
        # No cluster that is there, no workers but those of the job, and those as urgent as other processes.
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        | {"RAY_TMPDIR": str(short), "RAY_prestart_worker_first_driver": "0", "RAY_worker_niceness": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        killed = None
        while killed is None and process.poll() is None:
            if any(out.glob("part-*")):
                workers = [number for number, name in of_cluster(short).items() if name.startswith("ray::MapWorker")]
                killed = workers[0] if workers else None
            time.sleep(0.02)
        assert killed is not None, process.communicate()[0]
        os.kill(killed, signal.SIGKILL)
        there = len(list(out.glob("part-*")))
        assert 0 < there < ROWS // SHARD
        output, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert f"{ROWS} rows in {ROWS // SHARD} shards" in output
    corpus.check(out, inputs, model)
    deadline = time.monotonic() + 20
    while of_cluster(short) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not of_cluster(short)
