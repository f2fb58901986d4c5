"""The build: levels, what the binary may hold, other processors."""

from __future__ import annotations

import os
import platform
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest

import pyxlbert

ROOT = Path(__file__).resolve().parents[2]


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, cwd=ROOT / "docs"
    )


@pytest.mark.parametrize("level", pyxlbert._C.levels())
def test_a_level_can_be_forced(level: str) -> None:
    done = run("import pyxlbert; print(pyxlbert._C.level())", PYXLBERT_ISA=level)
    assert done.stdout.strip() == level, done.stderr


def test_the_best_level_is_the_default() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYXLBERT_ISA"}
    code = "import pyxlbert; print(pyxlbert._C.level() == pyxlbert._C.levels()[-1])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


def test_an_unknown_level_is_an_error_that_names_it() -> None:
    done = run("import pyxlbert", PYXLBERT_ISA="sse9")
    assert done.returncode != 0
    assert "PYXLBERT_ISA" in done.stderr and "sse9" in done.stderr and "portable" in done.stderr


def command(*words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pyxlbert", *words], env=os.environ | environment, capture_output=True, text=True
    )


def test_info_runs_with_an_unknown_level_and_tells() -> None:
    done = command("info", PYXLBERT_ISA="sse9")
    assert done.returncode == 0, done.stderr
    assert "error: PYXLBERT_ISA: " in done.stdout and "sse9" in done.stdout
    done = command("embed", "-", "--model", "none", "--out", "none.npy", PYXLBERT_ISA="sse9")
    assert done.returncode == 1 and "PYXLBERT_ISA" in done.stderr and "Traceback" not in done.stderr


def test_a_level_without_the_native_module_is_an_error() -> None:
    hide = "import sys, torch; sys.modules['pyxlbert._C'] = None;"
    assert run(f"{hide} import pyxlbert").returncode == 0
    done = run(f"{hide} import pyxlbert", PYXLBERT_ISA="avx2")
    assert done.returncode != 0 and "PYXLBERT_ISA: got 'avx2', but the native module is not built" in done.stderr


