"""Builds the emulation, csrc/cuda by g++, and loads it.

Objects are kept in build/emulation and made again only where a source has changed.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "emulation"
# The processor's level is that of every machine of the last ten years; nothing is contracted, as in nvcc's flags.  -O2
# compiles for a third longer, and the runs take as long.
FLAGS = (
    "-std=c++20 -O1 -g1 -march=x86-64-v3 -ffp-contract=off -fopenmp -fPIC -fvisibility=hidden -Wall -Wextra "
    "-Wno-unknown-pragmas -Wno-class-memaccess -DPYXLBERT_EMULATE -DPYXLBERT_FEW_SIZES"
)
# Where compiling takes longer than running: planted bugs, and all that sanitizers watch.
QUICKLY = "-Og"
# A planted bug is looked for in bfloat16, with heads of HEAD_SIZE at most; it is compiled for one run.
FEWER, HEAD_SIZE = f"-DPYXLBERT_ONE_TYPE -DPYXLBERT_ONE_SIZE {QUICKLY}", 64
PRECOMPILED = BUILD / "precompiled.h.gch"


def _file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


nvcc = _file(ROOT / "csrc" / "nvcc.py")


def missing() -> str | None:
    """Why the emulation cannot be built here, or None."""
    if nvcc.find() is None:
        return "the emulation of CUDA needs nvcc's headers, and no nvcc is here"
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        return "the emulation of CUDA needs g++"
    return None


def sanitizer() -> str | None:
    """What is loaded before Python for a module with AddressSanitizer, or None where it is not here."""
    compiler = os.environ.get("CXX", "g++")
    found = []
    for name in ("libasan.so", "libstdc++.so"):
        said = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        if not Path(said).is_absolute():
            return None
        found.append(str(Path(said).resolve()))
    return " ".join(found)


def build(
    folder: Path = BUILD,
    sources: Path = ROOT / "csrc",
    options: str = "",
    only: Callable[[str], bool] = lambda unit: True,
) -> Path:
    """The module's file, built where it is not up to date.

    Args:
        folder: of the objects and the module.
        sources: a copy of csrc, where tests plant a bug.
        options: more of the compiler's.
        only: which units are compiled; of the others nothing may be called.

    Raises:
        RuntimeError: something does not compile.
    """
    import pybind11

    folder.mkdir(parents=True, exist_ok=True)
    include = f"-I{sources} -I{HERE} -isystem {nvcc.find().include}"
    python = (
        f"-isystem {pybind11.get_include()} -isystem {sysconfig.get_path('include')} "
        f"-isystem {sysconfig.get_path('platinclude')} -O1"
    )
    output = folder / f"_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    lines = [
        "ninja_required_version = 1.3",
        f"cxx = {os.environ.get('CXX', 'g++')}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule precompile",
        "  command = $cxx -MMD -MF $out.d $flags -x c++-header $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule copy",
        "  command = cp $in $out",
        "rule link",
        "  command = $cxx $in -o $out $flags",
    ]
    objects = []
    units = [unit for unit in nvcc.units(sources / "cuda") if only(unit[1])]
    units.append((HERE / "emulation.cpp", "emulation.cpp", ""))
    binding = [(HERE / "module.cpp", "module.cpp", python), (sources / "cuda" / "bindings.cpp", "bindings.cpp", python)]
    if folder == BUILD:
        units += binding
        lines += [
            f"build {PRECOMPILED.name}: precompile {HERE / 'precompiled.h'}",
            f"  flags = {FLAGS} {QUICKLY} {include}",
            # What is read where the compiler is no longer that which compiled it.
            f"build {PRECOMPILED.stem}: copy {HERE / 'precompiled.h'}",
        ]
    else:
        # The binding is the same, and takes longest to compile.
        build()
        objects += [str(BUILD / f"{name}.o") for _, name, _ in binding]
    for source, name, more in units:
        objects.append(f"{name}.o")
        lines += [f"build {objects[-1]}: compile {source}", f"  flags = {FLAGS} {options} {include} {more}"]
    lines += [f"build {output}: link {' '.join(objects)}", f"  flags = -shared -fopenmp {options}", ""]
    with open(folder / "lock", "w") as lock:
        # Processes of one test run start together.
        fcntl.flock(lock, fcntl.LOCK_EX)
        script = folder / "build.ninja"
        text = "\n".join(lines)
        if not script.exists() or script.read_text() != text:
            script.write_text(text)
        command = [_ninja(), "-C", str(folder), "--quiet", f"-j{os.cpu_count() or 1}"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the emulation does not build:\n{done.stdout[-4000:]}{done.stderr[-2000:]}")
    return output


def _ninja() -> str:
    beside_python = Path(sys.executable).parent / "ninja"
    return str(beside_python) if beside_python.exists() else shutil.which("ninja")


def included() -> list[Path]:
    """The files that the compiler has read for the emulation, which is built."""
    command = [_ninja(), "-C", str(BUILD), "-t", "deps"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sorted({Path(line.strip()) for line in said.splitlines() if line.startswith(" ")})


def variant(folder: Path, unit: str, file: str, old: str, new: str) -> Path:
    """The module with one unit compiled from a copy of the sources in which `old` is replaced by `new`, see FEWER.

    Raises:
        ValueError: the file does not hold `old` exactly once.
        RuntimeError: it does not compile.
    """
    build()
    sources = folder / "csrc"
    shutil.copytree(ROOT / "csrc", sources)
    path = sources / "cuda" / file
    text = path.read_text()
    if text.count(old) != 1:
        raise ValueError(f"{file}: got {text.count(old)} places with {old!r}, wanted 1")
    path.write_text(text.replace(old, new))
    source, options = {name: (source, options) for source, name, options in nvcc.units(sources / "cuda")}[unit]
    include = f"-I{sources} -I{HERE} -isystem {nvcc.find().include}"
    target, output = folder / f"{unit}.o", folder / f"_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    names = [*(name for _, name, _ in nvcc.units(sources / "cuda")), "module.cpp", "emulation.cpp", "bindings.cpp"]
    others = [str(BUILD / f"{name}.o") for name in names if name != unit]
    compiler = os.environ.get("CXX", "g++")
    # The bug first: of functions that several objects hold the linker keeps one, the first.
    first = f"-include {PRECOMPILED.with_suffix('')}"
    compile_it = f"{compiler} {FLAGS} {FEWER} {options} {first} {include} -x c++ -c {source} -o {target}"
    for command in (compile_it.split(), [compiler, str(target), *others, "-shared", "-fopenmp", "-o", str(output)]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"the emulation does not build:\n{done.stderr[-4000:]}")
    return output


def load(path: Path | None = None) -> ModuleType:
    """The module of the emulated kernels, built first unless a file is named."""
    path = path or build()
    spec = importlib.util.spec_from_file_location("_emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
