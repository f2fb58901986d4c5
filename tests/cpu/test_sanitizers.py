"""The small grid of every op under AddressSanitizer and UBSan, on the portable level and the one this machine takes.

Their kernels are compiled once more with the sanitizers; `make sanitize` does it for every level that runs here, and
for levels avx2_vnni and amx as `test_tiles.py` has them where they do not.  It also watches what is no kernel, gives
bad inputs, has LeakSanitizer look at a thousand calls and ThreadSanitizer at eight threads.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys

import compiled
import pytest
import runners
import torch
import variants
from called_files import watched

import pyxlbert
from pyxlbert.testing.specs import SPECS

HERE = pyxlbert._C.levels()
ALL = os.environ.get("PYXLBERT_TEST_ALL") == "1"
EMULATED = ALL and HERE[-1] == "avx512_bf16"
MODELLED = EMULATED * [level for level in ("avx2_vnni", "amx") if level not in HERE]
# Few ops have an amx version: of the others the level below runs.
LEVELS = HERE + MODELLED if ALL else ["portable", *HERE[-2 if HERE[-1] == "amx" else -1 :]]
needs_all = pytest.mark.skipif(not ALL, reason="make sanitize")


def _runtime(sanitizer: str) -> str:
    """The sanitizer's library and the one whose `throw` it wraps: both are loaded before Python allocates."""
    compiler = os.environ.get("CXX", "g++")
    paths = []
    for name in (sanitizer, "libstdc++.so.6"):
        path = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        if not os.path.isabs(path):
            pytest.skip(f"{compiler} has no {name} here")
        paths.append(path)
    return " ".join(paths)


@functools.cache
def _built() -> dict[str, str]:
    """Environment variables under which Python imports the sanitized build."""
    runtime = _runtime("libasan.so")
    names = ",".join([*LEVELS, "module"] if ALL else LEVELS)
    watched = {"PYXLBERT_SANITIZE": "address,undefined", "PYXLBERT_SANITIZE_LEVELS": names}
    if EMULATED:
        watched["PYXLBERT_EMULATE_LEVELS"] = "1"
    return variants.build("sanitized", watched) | {
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "PYXLBERT_TEST_SMALL": ",".join(LEVELS),
    }


@pytest.mark.parametrize("level", ["portable", HERE[-1]])
@compiled.known(variants.digest)
def test_it_watches(level: str) -> None:
    """A call that is told of more rows than its output holds must be caught, or the run below proves nothing."""
    code = """if True:
        import torch, pyxlbert
        assert "sanitized" in pyxlbert._C.__file__
        x, y, mean, rstd = torch.ones(64, 8), torch.empty(63, 8), torch.empty(64), torch.empty(64)
        w = torch.ones(8)
        pyxlbert._C.cpu.layer_norm_bwd(x.data_ptr(), x.data_ptr(), w.data_ptr(), mean.data_ptr(), rstd.data_ptr(),
                                       y.data_ptr(), 0, 0, 64, 8, 8, 8, 0, 0, 0, 1)
    """
    environment = _built() | {"PYXLBERT_ISA": level}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr, done.stderr[-2000:]
    assert "layer_norm.cpp" in done.stderr


@compiled.known(variants.digest)
def test_small_grid() -> None:
    tests = [
        f"{variants.ROOT}/tests/ops/test_parity.py::test_{name}"
        for name in ("parity", "deterministic_for_any_number_of_threads")
    ]
    command = [sys.executable, "-m", "pytest", *tests, "-q", "-x", "-s", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=_built(), capture_output=True, text=True, cwd=variants.ROOT)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) > 0


@compiled.known(variants.digest)
def test_a_digest_is_of_all_that_runs() -> None:
    """Of what the tests of products call, and calls of every op; on the usual build."""
    called: set[str] = set()
    with watched(called):
        for spec in SPECS.values():
            case = next(case for case in spec.suite if case.small and case.gradients)
            arguments = runners.arguments_of(spec, case, torch.bfloat16)
            found = runners.run(lambda spec=spec, **a: spec.function(**a, backend="cpu"), spec, arguments, True)
            runners.check_against_truth(spec, case, found, torch.bfloat16, "cpu")
    names = ["test_packed_products.py", *(["test_products.py"] if "avx512_bf16" in HERE else [])]
    tests = [f"{variants.ROOT}/tests/cpu/{name}" for name in names]
    command = [sys.executable, "-m", "pytest", *tests, "--noconftest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "called_files"]
    environment = variants.usual() | {"PYTHONPATH": f"{variants.ROOT}/tests/cpu", "PYXLBERT_TEST_SMALL": HERE[-1]}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=variants.ROOT)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    called |= {line.removeprefix("calls ") for line in done.stdout.splitlines() if line.startswith("calls ")}
    ours = {file for file in called if file.startswith((f"{variants.ROOT}/pyxlbert/", f"{variants.ROOT}/tests/"))}
    expected = ("pyxlbert/checks.py", "pyxlbert/ops/_integers.py", "pyxlbert/nn/vocabulary_loss.py")
    assert ours >= {f"{variants.ROOT}/{name}" for name in expected[: 1 + len(names)]}
    assert ours <= {str(path) for path in variants.files()}