def setup_globals() -> dict:
    """What setup.py defines, without a build."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


def test_the_build_says_a_line_for_each_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    defined = setup_globals()
    monkeypatch.delenv("PYXLBERT_CUDA", raising=False)
    lines = defined["report"]()
    assert [line.split()[2] for line in lines] == list(pyxlbert.backends.NAMES)
    monkeypatch.setenv("PYXLBERT_CUDA", "0")
    assert "PYXLBERT_CUDA=0" in defined["report"]()[-1]
    monkeypatch.setattr(defined["nvcc"], "find", lambda: None)
    for value, words in (("1", "no nvcc"), ("yes", "got 'yes', wanted 0, 1 or auto"), ("", "got ''")):
        monkeypatch.setenv("PYXLBERT_CUDA", value)
        with pytest.raises(SystemExit, match=words):
            defined["cuda_choice"]()


def test_cuda_is_built_for_a_torch_of_cuda_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    defined = setup_globals()
    why = defined["why_no_cuda"]
    monkeypatch.setattr(defined["nvcc"], "find", lambda: toolkit(defined, (13, 0)))
    for choice, version, words in (
        ("auto", "cuda: Optional[str] = '13.0'\n", None),
        ("auto", "cuda: Optional[str] = None\n", "not one for CUDA"),
        ("1", "cuda: Optional[str] = None\n", None),
        ("0", "cuda: Optional[str] = '13.0'\n", "PYXLBERT_CUDA=0"),
    ):
        monkeypatch.setenv("PYXLBERT_CUDA", choice)
        (tmp_path / "version.py").write_text(version)
        spec = mock.Mock(origin=str(tmp_path / "__init__.py"))
        with mock.patch("importlib.util.find_spec", return_value=spec):
            found = why()
        assert found is None if words is None else words in found


def toolkit(defined: dict, version: tuple[int, int]) -> NamedTuple:
    return defined["nvcc"].Toolkit("nvcc", Path("bin"), Path("include"), Path("libcudart_static.a"), version)


@pytest.mark.parametrize(
    ("version", "built"),
    [
        ((13, 0), ("80", "90a", "100", "100+PTX")),
        ((12, 8), ("80", "90a", "100", "100+PTX")),
        ((12, 7), ("80", "90a", "90+PTX")),
        ((12, 0), ("80", "90a", "90+PTX")),
        ((11, 8), None),
    ],
)
def test_an_older_toolkit_leaves_out_what_it_cannot_build(version, built, monkeypatch: pytest.MonkeyPatch) -> None:
    defined = setup_globals()
    nvcc = defined["nvcc"]
    monkeypatch.delenv("PYXLBERT_CUDA_ARCHS", raising=False)
    monkeypatch.setattr(nvcc, "ARCHITECTURES", ("80", "90a", "100", "100+PTX"))
    monkeypatch.setattr(nvcc, "find", lambda: toolkit(defined, version))
    monkeypatch.setitem(defined["report"].__globals__, "torch_for_cuda", lambda: True)
    monkeypatch.setenv("PYXLBERT_CUDA", "auto")
    line = defined["report"]()[-1]
    if built is None:
        assert line.endswith("not built: nvcc is of CUDA 11.8, and the kernels need 12.0 or later")
        monkeypatch.setenv("PYXLBERT_CUDA", "1")
        with pytest.raises(SystemExit, match=r"PYXLBERT_CUDA=1: nvcc is of CUDA 11\.8"):
            defined["cuda_choice"]()
        return
    assert nvcc.wanted() == built
    assert f"built ({', '.join(built)})" in line
    assert ("not for 100, which needs nvcc of CUDA 12.8" in line) == ("100" not in built)
    assert "compute_100" in nvcc.gencode(nvcc.wanted()) or "100" not in built
    monkeypatch.setenv("PYXLBERT_CUDA_ARCHS", "80 100")
    if "100" in built:
        assert nvcc.wanted() == ("80", "100")
    else:
        with pytest.raises(SystemExit, match=r"got '100', which needs nvcc of CUDA 12\.8, and nvcc is of 12\."):
            nvcc.wanted()


def test_the_toolkits_version_is_read_from_its_headers() -> None:
    nvcc = setup_globals()["nvcc"]
    if nvcc.find() is None:
        pytest.skip("no nvcc is here")
    said = subprocess.run([nvcc.find().nvcc, "--version"], capture_output=True, text=True).stdout
    assert f"release {nvcc.named(nvcc.find().version)}" in said


def test_architectures_are_named_as_nvcc_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = setup_globals()["nvcc"]
    monkeypatch.setenv("PYXLBERT_CUDA_ARCHS", "90a 100+PTX")
    assert nvcc.gencode(nvcc.wanted()) == (
        "-gencode=arch=compute_90a,code=sm_90a -gencode=arch=compute_100,code=compute_100"
    )
    monkeypatch.setenv("PYXLBERT_CUDA_ARCHS", "sm_90")
    with pytest.raises(SystemExit, match="PYXLBERT_CUDA_ARCHS: got 'sm_90'"):
        nvcc.wanted()


def test_kernel_objects_hold_no_weak_symbols() -> None:
    """A weak symbol of an AVX-512 object could replace the baseline's for the whole process."""
    objects = [
        path for path in sorted((ROOT / "build" / "in-place" / "cpu").glob("*.o")) if path.suffixes[1:] == [".o"]
    ]
    if not objects:
        pytest.skip("the objects of the in-place build are not here: run make build")
    wrong = []
    for path in objects:
        for line in subprocess.run(
            ["nm", "-C", str(path)], capture_output=True, text=True, check=True
        ).stdout.splitlines():
            kind, _, name = line[17:].partition(" ")
            # The reference to the unwinder's routine is data, the same in every object.
            if kind in "WwVvu" and not name.startswith("DW.ref."):
                wrong.append(f"{path.name}: {name}")
            if kind == "T" and f"pyxlbert::{path.name.split('.')[1]}::" not in name:
                wrong.append(f"{path.name}: {name} is outside its level's namespace")
    assert not wrong


def test_import_leaves_the_floating_point_mode_alone() -> None:
    code = "import numpy as np, pyxlbert; print(np.float32(1e-40) * np.float32(0.5) != 0)"
    assert run(code).stdout.strip() == "True"


def test_another_operating_system_gets_a_clear_message() -> None:
    code = (
        "import sys, sysconfig; sysconfig.get_config_vars(); import setuptools.command.build_ext;"
        "sys.platform = 'win32'; sys.argv = ['setup.py', 'build_ext', '--build-temp', 'none'];"
        f"import runpy; runpy.run_path({str(ROOT / 'setup.py')!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0
    assert "Linux only" in done.stderr, done.stderr[-500:]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the cross-compile starts from x86-64")
def test_portable_level_compiles_for_aarch64() -> None:
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("no aarch64-linux-gnu-g++ (Debian: g++-aarch64-linux-gnu; .ci/run installs it)")
    for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        command = [compiler, "-std=c++20", "-O0", "-fopenmp", "-Wall", "-DPYXLBERT_LEVEL=portable"]
        command += [f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
