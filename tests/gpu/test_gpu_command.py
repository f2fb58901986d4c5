"""`make gpu` where there is no GPU, and its parts that need none."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def load(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    # Its records look for their annotations there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def command(*parts: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / "bench" / "gpu.py"), *parts], capture_output=True, text=True)


def test_without_a_gpu_it_says_so_and_fails() -> None:
    gpu = load("bench/gpu.py")
    reason = gpu.missing()
    assert (reason is None) == torch.cuda.is_available()
    if reason is not None:
        done = command()
        assert done.returncode == 2 and f"gpu: nothing was run: {reason}" in done.stderr and not done.stdout


def test_a_part_or_a_folder_that_is_none_is_refused(tmp_path) -> None:
    done = command("tests")
    assert done.returncode == 2 and "PART: got 'tests', wanted one of build, triton, test, sanitize," in done.stderr
    file = tmp_path / "file"
    file.touch()
    done = command("--out", str(file))
    assert done.returncode == 2 and f"--out: got '{file}', wanted a folder" in done.stderr
    done = command("--out", "/proc")
    assert done.returncode == 2 and "--out: '/proc' is not writable" in done.stderr


def test_all_parts_end_within_nine_minutes() -> None:
    gpu = load("bench/gpu.py")
    assert set(gpu.LIMITS) == set(gpu.PARTS) == {part for stage in gpu.STAGES for part in stage} | {"prefer"}
    assert sum(max(gpu.LIMITS[part] for part in stage) for stage in gpu.STAGES) <= 540


def test_every_name_it_uses_is_there() -> None:
    gpu = load("bench/gpu.py")
    for path in gpu.TESTS:
        assert (ROOT / path).exists(), path
    kernels = {key.kernel for key in importlib.import_module("pyxlbert.kernels._configurations").TABLE}
    assert set(gpu.TILED) <= kernels


def test_a_command_that_fails_or_does_not_end_is_no_success() -> None:
    gpu = load("bench/gpu.py")
    assert gpu.run([sys.executable, "-S", "-c", "pass"], 60) == "passed"
    assert gpu.run([sys.executable, "-S", "-c", "raise SystemExit(3)"], 60) == "exit status 3"
    assert gpu.run([sys.executable, "-S", "-c", "import time; time.sleep(60)"], 0.5) == "did not end within 0 s"


# A worker as tests/gpu/correct.py is one, whose cases go wrong as their names say.
PLANTED = """
import json, os, signal, sys, time
out, *cases = sys.argv[1:]
lines = open(out).read().splitlines() if os.path.exists(out) else []
done = {json.loads(line).get("case") for line in lines if line.endswith("}")}
signal.signal(signal.SIGINT, signal.default_int_handler)
if cases == ["absent"]:
    sys.exit("backend 'cuda': it was built without its kernels")
