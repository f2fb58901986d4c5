"""`make gpu`: everything that needs a GPU, on a machine with a CUDA build of torch and nothing to download.

    python bench/gpu.py [PART ...] [--out FOLDER]         without a part all but the last, in this order

build     the native module with CUDA kernels for this GPU, into build/gpu; beside it, on the other half of the cores:
triton    the common suite on backend "triton" in float32 and bfloat16, which needs no native module
test      the common suite on "cuda", and what is left of it on "triton", each in processes of their own; model parity
sanitize  compute-sanitizer's memcheck and racecheck, side by side, over a few calls of every op; beside them:
warm      what the races call is compiled, in processes that do not time it
bench     the twenty races that decide, row by row
tiles     the fastest tiles of six kernels of scores, kernel by kernel
prefer    which of cuda and triton is faster here, for backends/measured.json

A part has a time of its own to end in, and what it has found by then is in the folder: all end within nine minutes.
The exit status is 0 where every part that was asked for ran and passed.  It is run as a file, not as a module, since
the package is not there before it is laid out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "gpu"
# Seconds.
LIMITS = {"build": 100, "triton": 100, "test": 170, "sanitize": 50, "warm": 50, "bench": 130, "tiles": 80, "prefer": 40}
# What runs side by side, in this order.
STAGES = (("build", "triton"), ("test",), ("sanitize", "warm"), ("bench",), ("tiles",))
# Of its time, what a command has to end in when it is interrupted.
GRACE = 8.0
# Seconds in which nothing is heard of a case, or of a process that starts.
PATIENCE, START = 40.0, 90.0
# How often a worker is begun again, after a case that has taken its process along.
RESTARTS = 10
NEEDED = ("torch", "triton", "numpy", "pytest", "setuptools", "safetensors", "tokenizers", "transformers")
# Tests that are no cases of the suite.
TESTS = ("tests/gpu/test_graphed.py", "tests/gpu/test_models.py", "tests/ops/test_choice.py")
TESTS += ("tests/models/test_bert_parity.py", "tests/models/test_xlnet_parity.py")
# Kernels that most of the time of scores goes to.
TILED = ("attention_fwd", "attention_bwd_keys", "attention_bwd_queries")
TILED += ("relative_bwd_keys", "relative_bwd_queries", "relative_bwd_table")


class Share(NamedTuple):
    """What a part is given.

    Attributes:
        out: where it writes what it finds, as it finds it.
        limit: seconds.
        cores: processes that it may keep busy.
        before: the parts that have run before it in this run.
    """

    out: Path
    limit: float
    cores: int
    before: tuple[str, ...] = ()


def missing() -> str | None:
    """Why nothing can be run here, or None."""
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        return f"{', '.join(absent)} cannot be imported by {sys.executable}"
    if shutil.which("ninja") is None and not (Path(sys.executable).parent / "ninja").exists():
        return "ninja, which builds the native module, is not installed"
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    return None


def environment() -> dict[str, str]:
    """The package is found in build/gpu and nowhere else; nothing is fetched; what is compiled is kept."""
    kept = {"TRITON_CACHE_DIR": "triton-gpu", "TORCHINDUCTOR_CACHE_DIR": "inductor-gpu"}
    return os.environ | {
        "PYTHONPATH": str(BUILD),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **{name: os.environ.get(name, str(ROOT / "build" / folder)) for name, folder in kept.items()},
    }


def lay_out() -> None:
    """The package's Python files in build/gpu, where a native module that was built before stays."""
    for old in (BUILD / "pyxlbert").glob("*"):
        if old.is_dir():
            shutil.rmtree(old)
        elif not old.name.startswith("_C."):
            old.unlink()
    for source, name in (("pyxlbert", "pyxlbert"), ("kernels", "pyxlbert/kernels"), ("bench", "pyxlbert/bench")):
        ignored = shutil.ignore_patterns("__pycache__", "_C.*", "results")
        shutil.copytree(ROOT / source, BUILD / name, ignore=ignored, dirs_exist_ok=True)


