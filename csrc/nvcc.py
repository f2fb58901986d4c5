"""Where nvcc is and how it is called: for setup.py, for the compile checks and for the emulation, which needs headers.

A file of its own and not of the package, since setup.py runs before there is one.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

# What is built where nothing else is asked for: one entry of PYXLBERT_CUDA_ARCHS each, "+PTX" for what a later device
# compiles itself.
ARCHITECTURES = ("80", "90a", "100", "100+PTX")
# The first toolkit that knows an architecture; and the first that compiles C++20.
_KNOWN_SINCE = {"100": (12, 8), "101": (12, 8), "120": (12, 8), "103": (12, 9), "121": (12, 9)}
OLDEST = (12, 0)
FLAGS = (
    "-std=c++20 -O3 --expt-relaxed-constexpr -Xcompiler=-fPIC,-fvisibility=hidden,-Wall "
    "-Xptxas=-v -Xfatbin=-compress-all --threads=0"
)


# Files that are compiled once per element type, with PYXLBERT_ELEMENT.
BY_ELEMENT = (
    "attention",
    "attention_bwd",
    "attention_hopper",
    "relative_attention",
    "relative_attention_bwd",
    "two_stream_attention",
)
ELEMENTS = ("float", "bfloat16", "float16")


class Toolkit(NamedTuple):
    """A CUDA toolkit: the compiler, the folder of the programs that it calls, its headers, the static runtime."""

    nvcc: str
    programs: Path
    include: Path
    cudart: Path
    version: tuple[int, int]


@functools.cache
def find() -> Toolkit | None:
    """The toolkit of NVCC, of CUDA_HOME or of the nvcc on the path; None where there is none."""
    home = os.environ.get("CUDA_HOME")
    nvcc = os.environ.get("NVCC") or (f"{home}/bin/nvcc" if home else None) or shutil.which("nvcc")
    if nvcc is None and Path("/usr/local/cuda/bin/nvcc").exists():
        nvcc = "/usr/local/cuda/bin/nvcc"
    if nvcc is None:
        return None
    # nvcc may be a script that calls another: it says itself where it is at home.
    command = [nvcc, "--dryrun", "-x", "cu", "-c", "/dev/null", "-o", "/dev/null"]
    try:
        said = subprocess.run(command, capture_output=True, text=True).stderr
    except OSError:
        return None
    top = re.search(r"^#\$ TOP=(.*)$", said, re.MULTILINE)
    if top is None:
        return None
    root = Path(top[1]).resolve()
    for base in (root / "targets" / "x86_64-linux", root):
        libraries = [base / name / "libcudart_static.a" for name in ("lib64", "lib")]
        found = [library for library in libraries if library.exists()]
        if found and (base / "include" / "cuda_runtime.h").exists():
            return Toolkit(nvcc, root / "bin", base / "include", found[0], _version(base / "include"))
    return None


def _version(include: Path) -> tuple[int, int]:
    """Of the toolkit with these headers, which are what the code is compiled against."""
    text = (include / "cuda_runtime_api.h").read_text(encoding="utf-8", errors="replace")
    number = re.search(r"^#define CUDART_VERSION\s+(\d+)", text, re.MULTILINE)
    return divmod(int(number[1]) // 10, 100) if number else (0, 0)


def too_old(version: tuple[int, int]) -> str | None:
    """Why a toolkit of this version cannot build the kernels at all, or None."""
    if version >= OLDEST:
        return None
    return f"nvcc is of CUDA {named(version)}, and the kernels need {named(OLDEST)} or later"


def named(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def needs(architecture: str) -> tuple[int, int]:
    """The first toolkit that compiles for one entry of PYXLBERT_CUDA_ARCHS."""
    return _KNOWN_SINCE.get(re.match(r"\d+", architecture)[0], OLDEST)


def units(folder: Path) -> list[tuple[Path, str, str]]:
    """What is compiled of a folder's .cu files: the file, the object's name without suffix, the compiler's options."""
    found = []
    for source in sorted(folder.glob("*.cu")):
        if source.stem in BY_ELEMENT:
            found += [(source, f"{source.stem}.{one}", f"-DPYXLBERT_ELEMENT={one}") for one in ELEMENTS]
        else:
            found.append((source, source.stem, ""))
    return found


def gencode(architectures: tuple[str, ...]) -> str:
    """nvcc's options for these: "90a" is machine code for sm_90a, "100+PTX" intermediate code."""
    options = []
    for one in architectures:
        number, _, ptx = one.partition("+")
        kind = f"compute_{number}" if ptx else f"sm_{number}"
        options.append(f"-gencode=arch=compute_{number},code={kind}")
    return " ".join(options)


def asked_for() -> tuple[str, ...]:
    """The architectures of PYXLBERT_CUDA_ARCHS, or all.

    Raises:
        SystemExit: one is not like "80", "90a" or "100+PTX", or there is none.
    """
    named = os.environ.get("PYXLBERT_CUDA_ARCHS")
    found = ARCHITECTURES if named is None else tuple(named.split())
    for one in found or ("",):
        if not re.fullmatch(r"\d+[af]?(\+PTX)?", one):
            raise SystemExit(f"pyxlbert: PYXLBERT_CUDA_ARCHS: got {one!r}, wanted some of {' '.join(ARCHITECTURES)}")
    return found


def wanted() -> tuple[str, ...]:
    """What is built: the architectures asked for that the toolkit here knows.

    If none of them is known, the newest device that the toolkit does know gets intermediate code, which later devices
    compile themselves.

    Raises:
        SystemExit: PYXLBERT_CUDA_ARCHS names what is none, or what the toolkit does not know.
    """
    toolkit, asked = find(), asked_for()
    if toolkit is None:
        return asked
    unknown = left_out()
    if unknown and "PYXLBERT_CUDA_ARCHS" in os.environ:
        one = unknown[0]
        raise SystemExit(
            f"pyxlbert: PYXLBERT_CUDA_ARCHS: got {one!r}, which needs nvcc of CUDA {named(needs(one))}, "
            f"and {toolkit.nvcc} is of {named(toolkit.version)}"
        )
    found = tuple(one for one in asked if one not in unknown)
    # Without the newest entry nothing would hold code for later devices.
    return found if not unknown or any(one.endswith("+PTX") for one in found) else (*found, "90+PTX")


def left_out() -> tuple[str, ...]:
    """The architectures asked for that the toolkit here is too old for."""
    toolkit = find()
    return () if toolkit is None else tuple(one for one in asked_for() if toolkit.version < needs(one))