with open(out, "a") as file:
    def say(**line):
        print(json.dumps(line), file=file, flush=True)
    left = [case for case in cases if case not in done]
    for place, case in enumerate(left):
        say(begin=case)
        try:
            if case.startswith("hangs"):
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                time.sleep(100)
            if case.startswith("waits"):
                time.sleep(100)
            if case.startswith("is killed"):
                print('{"case": "half a li', end="", file=file, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
        except KeyboardInterrupt:
            say(left=len(left) - place)
            sys.exit(130)
        if case.startswith("poisons"):
            say(case=case, result="RuntimeError: CUDA error: an illegal memory access was encountered")
            sys.exit(3)
        say(case=case, result="AssertionError: grad key is wrong" if case.startswith("fails") else "passed")
"""


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """The command, run for real on planted workers, and what its folder holds."""
    gpu = load("bench/gpu.py")
    script = tmp_path / "planted.py"
    script.write_text(PLANTED)
    for name, value in (("missing", lambda: None), ("lay_out", lambda: None), ("machine", lambda: {"gpu": "A fake"})):
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(gpu, "TESTS", (str(tmp_path / "test_planted.py"),))
    (tmp_path / "test_planted.py").write_text("def test_models(): pass\ndef test_other(): assert 0\n")

    def run(cases: dict[str, list[str]], limit: float, patience: float) -> tuple[int, str, dict[str, dict[str, str]]]:
        def workers(share, name, backend, count, *more):
            out = share.out / f"{name}-{backend}.jsonl"
            return [gpu.Worker([sys.executable, "-S", str(script), str(out), *cases[backend]], out)]

        monkeypatch.setattr(gpu, "_correct", workers)
        monkeypatch.setattr(gpu, "PATIENCE", patience)
        monkeypatch.setitem(gpu.LIMITS, "test", limit)
        out = tmp_path / "out"
        status = gpu.main(["test", "--out", str(out)])
        assert json.loads((out / "machine.json").read_text()) == {"gpu": "A fake"}
        found = {path.stem: gpu.Worker([], path).results() for path in out.glob("*.jsonl")}
        return status, json.loads((out / "summary.json").read_text())["test"], found

    return run


def test_what_a_case_does_to_its_process_costs_that_case_alone(planted) -> None:
    """One hangs, one kills its process, one leaves it without a device, one is wrong: all others have their result."""
    cuda = ["first", "hangs", "second", "poisons it", "poisons again", "third", "is killed", "last"]
    status, said, found = planted({"cuda": cuda, "triton": ["first", "fails", "last"]}, 60, 1.5)
    assert status == 1
    poisoned = "RuntimeError: CUDA error: an illegal memory access was encountered"
    wrong = {"hangs": "did not end within 2 s", "poisons it": poisoned, "poisons again": poisoned}
    wrong |= {"is killed": "its process ended by signal 9"}
    assert found["test-cuda"] == dict.fromkeys(cuda, "passed") | wrong
    assert found["test-triton"] == {"first": "passed", "fails": "AssertionError: grad key is wrong", "last": "passed"}
    assert said == (
        "suite: 5 of 11 failed, the first ('test-cuda hangs', 'did not end within 2 s'); tests: exit status 1"
    )


def test_at_the_limit_workers_say_what_is_left(planted) -> None:
    cases = {"cuda": ["absent"], "triton": ["first", "waits", "second", "third"]}
    status, said, found = planted(cases, 8, 30)
    assert status == 1 and found == {"test-triton": {"first": "passed"}}
    assert said.startswith(
        "suite: test-cuda: its process ended with 1 before its first case: backend 'cuda': it was built without its "
        "kernels; no time for the last 3 cases"
    )


def test_parts_of_a_stage_run_side_by_side_and_one_that_raises_stops_no_other(tmp_path, monkeypatch) -> None:
    gpu = load("bench/gpu.py")
    both, given = threading.Barrier(2, timeout=20), {}

    def part(name: str):
        def run(share) -> str:
            given[name] = share
            if name in ("build", "triton"):
                both.wait()
            if name == "sanitize":
                raise OSError("no room")
            return "passed"

        return run

    monkeypatch.setattr(gpu, "PARTS", {name: part(name) for name in gpu.PARTS})
    results = gpu.carry_out(gpu.STAGES, tmp_path)
    assert results == dict.fromkeys(set(gpu.PARTS) - {"prefer"}, "passed") | {"sanitize": "OSError: no room"}
    assert json.loads((tmp_path / "summary.json").read_text()) == results
    assert sorted(given["test"].before) == ["build", "triton"] and not given["build"].before
    assert given["build"].cores == max(1, os.cpu_count() // 2) and given["bench"].cores == os.cpu_count()


def test_the_module_is_built_whole_whatever_setuptools_is_there(tmp_path, monkeypatch) -> None:
    """With a compiler that only makes the files; pyproject.toml, which wants a newer setuptools, is not read."""
    gpu = load("bench/gpu.py")
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/bash\nwhile [ $# -gt 0 ]; do case $1 in -o|-MF) : > "$2"; shift;; esac; shift; done\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(gpu, "BUILD", tmp_path / "gpu")
    monkeypatch.setattr(gpu, "architecture", lambda: "90a")
    (tmp_path / "gpu" / "pyxlbert").mkdir(parents=True)
    log = tmp_path / "build.log"
    assert gpu.build(gpu.Share(tmp_path, 120, 2)) == "passed", log.read_text()
    (module,) = (tmp_path / "gpu" / "pyxlbert").iterdir()
    assert module.name.startswith("_C.") and not (tmp_path / "pyproject.toml").exists()
    assert "backend cuda not built" in log.read_text()


def test_cases_of_a_backend_are_appended_as_they_come(tmp_path, monkeypatch) -> None:
    """Here on backend "cpu"; of two parts that have every case, one has an error of the device."""
    correct = load("tests/gpu/correct.py")
    out, other = tmp_path / "out.jsonl", tmp_path / "other.jsonl"
    every = [name for name, _ in correct.cases("cpu", correct.DTYPES)]
    assert len(set(every)) == len(every) and any("same bits" in name for name in every)
    part = ["--part", f"3/{len(every) // 4}"]
    assert correct.main(["cpu", str(out), *part]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    names = [line["begin"] for line in lines[::2]]
    assert len(names) >= 4 and lines[1::2] == [{"case": name, "result": "passed"} for name in names]
    # What has a result is not run again.
    monkeypatch.setattr(correct, "one", lambda *_: pytest.fail("it was run again"))
    assert (
        correct.main(["cpu", str(out), *part]) == 0
        and correct.main(["cpu", str(other), *part, "--done", str(out)]) == 0
    )
    assert not other.read_text()

    def wrong(spec, case, dtype, backend) -> None:
        if len(known := correct.known([other])) == 2:
            raise RuntimeError(f"CUDA error: launch failure after {len(known)}\nand more")
        raise AssertionError("out 0 is wrong")

    monkeypatch.setattr(correct, "one", wrong)
    monkeypatch.setattr(correct, "same_bits", wrong)
    assert correct.main(["cpu", str(other), *part]) == 3
    said = [json.loads(line)["result"] for line in other.read_text().splitlines()[1::2]]
    assert said == ["AssertionError: out 0 is wrong", "RuntimeError: CUDA error: launch failure after 2"]


def test_other_bits_are_seen(monkeypatch) -> None:
    correct = load("tests/gpu/correct.py")
    spec = correct.SPECS["layer_norm"]
    monkeypatch.setattr(correct, "REPEATS", 3)
    correct.same_bits(spec, spec.suite[0], torch.float32, "torch")
    noise = iter((0.0, 0.0, 1e-7))
    noisy = dataclasses.replace(spec, function=lambda **a: spec.function(**a) * (1 + next(noise)))
    with pytest.raises(AssertionError, match="of call 2 has other bits"):
        correct.same_bits(noisy, spec.suite[0], torch.float32, "torch")


def alive(process: str) -> bool:
    """One that was ended may wait for its parent to hear of it."""
    try:
        return Path("/proc", process, "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_at_its_limit_a_command_is_interrupted_and_leaves_no_process(tmp_path) -> None:
    """Interrupted it still writes what it has; its worker, which does not listen, is ended too."""
    gpu = load("bench/gpu.py")

    def run(stubborn: bool) -> tuple[str, bool, str]:
        """How it ended, whether it wrote something, and its worker's number."""
        folder = tmp_path / str(stubborn)
        folder.mkdir()
        child, said, script = folder / "child", folder / "said", folder / "command.py"
        script.write_text(f"""
import signal, subprocess, sys, time
from pathlib import Path
ignore = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(100)"
Path({str(child)!r}).write_text(str(subprocess.Popen([sys.executable, "-S", "-c", ignore]).pid))
# Not as the shell that started the tests may have it: one in the background ignores it.
signal.signal(signal.SIGINT, signal.SIG_IGN if {stubborn} else signal.default_int_handler)
try:
    time.sleep(100)
except KeyboardInterrupt:
    Path({str(said)!r}).write_text("two failed")
""")
        # On a busy machine a process takes seconds to start.
        return gpu.run([sys.executable, "-S", str(script)], 10), said.exists(), child.read_text()

    with ThreadPoolExecutor() as pool:
        found = dict(zip((False, True), pool.map(run, (False, True)), strict=True))
    for stubborn, (ended, wrote, worker) in found.items():
        assert ended == "did not end within 10 s"
        assert wrote != stubborn
        deadline = time.monotonic() + 20
        while alive(worker):
            assert time.monotonic() < deadline, "its worker is still there"
            time.sleep(0.1)


@pytest.mark.skipif(not torch.cuda.is_available() and importlib.util.find_spec("triton") is None, reason="no triton")
def test_the_few_calls_of_the_sanitizer_are_right(capsys) -> None:
    """Here in Triton's interpreter, or on the GPU."""
    assert load("tests/gpu/few_calls.py").main() == 0
    ran = capsys.readouterr().out
    assert all(f"triton {op} " in ran for op in ("layer_norm", "attention", "two_stream_attention"))
