"""Races in processes of their own, with fake contestants: whatever goes wrong is a reason in a row, and only there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pyxlbert.bench import apart, on_gpu
from pyxlbert.bench.report import RACE, Row

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def fakes():
    # A worker gets the path and imports the module by its name.
    sys.path.insert(0, str(HERE))
    try:
        import fake_races

        yield fake_races
    finally:
        sys.path.remove(str(HERE))


@pytest.fixture(scope="module")
def rows(fakes) -> dict[str, Row]:
    found = list(apart.run(fakes.faulty, "cpu", describe=fakes.describe))
    assert all(one.device == {"gpu": "a fake"} for one in found)
    assert [one.row.case for one in found] == [race.case for race in fakes.faulty()]
    return {one.row.case: one.row for one in found}


ILLEGAL = "RuntimeError: CUDA error: an illegal memory access was encountered"
FAULTS = {
    "ours right": {},
    "ours wrong": {"pyxlbert": "wrong answer: pyxlbert 0: largest difference 5.000e-01"},
    "ours nearly": {"pyxlbert": "wrong answer: pyxlbert 0: largest error 1.0"},
    "ours raising": {"pyxlbert": "ValueError: no such kernel"},
    "ours raising_later": {"pyxlbert": "OutOfMemoryError: CUDA out of memory. Tried to allocate 1 GiB"},
    "ours poisoning": {"pyxlbert": ILLEGAL},
    "ours dying": {"pyxlbert": f"its process ended by signal {int(signal.SIGSEGV)}"},
    "peer wrong": {"peer": "wrong answer: peer 0: largest difference 5.000e-01"},
    "both poisoning": {"peer": ILLEGAL, "pyxlbert": ILLEGAL},
    "last": {},
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_a_reason_and_the_others_have_their_times(rows: dict[str, Row], case: str) -> None:
    row = rows[case]
    assert set(row.failed) == set(FAULTS[case])
    for name, words in FAULTS[case].items():
        assert row.failed[name].startswith(words) and "\n" not in row.failed[name]
    assert set(row.timings) == {"peer", "other", "pyxlbert"} - set(row.failed)
    assert all(timing.median > 0 for timing in row.timings.values())
    assert ("no time" in row.line()) == ("pyxlbert" in row.failed)
    assert all(f"{name:22} no time: {why}" in row.details() for name, why in row.failed.items())
    assert set(row.faults) == {"pyxlbert"} & set(row.failed)


def test_a_race_that_cannot_be_built_is_a_row(rows: dict[str, Row]) -> None:
    row = rows["unbuilt"]
    assert row.timings == {} and row.failed == {RACE: "RuntimeError: no room for the inputs"} == row.faults
    assert "no time" in row.line() and row.best_peer is None


def test_who_does_not_end_is_ended(fakes) -> None:
    start = time.monotonic()
    hanging, last = apart.run(fakes.slow, "cpu", patience=3, describe=fakes.describe)
    assert hanging.row.failed == {"pyxlbert": "did not end within 3 s"}
    assert set(hanging.row.timings) == {"peer", "other"} and not last.row.failed
    assert time.monotonic() - start < 120


def test_no_race_is_begun_after_the_end(fakes, capsys) -> None:
    assert list(apart.run(fakes.faulty, "cpu", end=time.monotonic() - 1)) == []
    assert capsys.readouterr().err.count("NOT TIMED, no time left: double") == len(list(fakes.faulty()))


def test_a_run_that_is_killed_keeps_what_it_had(tmp_path: Path) -> None:
    """The third race kills the command with its file half done."""
    out = tmp_path / "results" / "fake.json"
    code = (
        "import sys, fake_races\n"
        "from pyxlbert.bench import apart, command as bench\n"
        "from pyxlbert.cli import main\n"
        "run = apart.run\n"
        "bench.apart.run = lambda source, device, **options: run(\n"
        "    fake_races.killed, 'cpu', **options, describe=fake_races.describe)\n"
        "bench.torch.cuda.is_available = lambda: True\n"
        f"main(['bench', '--device', 'cuda', '--out', {str(out)!r}])\n"
    )
    script = tmp_path / "command.py"
    script.write_text("if __name__ == '__main__':\n" + "".join(f"    {line}\n" for line in code.splitlines()))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    written = json.loads(out.read_text())
    assert written["device"] == {"gpu": "a fake"}
    assert [row["case"] for row in written["rows"]] == ["first", "second"]
    assert all(set(row["timings"]) == {"peer", "other", "pyxlbert"} for row in written["rows"])
    assert os.listdir(out.parent) == ["fake.json"]


def test_the_races_of_the_gpu_are_the_same_in_every_process() -> None:
    """The worker is given a place in the list."""
    names = [str(race) for race in on_gpu.races()]
    assert names == [str(race) for race in on_gpu.races()] and len(names) == len(set(names))