needs_products = pytest.mark.skipif("avx512_bf16" not in HERE, reason="training's products need AVX-512 with bfloat16")


@pytest.mark.parametrize("name", ["test_packed_products.py", pytest.param("test_products.py", marks=needs_products)])
@compiled.known(variants.digest)
def test_products(name: str) -> None:
    command = [sys.executable, "-m", "pytest", f"{variants.ROOT}/tests/cpu/{name}", "--noconftest"]
    command += ["-q", "-x", "-s", "-p", "no:cacheprovider"]
    environment = _built() | {"PYXLBERT_TEST_SMALL": LEVELS[-1]}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=variants.ROOT)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) > 0


@needs_all
@pytest.mark.parametrize("name", ["test_contract.py::test_bad_input", "test_storage.py"])
def test_bad_inputs(name: str) -> None:
    """Arguments that contradict each other, raw ops, storages that are gone: refused before they are read."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        f"{variants.ROOT}/tests/ops/{name}",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
    ]
    for level in LEVELS:
        done = subprocess.run(
            command, env=_built() | {"PYXLBERT_ISA": level}, capture_output=True, text=True, cwd=variants.ROOT
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) > 20


def _leaked(environment: dict[str, str], level: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python's own allocator would keep what is lost in its pools."""
    options = f"{environment['ASAN_OPTIONS']}:detect_leaks=1:leak_check_at_exit=0"
    changed = {"ASAN_OPTIONS": options, "PYTHONMALLOC": "malloc", "PYXLBERT_ISA": level}
    command = [sys.executable, f"{variants.ROOT}/tests/cpu/leaked.py", *arguments]
    return subprocess.run(command, env=environment | changed, capture_output=True, text=True)


@needs_all
@pytest.mark.parametrize("level", LEVELS)
def test_a_thousand_calls_lose_no_memory(level: str) -> None:
    done = _leaked(_built(), level)
    assert done.returncode == 0 and "ERROR: LeakSanitizer" not in done.stderr, done.stdout + done.stderr[-6000:]
    assert done.stdout == f"1000 calls on level {level}, no memory lost\n"


@needs_all
def test_memory_that_is_lost_is_seen() -> None:
    done = _leaked(_built(), "portable", "planted")
    assert done.stdout == "1000 calls on level portable, some memory lost\n", done.stdout + done.stderr[-6000:]
    # The last ones may still lie on the stack.
    found = re.search(r"Direct leak of \d+ byte\(s\) in (\d+) object\(s\)", done.stderr)
    assert found is not None and 900 < int(found[1]) <= 1000, done.stderr[-6000:]


@pytest.fixture(scope="module")
def raced() -> dict[str, str]:
    """Environment variables under which Python imports the build that ThreadSanitizer watches."""
    runtime = _runtime("libtsan.so")
    watched = {"PYXLBERT_SANITIZE": "thread", "PYXLBERT_SANITIZE_LEVELS": f"{HERE[-1]},module"}
    options = "ignore_noninstrumented_modules=1:halt_on_error=1:exitcode=66"
    return variants.build("raced", watched) | {"LD_PRELOAD": runtime, "TSAN_OPTIONS": options}


def _threads(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"{variants.ROOT}/tests/cpu/shared_by_threads.py", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@needs_all
def test_threads_share_no_memory(raced) -> None:
    done = _threads(raced)
    assert done.returncode == 0 and "ThreadSanitizer" not in done.stderr, done.stdout + done.stderr[:6000]
    assert done.stdout.startswith("ended") and "raced" in done.stdout


@needs_all
def test_threads_that_share_a_result_are_seen(raced) -> None:
    done = _threads(raced, "result")
    assert done.returncode == 66
    assert "data race" in done.stderr and "layer_norm.cpp" in done.stderr, done.stderr[:2000]