def machine() -> dict[str, object]:
    """What the numbers are of."""
    import torch
    import triton

    found: dict[str, object] = {"python": platform.python_version(), "torch": torch.__version__}
    found |= {"cuda": torch.version.cuda, "triton": triton.__version__, "cores": os.cpu_count()}
    found |= {"gpu": torch.cuda.get_device_name(), "capability": list(torch.cuda.get_device_capability())}
    for name, command in (
        ("driver", ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        ("nvcc", [os.environ.get("NVCC") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc", "--version"]),
    ):
        with contextlib.suppress(OSError, IndexError):
            found[name] = subprocess.run(command, capture_output=True, text=True).stdout.strip().splitlines()[-1]
    return found


def start(command: Sequence[str], log: Path | None, variables: dict[str, str], cwd: Path = ROOT) -> subprocess.Popen:
    """A command in a session of its own; what it says is appended to the file."""
    print("$", " ".join(map(str, command)), flush=True)
    output = None if log is None else log.open("ab")
    try:
        return subprocess.Popen(
            command, cwd=cwd, env=environment() | variables, start_new_session=True, stdout=output, stderr=output
        )
    finally:
        if output is not None:
            output.close()


def run(command: Sequence[str], limit: float, log: Path | None = None, cwd: Path = ROOT, **variables: str) -> str:
    """Runs a command; says "passed" or why it did not.  Shortly before its limit it is interrupted, then ended."""
    process = start(command, log, variables, cwd)
    try:
        status = process.wait(limit - min(GRACE, limit / 4))
    except subprocess.TimeoutExpired:
        return f"did not end within {limit:.0f} s"
    finally:
        _end(process, min(GRACE, limit / 4))
    return "passed" if status == 0 else f"exit status {status}"


def _end(process: subprocess.Popen, grace: float) -> None:
    """Lets a command that still runs say what it has found, as pytest does, and leaves none of its processes behind."""
    if process.poll() is None and grace > 0:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    with contextlib.suppress(ProcessLookupError):
        # Its session is its own: workers that hold the device are in it.
        os.killpg(process.pid, signal.SIGKILL)
    # One that waits for the device may stay for as long as the driver likes.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)


@dataclass
class Worker:
    """A process that runs cases and appends what comes of them to a file, and those that follow it.

    Attributes:
        command: that goes on where an earlier process was; see tests/gpu/correct.py for the lines it writes.
        out: the file.
        ended: why none is begun any more; "" while one runs.
    """

    command: list[str]
    out: Path
    ended: str = ""
    restarts: int = 0
    process: subprocess.Popen | None = None
    # How long the file was when something was last heard of the process, and when that was.
    _size: int = 0
    _since: float = 0.0
    _heard: bool = False

    def begin(self) -> None:
        """Starts the process."""
        self._since, self._size, self._heard = time.monotonic(), self._length(), False
        self.process = start(self.command, self.log, {"OMP_NUM_THREADS": "1"})

    @property
    def log(self) -> Path:
        """What its processes print."""
        return self.out.with_suffix(".log")

    def _length(self) -> int:
        return self.out.stat().st_size if self.out.exists() else 0

    def lines(self) -> list[dict]:
        """What was written so far."""
        found = []
        for line in self.out.read_text(encoding="utf-8").splitlines() if self.out.exists() else ():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found

    def results(self) -> dict[str, str]:
        """Of every case that has one."""
        return {line["case"]: line["result"] for line in self.lines() if "case" in line}

    def look(self) -> None:
        """Ends what hangs, and begins the next process where one was lost."""
        if self._length() != self._size:
            self._since, self._size, self._heard = time.monotonic(), self._length(), True
        status = self.process.poll()
        patience = PATIENCE if self._heard else START
        if status == 0:
            self.ended = "done"
        elif status is not None:
            self._lost(f"its process ended with {status}" if status > 0 else f"its process ended by signal {-status}")
        elif time.monotonic() - self._since > patience:
            _end(self.process, 0)
            self._lost(f"did not end within {patience:.0f} s")

    def _lost(self, why: str) -> None:
        """Says of the case that was at work what became of it, and begins a process for the others."""
        _end(self.process, 0)
        if not self._heard:
            said = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            self.ended = f"{self.out.stem}: {why} before its first case: {(said or ['it said nothing'])[-1]}"
            return
        last = (self.lines() or [{}])[-1]
        if "begin" in last:
            with self.out.open("a", encoding="utf-8") as file:
                # A process that was ended may have left half a line.
                print("\n" + json.dumps({"case": last["begin"], "result": why}), file=file, flush=True)
        self.restarts += 1
        if self.restarts > RESTARTS:
            self.ended = f"{self.out.stem} was begun {self.restarts} times, the last {why}"
        else:
            self.begin()


def attend(workers: list[Worker], limit: float) -> str:
    """Runs workers side by side; says what came of their cases.  Shortly before the limit they are interrupted."""
    end = time.monotonic() + limit - min(GRACE, limit / 4)
    for worker in workers:
        worker.out.unlink(missing_ok=True)
        worker.begin()
    try:
        while any(not worker.ended for worker in workers) and time.monotonic() < end:
            for worker in workers:
                if not worker.ended:
                    worker.look()
            time.sleep(min(0.2, PATIENCE / 20))
    finally:
        late = [worker for worker in workers if not worker.ended]
        for worker in late:
            worker.process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + min(GRACE, limit / 4) / 2
        while any(worker.process.poll() is None for worker in late) and time.monotonic() < deadline:
            time.sleep(0.05)
        for worker in workers:
            _end(worker.process, 0)
    results = {f"{worker.out.stem} {case}": why for worker in workers for case, why in worker.results().items()}
    wrong = {case: why for case, why in results.items() if why != "passed"}
    said = [f"{len(wrong)} of {len(results)} failed, the first {next(iter(wrong.items()))}"] if wrong else []
    said += [worker.ended for worker in workers if worker.ended not in ("", "done")]
    if late:
        lines = [(worker.lines() or [{}])[-1] for worker in late]
        said.append(f"no time for the last {sum(line.get('left', 1) for line in lines)} cases")
    return "; ".join(said) or ("passed" if results else "no case has run")


def _correct(share: Share, name: str, backend: str, count: int, *more: str | Path) -> list[Worker]:
    outs = [share.out / f"{name}-{backend}-{place}.jsonl" for place in range(count)]
    script = str(ROOT / "tests" / "gpu" / "correct.py")
    return [
        Worker([sys.executable, script, backend, str(out), "--part", f"{place}/{count}", *map(str, more)], out)
        for place, out in enumerate(outs)
    ]


def build(share: Share) -> str:
    # Away from pyproject.toml, which asks for a newer setuptools than may be here and has nothing to say of this file.
    objects, library = (BUILD.with_name(f"gpu-{name}") for name in ("objects", "library"))
    objects.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "setup.py"), "--quiet", "build_ext"]
    command += ["--build-lib", str(library), "--build-temp", str(objects)]
    variables = {"PYXLBERT_CUDA": "auto", "PYXLBERT_CUDA_ARCHS": architecture(), "MAX_JOBS": str(share.cores)}
    result = run(command, share.limit, share.out / "build.log", objects, **variables)
    for module in library.glob("pyxlbert/_C.*.so") if result == "passed" else ():
        # Whole or not at all: others import the package meanwhile.
        os.replace(module, BUILD / "pyxlbert" / module.name)
    return result


def architecture() -> str:
    """What the CUDA kernels are compiled for: the machine code of this GPU, or what its driver can compile."""
    import torch

    major = torch.cuda.get_device_capability()[0]
    return {8: "80", 9: "90a", 10: "100", 12: "120"}.get(major, "100+PTX")


def triton(share: Share) -> str:
    dtypes = ("--dtypes", "float32", "bfloat16")
    return attend(_correct(share, "triton", "triton", share.cores, *dtypes), share.limit)


def test(share: Share) -> str:
    count = max(1, (share.cores - 1) // 2)
    # What part "triton" of this run has seen is not run again.
    done = sorted(share.out.glob("triton-triton-*.jsonl")) if "triton" in share.before else []
    workers = _correct(share, "test", "cuda", count) + _correct(share, "test", "triton", count, "--done", *done)
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *TESTS]
    with ThreadPoolExecutor() as pool:
        others = pool.submit(run, command, share.limit, share.out / "tests.log", OMP_NUM_THREADS="1")
        suite = attend(workers, share.limit)
        results = {"suite": suite, "tests": others.result()}
    return "; ".join(f"{name}: {result}" for name, result in results.items() if result != "passed") or "passed"


def sanitize(share: Share) -> str:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return "did not run: compute-sanitizer is not installed"

    def one(name: str) -> str:
        command = [tool, "--tool", name, "--error-exitcode", "99", sys.executable, "tests/gpu/few_calls.py"]
        # Each tensor is an allocation of its own, whose ends are watched.
        return run(command, share.limit, share.out / f"{name}.log", PYTORCH_NO_CUDA_MEMORY_CACHING="1")

    tools = ("memcheck", "racecheck")
    with ThreadPoolExecutor() as pool:
        results = dict(zip(tools, pool.map(one, tools), strict=True))
    return ", ".join(f"{name} {result}" for name, result in results.items() if result != "passed") or "passed"


def warm(share: Share) -> str:
    def one(place: int) -> str:
        command = [sys.executable, "-m", "pyxlbert.bench.warm", "--part", f"{place}/{count}"]
        return run(command, share.limit, share.out / f"warm-{place}.log", OMP_NUM_THREADS="1")

    count = max(1, min(share.cores - 2, 10))
    with ThreadPoolExecutor(count) as pool:
        results = list(pool.map(one, range(count)))
    return ", ".join(f"{place} {result}" for place, result in enumerate(results) if result != "passed") or "passed"


def bench(share: Share) -> str:
    name = re.sub(r"[^a-z0-9]+", "-", str(machine()["gpu"]).lower()).strip("-")
    command = [sys.executable, "-m", "pyxlbert.bench", "decide", "--device", "cuda"]
    # It ends by itself, with the row that it is at: see `--seconds`.
    command += ["--seconds", f"{share.limit - 20:.0f}", "--out", str(share.out / f"{name}.json")]
    return run(command, share.limit, share.out / "bench.log")


def tiles(share: Share) -> str:
    table = share.out / "tiles.csv"
    shutil.copyfile(ROOT / "kernels" / "tiles.csv", table)
    command = [sys.executable, "-m", "pyxlbert.bench.tune", "--only", *TILED, "--plain", "--head-sizes", "64"]
    command += ["--dtypes", "bfloat16", "--jobs", str(share.cores), "--seconds", f"{share.limit - 10:.0f}"]
    return run([*command, "--write", str(table)], share.limit, share.out / "tiles.log")


def prefer(share: Share) -> str:
    command = [sys.executable, "-m", "pyxlbert.bench.prefer", "--write", str(share.out / "measured.json")]
    return run([*command, "--seconds", f"{share.limit - 15:.0f}"], share.limit, share.out / "prefer.log")


PARTS: dict[str, Callable[[Share], str]] = {
    "build": build,
    "triton": triton,
    "test": test,
    "sanitize": sanitize,
    "warm": warm,
    "bench": bench,
    "tiles": tiles,
    "prefer": prefer,
}


def carry_out(stages: Sequence[tuple[str, ...]], out: Path) -> dict[str, str]:
    """What came of every part, which is written to summary.json as it comes."""
    results: dict[str, str] = {}
    cores = os.cpu_count() or 1

    def one(part: str, cores: int, before: tuple[str, ...]) -> None:
        began = time.monotonic()
        try:
            result = PARTS[part](Share(out, LIMITS[part], cores, before))
        except Exception as error:  # the parts behind it run all the same
            result = f"{type(error).__name__}: {error}"
        results[part] = result
        print(f"gpu: {part}: {result} ({time.monotonic() - began:.0f} s)", flush=True)
        write(out / "summary.json", results)

    for stage in stages:
        before = tuple(results)
        with ThreadPoolExecutor(len(stage)) as pool:
            for done in [pool.submit(one, part, max(1, cores // len(stage)), before) for part in stage]:
                done.result()
    return results


def _files() -> ModuleType:
    """pyxlbert/files.py, which imports nothing of the package."""
    spec = importlib.util.spec_from_file_location("files", ROOT / "pyxlbert" / "files.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(path: Path, content: object) -> None:
    """JSON, whole or not at all."""
    part = path.with_suffix(f".{os.getpid()}-{time.monotonic_ns()}")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; by default all but prefer")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-results", help="the folder of what is found")
    options = parser.parse_args(arguments)
    for part in options.parts:
        if part not in PARTS:
            parser.error(f"PART: got {part!r}, wanted one of {', '.join(PARTS)}")
    out = options.out.absolute()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: got {str(options.out)!r}, wanted a folder, or a name for one: {error.strerror}")
    try:
        _files().check_inside("--out", out)
    except OSError as error:
        parser.error(str(error))
    reason = missing()
    if reason is not None:
        print(f"gpu: nothing was run: {reason}", file=sys.stderr)
        return 2
    lay_out()
    write(out / "machine.json", machine())
    results = carry_out([(part,) for part in options.parts] or STAGES, out)
    print("\n".join(["", *(f"gpu: {part:9} {result}" for part, result in results.items()), f"gpu: see {out}"]))
    return 0 if all(result == "passed" for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
