"""`make gpu` where there is no GPU, and its parts that need none."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def load(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
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


def test_a_setuptools_that_cannot_build_is_named(monkeypatch) -> None:
    gpu = load("bench/gpu.py")
    monkeypatch.setattr(gpu.importlib.metadata, "version", lambda name: "65.5.0")
    assert gpu.missing() == "setuptools is 65.5.0, wanted at least 77, which pyproject.toml needs"


def test_a_part_that_is_none_is_refused() -> None:
    done = command("tests")
    assert done.returncode == 2 and "PART: got 'tests', wanted one of build, test, sanitize, bench" in done.stderr


def test_all_parts_end_within_nine_minutes() -> None:
    gpu = load("bench/gpu.py")
    assert set(gpu.LIMITS) == set(gpu.PARTS) and sum(gpu.LIMITS.values()) <= 540


def test_every_path_it_tests_is_there() -> None:
    for path in load("bench/gpu.py").TESTS:
        assert (ROOT / path).exists(), path


def test_a_command_that_fails_or_does_not_end_is_no_success(monkeypatch) -> None:
    gpu = load("bench/gpu.py")
    assert gpu.run([sys.executable, "-c", "pass"], 60) == "passed"
    assert gpu.run([sys.executable, "-c", "raise SystemExit(3)"], 60) == "exit status 3"
    assert gpu.run([sys.executable, "-c", "import time; time.sleep(60)"], 0.5) == "did not end within 0 s"
    monkeypatch.setattr(gpu, "missing", lambda: None)
    monkeypatch.setattr(gpu, "BUILD", ROOT / "no such folder")
    assert gpu.main(["test"]) == 1
    for result, status in (("passed", 0), ("exit status 1", 1)):
        monkeypatch.setitem(gpu.PARTS, "build", lambda limit, result=result: result)
        assert gpu.main(["build"]) == status


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
        return gpu.run([sys.executable, "-S", str(script)], 20), said.exists(), child.read_text()

    with ThreadPoolExecutor() as pool:
        found = dict(zip((False, True), pool.map(run, (False, True)), strict=True))
    for stubborn, (ended, wrote, worker) in found.items():
        assert ended == "did not end within 20 s"
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
